"""One cell of a benchmark: one method under one seed, one budget and one dense model, in a file once it is finished.

The file is named after a hash of everything that determines its content and lists that, so that a stopped
benchmark goes on where it was and one with more methods, seeds or budgets reuses what is there.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..agents import AGENTS
from ..agents.callbacks import Progress
from ..config.config import Config, settings_reference
from ..errors import ArtifactError, RlpruneError, one_line
from ..evaluation.ledger import EvaluationLog
from ..experiments.choice import choose
from ..experiments.finish import finish
from ..experiments.methods import MethodResult, run_agent, score_rule
from ..experiments.prepare import Experiment, prepare_experiment
from ..experiments.train import results_of
from ..plugins import fingerprint, fingerprint_of_settings
from ..rules import RULES
from ..utils.checkpoints import forget, settings_key
from ..utils.dotted import flat
from ..utils.exits import own_exits_named
from ..utils.files import read_json, write_json_atomic
from ..utils.machine import library_versions
from ..utils.progress import Callback

DENSE = "dense"
_TELL_SECONDS = 1.0
# Settings that say how a run is shown or where it runs, not what comes out of a cell.
_NOT_DETERMINING = (
    "name", "device", "threads", "seed", "search.baselines", "search.tensorboard", "search.trackers", "finish.rules",
    "execution",
)  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """What is computed at once; the seed decides the search and the final fine-tune.

    ``checkpoint`` is added to the seeds of the dense model and of the splits.
    """

    method: str
    seed: int
    budget: str | float
    checkpoint: int = 0

    def __str__(self) -> str:
        where = f", checkpoint {self.checkpoint}" if self.checkpoint else ""
        return f"{self.method}, seed {self.seed}, budget {self.budget}{where}"


class PreparedExperiments:
    """The prepared experiment of every dense model that cells ask for, each prepared once and kept."""

    def __init__(self, config: Config, callback: Callback | None = None) -> None:
        self.config = config
        self._callback = callback
        self._prepared: dict[int, Experiment] = {}

    def of(self, checkpoint: int) -> Experiment:
        """The experiment of a dense model, which is trained where it is not in the cache folder."""
        if checkpoint not in self._prepared:
            settings = with_checkpoint(self.config, checkpoint)
            self._prepared[checkpoint] = prepare_experiment(settings, callback=self._callback, searches=True)
        return self._prepared[checkpoint]


def with_checkpoint(config: Config, checkpoint: int) -> Config:
    """The settings of another dense model: the seeds of its weights, its training and its splits are other ones."""
    model = replace(config.model, seed=config.model.seed + checkpoint)
    return replace(config, model=model, data=replace(config.data, seed=config.data.seed + checkpoint))


def determinants(config: Config, cell: Cell) -> dict[str, Any]:
    """Everything that decides what comes out of a cell, by dotted name: settings, method, seeds, libraries."""
    settings = flat(json.loads(json.dumps(with_checkpoint(config, cell.checkpoint).to_dict())))
    settings["budget.target"] = cell.budget
    skipped = list(_NOT_DETERMINING)
    if cell.method == DENSE:
        skipped.append("budget.target")
    if cell.method in RULES or cell.method == DENSE:
        skipped.append("search")
    elif getattr(AGENTS[cell.method], "own", None) is None:
        # The settings of other agents; ppo's are those of ppo_... as well. A plugin's agent may read any.
        skipped += [f"search.{name}" for name in AGENTS if not cell.method.startswith(name)]
    kept = {
        key: value
        for key, value in settings.items()
        if not any(key == name or key.startswith(f"{name}.") for name in skipped)
    }
    about: dict[str, Any] = {"method": cell.method, "cell seed": cell.seed, "prepared with seed": config.seed}
    # A name from outside says nothing of the code behind it.
    for name in dict.fromkeys((cell.method, config.search.base_rule)):
        if (digest := fingerprint(name)) is not None:
            about[f"code of {name}"] = digest
    about |= {f"code of {name}": digest for name, digest in fingerprint_of_settings(config).items()}
    return kept | about | flat({"libraries": library_versions()})


def cell_key(config: Config, cell: Cell) -> str:
    """Hash of the determinants."""
    return settings_key(determinants(config, cell))[:16]


def finished(folder: Path, config: Config, cell: Cell, callback: Callback) -> dict[str, Any] | None:
    """The content of a finished cell, or None where it has to be computed.

    A cell that was computed before a setting existed is as good as a new one where that setting has its
    default now, so an update that adds settings does not cost a benchmark its cells.
    """
    wanted = determinants(config, cell)
    named = folder / f"{_name(config, cell)}.json"
    for path in dict.fromkeys([named, *sorted(folder.glob(f"{cell.method}-{cell.seed}-*.json"))]):
        try:
            kept = read_json(path)
            if _same(kept["determinants"], wanted) and isinstance(kept["row"], dict):
                return {name: kept[name] for name in ("row", "ledger", "seconds")}
        except (ArtifactError, AttributeError, KeyError, TypeError):
            if path == named and path.exists():
                callback.note(f"{path}: damaged, so this cell is computed again")
    return None


def forget_finished(folder: Path) -> None:
    """Remove the states of cells that are finished: a kill after a cell's file leaves its state."""
    for state in folder.glob("*.state"):
        if state.with_suffix(".json").is_file():
            forget(state)


