"""Every method through one fair door: same workload, evaluator, starts, evaluations and final fine-tune.

A benchmark is a grid of cells (`cells.Cell`): methods, seeds and budgets. Cells are independent of one another, so
they may be computed in any order and in several processes, and a finished one is never computed again. The
seed decides a method's search and its final fine-tune, and where there are several dense models which of them is
pruned, so methods are compared in pairs of one seed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..agents import AGENTS, make_agent
from ..config.config import Config
from ..config.search import SB3Config, SearchConfig
from ..errors import ConfigError, RunError, near_miss
from ..execution import Executor, Shared, make_executor
from ..execution.base import NoWorkers
from ..experiments.prepare import dense_model
from ..pruning.budget import parse_budget
from ..pruning.space import PruningSpace
from ..report.results import Results
from ..rules import RULES
from ..rules.context import applies
from ..utils.files import lock_run, write_text_atomic
from ..utils.progress import Callback
from ..workloads.adapter import adapter_named
from ..workloads.base import Workload
from .cells import (
    DENSE,
    Cell,
    PreparedExperiments,
    cell_key,
    compute,
    finished,
    forget_finished,
    keep,
    reason,
    told,
    with_checkpoint,
    work,
)
from .outcome import Outcome, page, write
from .schedule import Schedule
from .statistics import bootstrap, summarise

__all__ = ["Cell", "bootstrap", "cell_key", "page", "run", "summarise"]


def run(
    config: Config,
    methods: Sequence[str] | None,
    seeds: int,
    evaluations: int,
    out: str | Path,
    *,
    budgets: Sequence[str | float] = (),
    checkpoints: int = 1,
    callback: Callback | None = None,
) -> Results:
    """Compare methods and write results.json, benchmark.md, plots, ledger.jsonl and report.html.

    Args:
        methods: names of rules and agents; for None all that apply here and whose libraries are installed.
        seeds: number of seeds, from `config.seed` upwards.
        evaluations: distinct plans that each agent may have scored, its starts included.
        budgets: as in `budget.target`, which is taken where there are none.
        checkpoints: dense models that the seeds take in turn, each trained with other seeds, on other splits.

    The workers of ``config.execution`` compute cells at the same time, each with `config.threads` threads (1 by
    default). In engine `serial` this process computes them, and torch chooses its threads.

    Returns the content of results.json: its rows are one per method, seed and budget, its `summary` one per
    method and budget.

    Raises:
        ConfigError: an unknown method or one that cannot run here, or no seed or evaluation.
        BudgetError: a budget that is malformed or not feasible.
        RunError: cells have failed; the others are finished, and what they gave is written.
    """
    _checked(methods, [*RULES, *AGENTS])  # a wrong name is said before anything is trained
    for option, number in (("seeds", seeds), ("evaluations", evaluations)):
        if number < 1:
            raise ConfigError(f"--{option} {number}: must be at least 1")
    asked = [config.override([f"budget.target={budget}"]).budget.target for budget in budgets]
    asked = asked or [config.budget.target]
    metric = config.budget.metric
    # Those that are the same without a model's costs, before one is prepared.
    _check_budgets(asked, lambda budget: parse_budget(budget, metric))
    _check_checkpoints(config, checkpoints, seeds)
    config = _settled(config, evaluations, asked[0])
    unable = unable_agents(methods, config.search)
    _refuse(methods, unable)
    callback = callback or Callback()
    with lock_run(out, worth="cells") as folder:
        experiments = PreparedExperiments(config, callback) if config.execution.engine == "serial" else None
        workload, space = _dense(config, experiments, checkpoints, callback)
        _check_budgets(asked, lambda budget: space.target(budget, metric))
        names, left_out = applicable(methods, space, unable)
        wanted = _cells(names, range(config.seed, config.seed + seeds), asked, checkpoints)
        write_text_atomic(folder / "config.yaml", config.to_yaml())
        work = _Work(config, folder, callback, wanted, experiments)
        work.run()
        protocol: dict[str, object] = {"seeds": seeds, "checkpoints": checkpoints}
        protocol |= {"evaluations": evaluations, "jobs": work.jobs, "methods": names, "left_out": left_out}
        protocol |= {"failed": {str(cell): why for cell, why in work.failed.items()}}
        content = {cell: work.content[cell] for cell in wanted if cell in work.content}
        outcome = Outcome(config, workload, space, asked, protocol, content)
        results = write(folder, outcome)
    _raise_failed(work.failed, len(wanted))
    return results


def _dense(
    config: Config, experiments: PreparedExperiments | None, checkpoints: int, callback: Callback
) -> tuple[Workload, PruningSpace]:
    """The first dense model's workload and space; workers need all dense models trained before they start."""
    if experiments is not None:
        first = experiments.of(0)
        return first.workload, first.space
    workload, space = dense_model(config, callback=callback)
    for number in range(1, checkpoints):
        dense_model(with_checkpoint(config, number), callback=callback)
    return workload, space


