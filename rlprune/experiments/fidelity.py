"""Does the score of a search predict the quality after the final fine-tune?

A search is worth nothing where its score does not rank plans as the final fine-tune will. Here random
plans of the budget are scored under several recoveries (tiers), each plan is fine-tuned as a winner would be,
and the rank correlation (Spearman) with its bootstrap interval and its cost decides between the tiers.

A default that is chosen by this table is the outcome of a search, so the test split is not read. The validation
split is halved: scores on one half meet the final losses on the other, and the reverse; the mean of the two
correlations counts. Images that are in both would share their noise and flatter every tier.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import nn

from ..config.config import Config
from ..config.training import RecoveryConfig
from ..envs.task import Task
from ..errors import BudgetError, ConfigError
from ..evaluation.evaluator import Evaluator
from ..execution import Executor, Shared, make_executor, with_threads
from ..report import plots
from ..report.comparison import IN_NATS, score_unit
from ..surrogates.proposals import random_plans
from ..utils.checkpoints import forget, settings_key
from ..utils.files import (
    append_line,
    lock_run,
    whole_lines,
    write_bytes_atomic,
    write_json_atomic,
    write_text_atomic,
)
from ..utils.machine import hardware, library_versions
from ..utils.progress import Callback, Console
from ..workloads.adapter import ModelAdapter, RecoveryLadder, TuneJob
from ..workloads.base import Workload
from ..workloads.judge import Judge
from .build import expected_adapter
from .fidelity_table import Point, markdown, summarise
from .prepare import Experiment, prepare_experiment

_FEWEST = 4  # plans that a rank correlation says anything about
_WORST = 1e9  # a diverged model is the worst there is, not a hole in the table


@dataclass(frozen=True)
class Tier:
    """A recovery before scoring, and the name of its row."""

    name: str
    recovery: RecoveryConfig


def run(
    config: Config,
    candidates: int,
    out: str | Path,
    steps: int | None = None,
    callback: Callback | None = None,
) -> str:
    """Score and fine-tune ``candidates`` random plans; write fidelity.json, fidelity.md and fidelity.png into ``out``.

    Every score and every fine-tune is kept in ``out`` under a hash of what determines it: a stopped run goes on
    where it was, a fine-tune in its middle too, and more candidates or tiers reuse what is there.

    Args:
        steps: gradient steps of the last tier; None for those of the adapter's ladder.
        callback: is told of the progress; bars without one.

    Returns the Markdown text: Spearman's rho between score and final quality with its 95% interval, the
    difference to the best tier, and the cost, per tier; which tier is recommended; and rho for fewer samples.

    Raises:
        BudgetError: the space has fewer than 4 different plans at this budget.
        ConfigError: fewer than 4 candidates, too few validation samples, or a config without a final fine-tune.
    """
    if candidates < _FEWEST:
        raise ConfigError(f"--candidates: must be at least {_FEWEST}, got {candidates}")
    expected = expected_adapter(config)
    if expected is not None:  # before anything is trained
        _length(config, expected)
    callback, config = callback or Console(True), with_threads(config)
    with lock_run(out, worth="cells.jsonl") as folder:
        experiment = prepare_experiment(config, callback=callback)
        length = _length(config, experiment.workload.adapter)
        rows = tiers(config, experiment.workload.adapter.ladder, steps)
        executor = make_executor(config, logs=folder)
        try:
            study = _Study(experiment, folder, callback, executor)
            points = study.points(rows, candidates)
        finally:
            executor.close()
        content = {"version": 2, "hardware": hardware(), "length": length, "candidates": len(points)}
        content |= study.facts() | summarise(points, own_tier(config).name, study.samples)
        write_json_atomic(folder / "fidelity.json", content | {"points": points})
        text = markdown(content)
        write_text_atomic(folder / "fidelity.md", text + "\n")
        write_bytes_atomic(folder / "fidelity.png", _figure(config, points, content))
    return text


def own_tier(config: Config) -> Tier:
    """The recovery that the settings use."""
    return Tier(_name(config.recovery), config.recovery)


def tiers(config: Config, ladder: RecoveryLadder, steps: int | None = None) -> list[Tier]:
    """The recoveries that are compared: the one in use, the closed forms, and the best of them with gradient steps."""
    steps = ladder.steps if steps is None else steps
    wanted = [dataclasses.replace(config.recovery, steps=s, finetune_steps=0) for s in ladder.closed]
    if steps:
        wanted.append(dataclasses.replace(config.recovery, steps=ladder.trained, finetune_steps=steps))
    found = {own.name: own for own in (own_tier(config), *(Tier(_name(r), r) for r in wanted))}
    return list(found.values())


class _Study:
    """The measurements of one experiment, each of them made once and kept in a folder."""

    def __init__(self, experiment: Experiment, folder: Path, callback: Callback, executor: Executor) -> None:
        self.experiment, self.config = experiment, experiment.config
        self.folder, self.callback, self.executor = folder, callback, executor
        check_halves(experiment.workload, self.config.score.kind)
        self.cells = _Cells(folder / "cells.jsonl")
        self.half = experiment.workload.size("validation") // 2
        if self.half < 2:
            raise ConfigError("data.validation: must be at least 4 to be halved")
        self.samples = min(self.config.score.samples or self.half, self.half)
        # Sizes at which the score is looked at, the one of the settings among them.
        self.sizes = sorted({self.samples, *(max(1, self.half >> k) for k in range(4))})

    def points(self, rows: Sequence[Tier], candidates: int) -> list[dict[str, Any]]:
        """One record a plan: widths, per tier scores and seconds, and loss and metric after the fine-tune.

        Scores, losses and metrics are pairs, one for each half of the validation split.
        """
        config = self.config
        task = Task(self.experiment.evaluator, config.budget.target, config.budget.metric)
        drawn = random_plans(task, config.budget.target, candidates, np.random.default_rng(config.seed))
        # A plan that was drawn twice says nothing twice.
        plans = [list(plan) for plan in dict.fromkeys(tuple(int(w) for w in plan) for plan in drawn)]
        if len(plans) < _FEWEST:
            raise BudgetError(
                f"budget.target: {config.budget.target} leaves {len(plans)} different plan"
                f"{'s' if len(plans) > 1 else ''} to compare, and fidelity needs {_FEWEST}; "
                "choose another budget or a smaller prune.round_to"
            )
        scores = {tier.name: self._scores(tier, plans) for tier in rows}
        finals = self._finals(plans)
        self.callback.close()
        return [
            {"widths": plan, "scores": {n: s[i] for n, s in scores.items()}, **finals[i]}
            for i, plan in enumerate(plans)
        ]

    def facts(self) -> dict[str, Any]:
        """What the table says about the workload."""
        workload, config = self.experiment.workload, self.config
        return {
            "name": workload.name,
            "score": config.score.kind,
            "task": workload.task_type.name,
            "budget": config.budget.target,
            "metric": config.budget.metric,
            "unit": workload.adapter.score_unit,
            "tokens": workload.scored("validation"),
        }

    def _scores(self, tier: Tier, plans: Sequence[list[int]]) -> list[dict[str, Any]]:
        """Scores of all plans under one tier; only one tier's statistics are in memory at a time."""
        config = self.config
        keys = [self._key("score", tier.recovery, config.score, self.sizes, plan) for plan in plans]
        return self._measured(
            keys,
            plans,
            f"scores, {tier.name}",
            lambda: TierScorer(self._evaluator(tier), self.sizes, self.half),
        )

    def _finals(self, plans: Sequence[list[int]]) -> list[dict[str, Any]]:
        """Loss and metric on both halves after the final fine-tune of each plan, as a winner would get it."""
        config = self.config
        finish = dataclasses.replace(config.finish, candidates=1, rules=True)
        keys = [self._key("final", config.recovery, finish, config.seed, plan) for plan in plans]
        evaluator = self.experiment.evaluator
        watched = self.callback if self.executor.name == "serial" else None
        cells = self._measured(
            keys,
            plans,
            "fine-tunes",
            lambda: Finisher(evaluator.bare(), config, self.folder.absolute(), watched),
        )
        return [
            {name: cell[name] for name in ("loss", "metric")} | {"final_seconds": cell["seconds"]}
            for cell in cells
        ]

    def _measured(
        self, keys: Sequence[str], plans: Sequence[list[int]], label: str, make: Callable[[], Measure]
    ) -> list[dict[str, Any]]:
        """What is measured of each plan: taken from the folder, or now, on all workers, and kept as it comes."""
        shared, waiting = None, dict[Future[dict[str, Any]], str]()
        missing = [i for i, key in enumerate(keys) if self.cells.get(key) is None]
        for key in self.cells.found.keys() & set(keys):  # a kill after the cell was kept leaves its state
            forget(training_state(self.folder, key))
        done = len(keys) - len(missing)
        show = self.callback.counting(label, len(keys))
        try:
            while missing or waiting:
                while missing and len(waiting) < self.executor.workers:
                    shared = shared or Shared(make())
                    number = missing.pop(0)
                    told = f"fine-tune {number + 1}/{len(plans)}"
                    work = self.executor.submit(measured, shared, plans[number], keys[number], told)
                    waiting[work] = keys[number]
                for work in wait(waiting, return_when=FIRST_COMPLETED).done:
                    key = waiting.pop(work)
                    self.cells.put(key, work.result())
                    forget(training_state(self.folder, key))
                    done += 1
                    show(done)
        finally:
            if shared is not None:
                self.executor.drop(shared)
        return [self.cells.found[key] for key in keys]

    def _evaluator(self, tier: Tier) -> Evaluator:
        own, score = self.experiment.evaluator, self.config.score
        return Evaluator(
            own.workload, own.space, importance=own.importance, recovery=tier.recovery, score=score
        )

    def _key(self, kind: str, *parts: object) -> str:
        """Hash of everything that determines a measurement."""
        config = self.config
        whole = [kind, config.workload, config.model, config.data, config.prune, library_versions(), *parts]
        return settings_key(whole, dataclasses.asdict)