def compute(
    experiments: PreparedExperiments,
    cell: Cell,
    folder: Path,
    callback: Callback,
    progress: Callable[[Progress], None] | None = None,
) -> dict[str, Any]:
    """Search, choose, fine-tune, look at test, and write the cell's file; a killed try is continued.

    Args:
        experiments: prepared under the benchmark's settings; their budget is replaced by the cell's.
        progress: called as `Agent.search` calls it; the callback where it is not given.

    Returns the content of the file.
    """
    config, experiment = experiments.config, experiments.of(cell.checkpoint)
    started = time.perf_counter()
    settings = replace(experiment.config, budget=replace(config.budget, target=cell.budget))
    here = replace(experiment, config=settings, evaluator=experiment.evaluator.fork())
    state = folder / f"{_name(config, cell)}.state"
    state.mkdir(parents=True, exist_ok=True)
    ledger = EvaluationLog(state / "ledger.jsonl")
    chosen = None
    if cell.method != DENSE:
        found = _found(here, cell, ledger, state, progress or callback.search(str(cell)))
        found = replace(found, seconds=found.seconds + here.evaluator.reused)
        chosen = choose(here, found, state=state, callback=callback)
    row = finish(here, chosen, seed=cell.seed, state=state, callback=callback).row
    row |= {"samples": chosen.account.samples if chosen else 0}
    row |= {"budget": None if cell.method == DENSE else cell.budget}
    content = {
        "determinants": determinants(config, cell),
        "row": results_of(here, [row])["rows"][0],
        "ledger": ledger.rows,
        "seconds": round(time.perf_counter() - started, 2),
    }
    keep(folder, config, cell, content)
    forget(state)
    return content


def work(experiments: PreparedExperiments, cell: Cell, folder: Path) -> dict[str, Any]:
    """`compute` in a worker, which tells how far it is in a file next to the cell's state."""
    torch.set_num_threads(experiments.config.threads or 1)
    told, last = _told(folder, experiments.config, cell), 0.0

    def tell(state: Progress) -> None:
        nonlocal last
        if time.monotonic() - last >= _TELL_SECONDS:
            last = time.monotonic()
            write_json_atomic(told, [state.spent, state.limit])

    with own_exits_named():
        return compute(experiments, cell, folder, Callback(), tell)


def told(folder: Path, config: Config, cell: Cell) -> tuple[int, int] | None:
    """Evaluations done and to be done of a cell that a worker computes; None where it has not said."""
    try:
        spent, limit = read_json(_told(folder, config, cell))
        return int(spent), int(limit)
    except (ArtifactError, TypeError, ValueError):
        return None


def keep(folder: Path, config: Config, cell: Cell, content: Mapping[str, Any]) -> None:
    """Write the content of a finished cell."""
    write_json_atomic(folder / f"{_name(config, cell)}.json", dict(content))


def _told(folder: Path, config: Config, cell: Cell) -> Path:
    return folder / f"{_name(config, cell)}.state" / "progress.json"


def _name(config: Config, cell: Cell) -> str:
    return f"{cell.method}-{cell.seed}-{cell_key(config, cell)}"


def _same(kept: Mapping[str, object], wanted: Mapping[str, object]) -> bool:
    """Whether nothing that was recorded differs and everything that was not has its default."""
    defaults = {s.path: json.loads(json.dumps(s.default, default=list)) for s in settings_reference()}
    missing = {key: value for key, value in wanted.items() if key not in kept}
    return all(key in wanted and wanted[key] == value for key, value in kept.items()) and all(
        key in defaults and defaults[key] == value for key, value in missing.items()
    )


def _found(
    experiment: Experiment,
    cell: Cell,
    ledger: EvaluationLog,
    state: Path,
    progress: Callable[[Progress], None],
) -> MethodResult:
    if cell.method in RULES:
        return score_rule(experiment, cell.method, ledger, cell.seed)
    return run_agent(
        cell.method, [experiment], ledger, seed=cell.seed, state=state / "search", progress=progress
    )


def reason(error: BaseException) -> str:
    """An error in one line; the kind of those that are not ours is named."""
    text = one_line(error, None)
    return text if isinstance(error, RlpruneError) or not str(error) else f"{type(error).__name__}: {text}"