def _cells(
    methods: Sequence[str], seeds: Sequence[int], budgets: Sequence[str | float], checkpoints: int
) -> list[Cell]:
    """The whole grid: the dense models first, then the methods budget by budget."""
    dense = [Cell(DENSE, seed, budgets[0], i) for i, seed in enumerate(seeds[:checkpoints])]
    return dense + [
        Cell(name, seed, budget, i % checkpoints)
        for budget in budgets
        for name in methods
        for i, seed in enumerate(seeds)
    ]


def _raise_failed(failed: Mapping[Cell, str], count: int) -> None:
    if failed:
        first = "; ".join(f"{cell}: {why}" for cell, why in list(failed.items())[:3])
        raise RunError(f"{len(failed)} of {count} cells failed; the same command repeats only them: {first}")


@dataclass
class _Work:
    """The cells of one benchmark on their way from wanted to finished."""

    config: Config
    folder: Path
    callback: Callback
    wanted: Sequence[Cell]
    experiments: PreparedExperiments | None
    jobs: int = 1
    content: dict[Cell, dict[str, Any]] = field(default_factory=dict)
    failed: dict[Cell, str] = field(default_factory=dict)

    def run(self) -> None:
        """Take what is finished, compute the rest; failures are kept in ``failed``."""
        self.cells.mkdir(exist_ok=True)
        forget_finished(self.cells)
        self.content = {cell: found for cell in self.wanted if (found := self._finished(cell))}
        pending = [cell for cell in self.wanted if cell not in self.content]
        self.schedule = Schedule()
        for cell, found in self.content.items():
            self.schedule.took(cell, found["seconds"])
        if len(pending) < len(self.wanted):
            reused = len(self.wanted) - len(pending)
            self.callback.note(f"{reused} of {len(self.wanted)} cells are there already")
        if not pending:
            return
        try:
            executor = make_executor(self.config, logs=self.folder)
            try:
                self._compute(executor, pending)
            finally:
                executor.close()
        except KeyboardInterrupt:
            self.callback.close()
            self.callback.note(f"{self.folder} holds what has been done; the same command goes on from there")
            raise

    @property
    def cells(self) -> Path:
        return self.folder / "cells"

    def _finished(self, cell: Cell) -> dict[str, Any] | None:
        return finished(self.cells, self.config, cell, self.callback)

    def _compute(self, executor: Executor, pending: Sequence[Cell]) -> None:
        """As many cells at a time as there are workers; one that fails is not tried again, and the others go on."""
        self.jobs = self.schedule.jobs = min(executor.workers, len(pending))
        left, running = list(pending), dict[Future[dict[str, Any]], Cell]()
        shared = Shared(self.experiments or PreparedExperiments(self.config))
        if self.experiments is None:
            threads = self.config.threads
            self.callback.note(
                f"{len(pending)} cells by {self.jobs} workers ({executor.name}) of {threads} threads"
            )
        while left or running:
            while left and len(running) < self.jobs:
                cell = self.schedule.take(left)
                left.remove(cell)
                running[self._begun(executor, shared, cell)] = cell
            for future in wait(running, timeout=1.0, return_when=FIRST_COMPLETED).done:
                self._ended(running.pop(future), future)
            if running:
                self._progress(list(running.values()))
        self.callback.close()

    def _begun(
        self, executor: Executor, shared: Shared[PreparedExperiments], cell: Cell
    ) -> Future[dict[str, Any]]:
        if self.experiments is not None:
            return executor.submit(compute, shared, cell, self.cells, self.callback)
        return executor.submit(work, shared, cell, self.cells.absolute())

    def _ended(self, cell: Cell, future: Future[dict[str, Any]]) -> None:
        """Take the cell's content, and say in a line how far everything is."""
        error, found = future.exception(), None
        if isinstance(error, NoWorkers):
            raise error
        if error is not None:
            self.failed[cell] = reason(error)
        else:
            found = self._finished(cell)
            if found is None:  # a worker on a machine that does not share our folder
                keep(self.cells, self.config, cell, future.result())
                found = future.result()
            self.content[cell] = found
            self.schedule.took(cell, found["seconds"])
        done = len(self.content) + len(self.failed)
        left = [c for c in self.wanted if c not in self.content and c not in self.failed]
        what = _brief(found["row"]) if found else f"FAILED: {self.failed[cell]}"
        best = _best(self.content, cell.budget)
        self.callback.close()
        self.callback.note(f"{done}/{len(self.wanted)} {cell}: {what}{best}{self.schedule.time_left(left)}")

    def _progress(self, running: Sequence[Cell]) -> None:
        done = len(self.content) + len(self.failed)
        states = {cell: told(self.cells, self.config, cell) for cell in running}
        facts = [
            f"{cell.method} {state[0]}/{state[1]}" for cell, state in states.items() if state is not None
        ]
        self.callback.status("cells", done, len(self.wanted), ", ".join(facts))


