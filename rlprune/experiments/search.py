"""``rlprune.search``: the main job from Python, on a model and data of the user's."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ..config.config import Config
from ..errors import ConfigError, DataError
from ..execution import with_threads
from ..utils.progress import Callback, default_callback
from ..utils.pytrees import Inputs
from ..workloads.base import Workload
from ..workloads.checks import check_workload
from ..workloads.loaders import Loader, LoaderWorkload
from ..workloads.tasks import TaskType
from .prepare import Experiment, config_of, prepare_experiment
from .result import PruningResult
from .train import run
from .usage import check_usage


def search(
    model: nn.Module | Workload | Sequence[Workload],
    example_inputs: Inputs | None = None,
    *,
    loaders: Mapping[str, Loader] | None = None,
    task: str | TaskType | None = None,
    budget: float | int | str = 0.5,
    metric: str = "macs",
    evaluations: int = 300,
    agent: str = "ppo",
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    callback: Callback | None = None,
) -> PruningResult:
    """Learn how much to prune from each layer of a model, and prune it.

    Rules, random search and the agent try plans under the same budget; each plan is built, recovered and scored on the
    validation split. The best one becomes the final model. The test split is read once, at the end.

    Args:
        model: a dense, trained model, with its ``example_inputs`` and ``loaders``; or a Workload, which brings its own;
            or several Workloads, of which the first is pruned and all train the policy.
        example_inputs: one sample, such as ``torch.zeros(1, 3, 224, 224)``; a tuple of arguments or a dict of them
            where there are several.
        loaders: {"train", "calibration", "validation", "test"} -> DataLoader, list or function that gives batches
            (inputs, targets); see :class:`rlprune.workloads.loaders.LoaderWorkload`.
        task: what the model's outputs mean (``rlprune list tasks``); by default classification, or next tokens.
        budget: what may be left: a share (0.5, "50%") or an absolute cost ("150M"; "3.5ms" for latency).
        metric: the cost that the budget limits: "macs", "params", "latency", ...
        evaluations: distinct plans that the agent may have scored.
        agent: who searches (``rlprune list agents``).
        settings: further settings, nested as in a YAML file: ``{"finish": {"epochs": 5}, "recovery": {...}}``.
        out: folder of the run, for ``resume`` and for the files; a temporary one, which goes with the result, when not
            given.
        resume: go on with what a killed run left in ``out``.
        callback: is told of the progress, and may end the search early; by default bars on a terminal, else nothing.

    Raises:
        ConfigError, DataError, GraphError, BudgetError: in one line what is wrong, and what is allowed.
    """
    workloads = _workloads(model, example_inputs, loaders, task)
    if out is None and resume:
        raise ConfigError("resume: needs the folder of the run, out=...")
    config = config_of(
        workloads[0],
        settings or {},
        {
            "seed": seed,
            "budget": {"target": budget, "metric": metric},
            "search": {"agent": agent, "evaluations": evaluations},
        },
    )
    check_usage(config, "train")
    return _run(with_threads(config), workloads, out, resume, callback or default_callback())


def _run(
    config: Config, workloads: Sequence[Workload], out: str | Path | None, resume: bool, callback: Callback
) -> PruningResult:
    kept = tempfile.TemporaryDirectory(prefix="rlprune-") if out is None else None
    folder = Path(kept.name if kept is not None else str(out))

    def prepared(folder: Path) -> list[Experiment]:
        return [
            prepare_experiment(
                config, workload=own, callback=callback, run=folder, name=str(i) if i else "", searches=True
            )
            for i, own in enumerate(workloads)
        ]

    result = run(config, prepared, folder, resume, callback)
    # The folder lives as long as the result does.
    result.temporary, result.workload = kept, workloads[0]
    return result


def _workloads(
    model: nn.Module | Workload | Sequence[Workload],
    example_inputs: Inputs | None,
    loaders: Mapping[str, Loader] | None,
    task: str | TaskType | None,
) -> list[Workload]:
    if isinstance(model, nn.Module):
        if example_inputs is None or loaders is None:
            missing = "example_inputs" if example_inputs is None else "loaders"
            raise DataError(f"{missing}: needed with a model; or give a rlprune.Workload instead of it")
        return [check_workload(LoaderWorkload(model, example_inputs, loaders, task=task))]
    own = {"example_inputs": example_inputs, "loaders": loaders, "task": task}
    given = next((name for name, value in own.items() if value is not None), None)
    if given is not None:
        raise DataError(f"{given}: a Workload brings its own; give a torch.nn.Module with it")
    every = list(model) if isinstance(model, (list, tuple)) else [model]
    if not every:
        raise DataError("model: expected a torch.nn.Module or a rlprune.Workload, got an empty sequence")
    return [check_workload(own) for own in every]