class Measure(Protocol):
    """What is measured of a plan; sent to workers as it is."""

    def measure(self, plan: list[int], key: str, label: str) -> dict[str, Any]:
        """The measurement, kept under ``key`` afterwards; ``label`` is shown meanwhile."""


def measured(measure: Measure, plan: list[int], key: str, label: str) -> dict[str, Any]:
    """The work of a worker."""
    return measure.measure(plan, key, label)


def training_state(folder: Path, key: str) -> Path:
    """Where a fine-tune that is not finished keeps itself."""
    return folder / f"final-{key[:16]}.state"


class TierScorer:
    """Scores plans under one recovery, on both halves of the validation split and on parts of them."""

    def __init__(self, evaluator: Evaluator, sizes: Sequence[int], half: int) -> None:
        self._evaluator, self._sizes, self._half = evaluator, sizes, half
        self._judge: Judge | None = None

    def measure(self, plan: list[int], key: str, label: str) -> dict[str, Any]:
        judge = self._judge or self._warmed_up()
        # Other programs stretch the time on the wall, but not a CPU's own count of it.
        on_cpu = self._evaluator.workload.device.type == "cpu"
        clock = time.process_time if on_cpu else time.perf_counter
        started = clock()
        slim = self._evaluator.build(plan, scoring=True)
        built = clock()
        values: dict[str, list[float]] = {str(n): [] for n in self._sizes}
        for first in (0, self._half):
            parts = []
            for start, stop in zip([0, *self._sizes], self._sizes, strict=False):
                parts.append(judge(slim, first + start, first + stop))
                values[str(stop)].append(_finite(float(judge.merge(parts).scores.mean()), -_WORST))
        judged = clock() - built
        return {
            "values": values,
            "seconds": built - started,
            "per_sample": judged / (2 * self._half),
            "reads": self._reads(),
        }

    def _warmed_up(self) -> Judge:
        evaluator, score = self._evaluator, self._evaluator.score_settings
        self._judge = evaluator.workload.judge(score.kind, None, top_k=score.top_k)
        # The dense model's answers and the first call's allocations are nobody's cost.
        self._judge(evaluator.build(evaluator.space.widths, scoring=True))
        return self._judge

    def _reads(self) -> int:
        """Samples that the recovery of one candidate runs through it, apart from those of the score."""
        workload, recovery = self._evaluator.workload, self._evaluator.recovery_settings
        size = workload.size("calibration")
        calibration = min(recovery.samples or size, size) if "bn" in recovery.steps else 0
        return calibration + workload.adapter.ladder.batch * recovery.finetune_steps


