"""Incremental pruning led by a rule: cut a little, train, look again, cut again (Adapt-Pruner).

The learned counterpart needs nothing of this file: with ``search.stages`` above 1 and the recovery step
``finetune`` an agent chooses the distribution of each stage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import ArtifactError, ConfigError
from ..evaluation.importance import compute
from ..evaluation.recovery import Recovery
from ..pruning.history import History, Widths, final_widths
from ..pruning.plan import Plan, make_plan
from ..pruning.space import PruningSpace
from ..pruning.surgery import prune
from ..rules.context import Context, rule_widths
from ..utils.arrays import Ints
from ..utils.checkpoints import forget, require_same
from ..utils.files import read_json, read_tensors, write_json_atomic, write_tensors_atomic
from ..utils.progress import Callback
from ..utils.values import are_whole
from ..workloads.adapter import TuneJob
from .prepare import Experiment, find_rule


@dataclass(frozen=True)
class Incremental:
    """What an incremental pruning ends in.

    ``plan`` is in units of the dense model; ``history`` holds the widths (G,) after each stage; ``rounds`` one
    dict a stage: cost, loss and metric on the validation split after its training.
    """

    model: nn.Module
    plan: Plan
    history: History
    rounds: tuple[dict[str, Any], ...]


@dataclass
class _Now:
    """The model as it stands: its space, and which units of the dense model it has kept."""

    model: nn.Module
    space: PruningSpace
    kept: tuple[Ints, ...]


def incremental(
    experiment: Experiment,
    rule: str | Sequence[Sequence[int]],
    *,
    stages: int = 5,
    steps: int = 0,
    seed: int = 0,
    out: str | Path | None = None,
    callback: Callback | None = None,
) -> Incremental:
    """Prune in rounds: statistics, rule, cut, closed-form recovery and training, each on what is left.

    Adapt-Pruner (Pan et al. 2025, arXiv 2502.03460): 5 to 20 rounds of about 5% with linear targets, the
    importances recomputed in each, all parameters trained in between at a peak of 2e-5. Round t of T cuts to
    ``dense - t / T (dense - budget)`` in the budget's metric (the published one is ``params``). The recovery steps
    of the settings follow each cut, but for their gradient steps: ``steps`` of training take their place
    (`language.tuning.finetune.tune` for language models, by ``finish.method`` with ``finish.lr`` and the rest of that
    section; SGD otherwise). ``method: full`` is the published choice.

    Args:
        rule: name of a rule; or the widths (G,) after each stage themselves, none above those before.
        stages: rounds; ignored where the widths are given.
        steps: optimizer steps of each round, 0 for none.
        seed: of the training's data; every round has text of its own.
        out: folder of the state; rounds that an earlier try finished are taken from there.

    Raises:
        ConfigError: an unknown rule, or no stage at all.
        BudgetError: the budget or the widths do not fit.
        ArtifactError: ``out`` holds the state of other settings.
    """
    callback = callback or Callback()
    wanted = [] if isinstance(rule, str) else [np.asarray(w, dtype=np.int64) for w in rule]
    stages = stages if isinstance(rule, str) else len(wanted)
    if stages < 1 or steps < 0:
        raise ConfigError(f"stages: at least 1 stage and 0 steps are needed, got {stages} and {steps}")
    if isinstance(rule, str):
        find_rule(rule)
    space = experiment.space
    now = _Now(experiment.workload.model, space, tuple(np.arange(g.units) for g in space.groups))
    kept = _Rounds(out, experiment, rule, stages, steps, seed)
    history: list[Widths] = []
    rounds = []
    for stage in range(1, stages + 1):
        folder = None if out is None else Path(out) / f"round-{stage}.state"
        finished = kept.load(stage, now)
        if finished is None:
            if isinstance(rule, str):
                widths = _widths(experiment, rule, now, stage, stages)
            else:
                widths = wanted[stage - 1]
            job = TuneJob(seed + 1000 * stage, steps, folder, callback.training, f"round {stage}/{stages}")
            now, finished = _round(experiment, now, widths, job)
            kept.save(stage, now, finished)
        history.append(tuple(space.widths_of(now.kept).tolist()))
        rounds.append(finished)
    origin = {"method": rule if isinstance(rule, str) else "widths", "stages": stages, "steps": steps}
    origin |= {"budget": str(experiment.budget), "metric": experiment.metric}
    plan = Plan(space, final_widths(tuple(history)), now.kept, origin)
    return Incremental(now.model, plan, tuple(history), tuple(rounds))


def _round(experiment: Experiment, now: _Now, widths: Ints, job: TuneJob) -> tuple[_Now, dict[str, float]]:
    """Cut to ``widths``, train where ``job`` has steps, validate: the smaller model, and the facts of the round."""
    now = _cut(experiment, now, widths)
    if job.steps:
        experiment.workload.fine_tune(now.model, experiment.config.finish, job)
    quality = experiment.workload.evaluate(now.model, "validation")
    cost = experiment.space.cost(widths, experiment.metric)
    return now, {"cost": cost, "loss": quality.loss, "metric": quality.metric}


def _widths(experiment: Experiment, rule: str, now: _Now, stage: int, stages: int) -> Ints:
    """What the rule keeps after a stage, judged by the model as it stands now."""
    dense, metric = experiment.space.dense_cost(experiment.metric), experiment.metric
    # The costs count kept units, so a stage's absolute target means the same in every stage's space.
    share = (dense - stage / stages * (dense - experiment.target)) / now.space.dense_cost(metric)
    share = min(1.0, share)
    context = Context(
        space=now.space,
        model=now.model,
        importance=_importance(experiment, now),
        budget=share,
        metric=metric,
        workload=experiment.workload,
        seed=experiment.config.seed,
    )
    return rule_widths(find_rule(rule), context)


def _importance(experiment: Experiment, now: _Now) -> Any:
    if now.model is experiment.workload.model:
        return experiment.evaluator.importance
    name = experiment.config.prune.importance
    return compute(name, experiment.workload, now.space, experiment.config.seed, now.model)


def _cut(experiment: Experiment, now: _Now, widths: Ints) -> _Now:
    """The next smaller model, recovered without gradient steps."""
    settings = experiment.config.recovery
    closed = tuple(step for step in settings.steps if step != "finetune") or ("none",)
    settings = replace(settings, steps=closed, finetune_steps=0)
    cut = make_plan(now.space, importance=_importance(experiment, now), widths=widths)
    slim = prune(now.model, cut)
    Recovery(experiment.workload, now.space, settings, now.model)(slim, cut)
    kept = tuple(before[units] for before, units in zip(now.kept, cut.kept, strict=True))
    return _Now(slim, experiment.space.after(kept), kept)


class _Rounds:
    """The finished rounds in a state folder: weights and kept units of the last, the facts of all."""

    def __init__(
        self,
        out: str | Path | None,
        experiment: Experiment,
        rule: str | Sequence[Sequence[int]],
        stages: int,
        steps: int,
        seed: int,
    ) -> None:
        self._folder = None if out is None else Path(out)
        config = experiment.config
        facts = [
            config.finish,
            config.recovery,
            config.prune,
            experiment.budget,
            experiment.metric,
            rule,
            stages,
        ]
        self._key = repr([*facts, steps, seed, experiment.space.fingerprint])
        self._done: list[dict[str, Any]] = []
        self._last: dict[str, Any] | None = None
        if self._folder is not None and (self._folder / "rounds.json").is_file():
            content = read_json(self._folder / "rounds.json")
            require_same(self._folder, content, {"key": self._key})
            self._done, self._last = _rounds(content, self._folder), content
        self._experiment = experiment

    def load(self, stage: int, now: _Now) -> dict[str, Any] | None:
        """The facts of a finished round; with the last of them ``now`` becomes the model that it left."""
        if self._last is None or stage > len(self._done):
            return None
        self._forget_before(stage)
        # The rounds before the last give their widths only: their weights are gone, and nobody needs them.
        now.kept = tuple(np.array(k, dtype=np.int64) for k in self._done[stage - 1]["kept"])
        if stage == len(self._done) and self._folder is not None:
            space = self._experiment.space
            cut = Plan(space, space.widths_of(now.kept), now.kept)
            now.model = prune(self._experiment.workload.model, cut)
            now.space = space.after(now.kept)
            _put(now.model, read_tensors(self._folder / f"round-{stage}.safetensors"))
        return {k: v for k, v in self._done[stage - 1].items() if k != "kept"}

    def save(self, stage: int, now: _Now, facts: dict[str, float]) -> None:
        if self._folder is None:
            return
        tensors = {name: p.detach() for name, p in now.model.named_parameters()}
        tensors |= dict(now.model.named_buffers())
        write_tensors_atomic(self._folder / f"round-{stage}.safetensors", tensors)
        self._done.append(facts | {"kept": [k.tolist() for k in now.kept]})
        write_json_atomic(self._folder / "rounds.json", {"key": self._key, "rounds": self._done})
        self._forget_before(stage)

    def _forget_before(self, stage: int) -> None:
        """Remove what a finished round no longer needs: its training's state, and the weights that it started from."""
        if self._folder is not None:
            forget(self._folder / f"round-{stage - 1}.safetensors")
            forget(self._folder / f"round-{stage}.state")


def _rounds(content: Mapping[str, Any], folder: Path) -> list[dict[str, Any]]:
    """The finished rounds of a state: the facts of each, and the units that its groups kept."""
    rounds = content.get("rounds")
    for done in rounds if isinstance(rounds, list) else [None]:
        kept = done.get("kept") if isinstance(done, dict) else None
        if not isinstance(kept, list) or not all(map(are_whole, kept)):
            raise ArtifactError(
                f"{folder / 'rounds.json'}: damaged: a round without its kept units; delete it"
            )
    return list(rounds or ())


def _put(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put tensors in by name; a bias that the recovery gave a layer is made."""
    with torch.no_grad():
        for name, tensor in tensors.items():
            parent, _, last = name.rpartition(".")
            module = model.get_submodule(parent)
            old = getattr(module, last)
            if old is None:
                setattr(module, last, nn.Parameter(tensor.to(next(model.parameters()).device)))
            else:
                old.copy_(tensor)
