"""Does the score of a search predict the quality after the final fine-tune?

A search is worth nothing where its score does not rank plans as the final fine-tune will. Here random
plans of the budget are scored under several recoveries, each plan is fine-tuned as a winner would be,
and the rank correlation (Spearman) with its bootstrap interval decides between the recoveries.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import plots
from .agents.proposals import random_plans
from .benchmark.statistics import bootstrap
from .config import Config
from .envs.task import Task
from .errors import ConfigError
from .evaluation import Evaluator
from .files import lock_run, write_bytes_atomic, write_json_atomic, write_text_atomic
from .finish import fine_tune
from .problem import Problem, prepare
from .progress import Console
from .report import SCORE_UNITS, markdown_table
from .workloads.causal import is_causal

RECOVERIES: tuple[tuple[str, ...], ...] = (("none",), ("bn",), ("reconstruct",), ("reconstruct", "bn"))
LANGUAGE_RECOVERIES: tuple[tuple[str, ...], ...] = (
    ("none",),
    ("bias",),
    ("reconstruct",),
    ("bias", "reconstruct"),
)
Floats = NDArray[np.float64]


def run(config: Config, candidates: int, out: str | Path) -> str:
    """Score and fine-tune ``candidates`` random plans; write fidelity.json, fidelity.md and fidelity.png into ``out``.

    Every finished plan is kept in ``out``, so that a stopped run goes on where it was. The quality is the
    loss on the validation split: the test split is not for decisions.

    Returns the Markdown table: Spearman's rho between score and final quality, 95% interval, per recovery.

    Raises:
        ConfigError: fewer than 4 candidates, or a config without a final fine-tune.
    """
    if candidates < 4:
        raise ConfigError(f"--candidates: must be at least 4, got {candidates}")
    if config.workload is None:  # before anything is trained
        _length(config, is_causal(config.model.name))
    console = Console(True)
    with lock_run(out) as folder:
        problem = prepare(config, console=console)
        length = _length(config, problem.workload.language)
        points = _points(problem, candidates, folder, console)
        own = " + ".join(config.recovery.steps)
        summary = summarise(points, own)
        text = _text(summary, problem.workload.name, config, candidates, length)
        write_json_atomic(folder / "fidelity.json", {"version": 1, "summary": summary, "points": points})
        write_text_atomic(folder / "fidelity.md", text + "\n")
        row = next(row for row in summary if row["recovery"] == own)
        figure = plots.scatter(
            [point["scores"][own] for point in points],
            [point["loss"] for point in points],
            (f"{SCORE_UNITS[config.score.kind]} after {own}", "validation loss after the fine-tune (nats)"),
            f"Spearman {row['spearman']:.2f}, 95% interval {row['low']:.2f} to {row['high']:.2f}",
        )
        write_bytes_atomic(folder / "fidelity.png", plots.to_png(figure))
    return text


def _length(config: Config, language: bool) -> str:
    """How long the final fine-tune is, in words; ConfigError where the settings leave it out."""
    field = "steps" if language else "epochs"
    count = getattr(config.finish, field)
    if count < 1:
        raise ConfigError(
            f"finish.{field}: fidelity compares with the final fine-tune, so it must be at least 1"
        )
    return f"{count} {field}"


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Rank correlation; ties share their mean rank, and a constant side gives 0."""
    a, b = _ranks(x), _ranks(y)
    a, b = a - a.mean(), b - b.mean()
    norm = float(np.sqrt((a**2).sum() * (b**2).sum()))
    return float((a * b).sum() / norm) if norm > 0 else 0.0


def summarise(points: Sequence[Mapping[str, Any]], own: str) -> list[dict[str, Any]]:
    """Per recovery: Spearman of the score with the negated final loss, and its interval, best first."""
    final = np.array([-point["loss"] for point in points])
    rows = []
    for recovery in points[0]["scores"]:
        scores = np.array([point["scores"][recovery] for point in points])

        def drawn(index: NDArray[np.int64], scores: Floats = scores) -> float:
            return spearman(scores[index].tolist(), final[index].tolist())

        low, high = bootstrap(drawn, len(points))
        rho = spearman(scores.tolist(), final.tolist())
        rows.append(
            {"recovery": recovery, "spearman": rho, "low": low, "high": high, "used": recovery == own}
        )
    return sorted(rows, key=lambda row: -row["spearman"])


def _points(problem: Problem, candidates: int, folder: Path, console: Console) -> list[dict[str, Any]]:
    """One record a plan: widths, score per recovery, and loss and metric after the fine-tune."""
    path, config = folder / "candidates.json", problem.config
    task = Task(problem.evaluator, config.budget.target, config.budget.metric)
    rng = np.random.default_rng(config.seed)
    plans = random_plans(task, config.budget.target, candidates, rng)
    key = json.dumps(config.to_dict(), sort_keys=True)
    done = _finished(path, key)
    evaluators = _evaluators(problem)
    for plan in plans[len(done) :]:
        scores = {name: evaluator.evaluate(plan).score for name, evaluator in evaluators.items()}
        slim = problem.evaluator.build(plan)
        fine_tune(
            problem, slim, seed=config.seed, label=f"fine-tune {len(done) + 1}/{candidates}", console=console
        )
        quality = problem.workload.evaluate(slim, "validation")
        widths = [int(width) for width in plan]
        done.append({"widths": widths, "scores": scores, "loss": quality.loss, "metric": quality.metric})
        write_json_atomic(path, {"key": key, "points": done})
    return done[:candidates]


def _evaluators(problem: Problem) -> dict[str, Evaluator]:
    config = problem.config
    settings = {" + ".join(config.recovery.steps): config.recovery}
    for steps in LANGUAGE_RECOVERIES if problem.workload.language else RECOVERIES:
        plain = dataclasses.replace(config.recovery, steps=steps, finetune_steps=0)
        settings.setdefault(" + ".join(steps), plain)
    own = problem.evaluator
    return {
        name: Evaluator(
            own.workload, own.space, importance=own.importance, recovery=recovery, score=config.score
        )
        for name, recovery in settings.items()
    }


def _finished(path: Path, key: str) -> list[dict[str, Any]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return list(content["points"]) if content["key"] == key else []
    except (OSError, ValueError, KeyError, TypeError):
        return []  # nothing that could be used: start again


def _ranks(values: Sequence[float]) -> Floats:
    array = np.asarray(values, dtype=np.float64)
    order = np.argsort(array, kind="stable")
    ranks = np.empty(len(array))
    ranks[order] = np.arange(len(array))
    for value in np.unique(array):
        same = array == value
        ranks[same] = ranks[same].mean()
    return ranks


def _text(
    summary: Sequence[Mapping[str, Any]], name: str, config: Config, candidates: int, length: str
) -> str:
    rows = [
        [
            f"{row['recovery']}{' (in use)' if row['used'] else ''}",
            f"{row['spearman']:.2f}",
            f"{row['low']:.2f} to {row['high']:.2f}",
        ]
        for row in summary
    ]
    table = markdown_table(["recovery before scoring", "Spearman", "95% interval"], rows)
    return (
        f"Fidelity of the {config.score.kind} score on {name}: {candidates} random plans at "
        f"{config.budget.target} of the {config.budget.metric}, against the validation loss after "
        f"{length} of the final fine-tune.\n\n{table}"
    )