class Finisher:
    """Fine-tunes plans as a winner would be; a killed one goes on in its middle."""

    def __init__(
        self, evaluator: Evaluator, config: Config, folder: Path, callback: Callback | None = None
    ) -> None:
        self._evaluator, self._config, self._folder = evaluator, config, folder
        self._callback = callback

    def measure(self, plan: list[int], key: str, label: str) -> dict[str, Any]:
        started = time.perf_counter()
        slim = self._evaluator.build(plan)
        self._folder.mkdir(parents=True, exist_ok=True)  # on another machine it need not be there
        progress = (self._callback or Callback()).training
        state = training_state(self._folder, key)
        job = TuneJob(self._config.seed, state=state, progress=progress, phase=label)
        self._evaluator.workload.fine_tune(slim, self._config.finish, job)
        return self._quality(slim) | {"seconds": time.perf_counter() - started}

    def _quality(self, slim: nn.Module) -> dict[str, Any]:
        workload = self._evaluator.workload
        judge, half = workload.judge("loss", None), workload.size("validation") // 2
        halves = [judge(slim, first, first + half) for first in (0, half)]
        return {
            "loss": [_finite(part.loss, _WORST) for part in halves],
            "metric": [_finite(part.metric, 0.0) for part in halves],
        }


def check_halves(workload: Workload, kind: str) -> None:
    """ConfigError where the halves of the validation split have no score or metric of their own."""
    who = workload.whole_score(kind) or ("metric_fn" if workload.metric_fn is not None else None)
    if who is not None:
        raise ConfigError(
            f"fidelity: compares scores and losses on halves of the validation split, and {who} of the workload "
            "judges it as a whole"
        )