def _settled(config: Config, evaluations: int, budget: str | float) -> Config:
    """The settings of all cells; the first budget stands for the others, a worker has one thread by default."""
    threads = config.threads if config.execution.engine == "serial" else config.threads or 1
    first = replace(config.budget, target=budget)
    search = replace(config.search, evaluations=evaluations)
    return replace(config, search=search, budget=first, threads=threads)


def _check_budgets(budgets: Sequence[str | float], allows: Callable[[str | float], object]) -> None:
    """Refuse what ``allows`` refuses, or two budgets that allow the same."""
    seen: dict[object, str | float] = {}
    for budget in budgets:
        target = allows(budget)
        if target in seen:
            raise ConfigError(f"--budgets: {seen[target]} and {budget} are the same budget")
        seen[target] = budget


def _check_checkpoints(config: Config, checkpoints: int, seeds: int) -> None:
    """Refuse more dense models than seeds, and more than one where none is trained."""
    if not 1 <= checkpoints <= seeds:
        raise ConfigError(f"--checkpoints {checkpoints}: must be from 1 to the number of seeds, {seeds}")
    if checkpoints > 1 and (config.model.train.epochs == 0 or config.workload is not None):
        why = "model.train.epochs is 0" if config.workload is None else "the workload is your own"
        raise ConfigError(
            f"--checkpoints {checkpoints}: only 1, since no dense model is trained here ({why})"
        )


def _checked(methods: Sequence[str] | None, known: Sequence[str]) -> list[str]:
    for name in methods or ():
        if name not in known:
            hint = near_miss(name, known)
            raise ConfigError(f"--methods: unknown method {name!r}{hint}; allowed: {', '.join(known)}")
    return list(dict.fromkeys(methods or known))


def applicable(
    methods: Sequence[str] | None, space: PruningSpace, unable: Mapping[str, str]
) -> tuple[list[str], dict[str, str]]:
    """The methods that can run here, and of all others why not; ConfigError where one was asked for by name."""
    AGENTS.complete()
    reasons = {
        name: f"for {adapter_named(rule.wing).models} only"
        for name, rule in RULES.items()
        if not applies(rule, space)
    }
    reasons |= {
        name: f"for {adapter_named(agent.wing).models} only"
        for name, agent in AGENTS.items()
        if agent.wing not in (None, space.wing)
    }
    reasons |= unable
    _refuse(methods, reasons)
    usual = [n for n, r in RULES.items() if not r.on_request] + [
        n for n, a in AGENTS.items() if not a.on_request
    ]
    names = _checked(methods, [*RULES, *AGENTS]) if methods else usual
    return [name for name in names if name not in reasons], {} if methods else reasons


def _refuse(methods: Sequence[str] | None, reasons: Mapping[str, str]) -> None:
    for name in methods or ():
        if name in reasons:
            raise ConfigError(f"--methods: {name!r} cannot run here: {reasons[name]}")


def unable_agents(methods: Sequence[str] | None, settings: SearchConfig) -> dict[str, str]:
    """Agents, of those asked for, that cannot be made, with the reason: a library is missing, say."""
    reasons = {}
    for name in AGENTS:
        if methods is None or name in methods:
            try:
                make_agent(name, settings)
            except (ConfigError, ImportError) as error:
                reasons[name] = reason(error)
    if methods is None and settings.sb3 == SB3Config() and "sac" in AGENTS:
        reasons["sb3"] = "the same as sac where search.sb3 does not say otherwise"
    return reasons


def _best(content: Mapping[Cell, Mapping[str, Any]], budget: str | float) -> str:
    """The best score so far under a budget, for the progress line."""
    rows = [c["row"] for cell, c in content.items() if cell.method != DENSE and cell.budget == budget]
    rows = [row for row in rows if row["score"] is not None]
    if not rows:
        return ""
    best = max(rows, key=lambda row: row["score"])
    return f"; best so far {best['score']:.4f} ({best['method']})"


def _brief(row: Mapping[str, Any]) -> str:
    loss = row.get("test_loss")
    return f"score {row['score']:.4f}" + (f", test loss {loss:.4f}" if loss is not None else "")