class _Cells:
    """Finished measurements by key, a JSON line each, on disk as soon as they are there."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[str, dict[str, Any]] = {}
        for line in whole_lines(path):
            try:
                content = json.loads(line)
                self.found[content["key"]] = content["cell"]
            except (ValueError, KeyError, TypeError):
                continue  # nothing that could be used

    def get(self, key: str) -> dict[str, Any] | None:
        return self.found.get(key)

    def put(self, key: str, cell: dict[str, object]) -> None:
        append_line(self.path, json.dumps({"key": key, "cell": cell}))
        self.found[key] = cell


def _name(recovery: RecoveryConfig) -> str:
    steps = [step for step in recovery.steps if step != "finetune"]
    if recovery.finetune_steps:
        steps.append(f"{recovery.finetune_steps} steps")
    return " + ".join(steps)


def _length(config: Config, adapter: ModelAdapter) -> str:
    """How long the final fine-tune is, in words; ConfigError where the settings leave it out."""
    count, unit = adapter.fine_tune_length(config.finish)
    if count < 1:
        raise ConfigError(
            f"finish.{unit}: fidelity compares with the final fine-tune, so it must be at least 1"
        )
    return f"{count} {unit}"


def _finite(value: float, otherwise: float) -> float:
    return value if math.isfinite(value) else otherwise


def _figure(config: Config, points: Sequence[Point], content: Mapping[str, Any]) -> bytes:
    """Scores of the tier in use against the final loss, both as the mean of the halves."""
    row = next(row for row in content["rows"] if row["used"])
    own, samples = content["used"], str(content["samples"])
    figure = plots.scatter(
        [float(np.mean(point["scores"][own]["values"][samples])) for point in points],
        [float(np.mean(point["loss"])) for point in points],
        (
            f"{score_unit(config.score.kind, content['task'])} after {own}",
            f"validation loss after the fine-tune{' (nats)' if content['task'] in IN_NATS else ''}",
        ),
        f"Spearman {row['spearman']:.2f}, 95% interval {row['low']:.2f} to {row['high']:.2f}",
    )
    return plots.to_png(figure)
