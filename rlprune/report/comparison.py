"""The tables and the views of a benchmark's results.json, for Markdown and for the report alike."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypedDict

from ..utils.values import is_finite, is_whole
from . import plots
from .results import Results, as_mapping

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Table = tuple[list[str], list[list[str]]]


class Spread(TypedDict):
    """A figure over the seeds: mean, range, 95% interval of the mean; None where one seed has none."""

    mean: float | None
    min: float | None
    max: float | None
    low: float | None
    high: float | None
    values: list[float | None]


class Difference(Spread):
    """Paired differences of two methods over the seeds that both have, and on how many the first is better."""

    wins: int
    seeds: int


class Reached(TypedDict):
    """Evaluations to a score: median and 95% interval, None for "never"; how many of the seeds reached it."""

    median: float | None
    low: float | None
    high: float | None
    reached: int
    seeds: int
    values: list[int | None]


SCORE_UNITS = {
    "kl": "score (−KL to the dense model, nats)",
    "loss": "score (−validation loss, nats)",
    "accuracy": "score (validation accuracy)",
    "score_fn": "score (the workload's own)",
}
_EVALUATIONS = 10_000_000
"""More were never spent; a curve of as many points as a file says could fill the memory."""
IN_NATS = (None, "classification", "multilabel", "segmentation", "sequence", "language")
"""Tasks whose divergences and losses are in nats; results of older versions name none."""
_NO_UNITS = {
    "kl": "score (−divergence from the dense model)",
    "loss": "score (−validation loss)",
    "accuracy": "score (the validation metric)",
}


def score_unit(kind: object, task: object = None) -> str:
    """What a score of a kind is, for the axis of a plot; ``task`` is the workload's."""
    units = SCORE_UNITS if task in IN_NATS else SCORE_UNITS | _NO_UNITS
    return units.get(str(kind), "score")


EQUAL_SECONDS = (
    "At equal seconds: the best score of each search when the fastest one under the same seed was done"
)
REFERENCES = ("uniform", "best rule", "random")


def per_budget(results: Results) -> list[Results]:
    """The results of each budget by itself, each as if there had been no other; one for a run of one budget."""
    budgets = results.get("budgets") or []
    if len(budgets) < 2:
        return [results.copy()]
    return [
        {
            **results,
            "budget": budget,
            "budgets": [budget],
            "rows": [row for row in results["rows"] if row.get("budget") in (None, budget["asked"])],
            "summary": [entry for entry in results.get("summary", []) if entry["budget"] == budget["asked"]],
        }
        for budget in budgets
    ]


def share(results: Results) -> str:
    """The budget of results of one budget, as a share of the dense cost: "50%"."""
    budget = results["budget"]
    return f"{100 * budget['target'] / budget['dense']:.4g}%"


def headline(results: Results) -> Table:
    """Header and rows: what each method's chosen plan is worth, and what it took to find it.

    Cells hold the mean over the seeds and the 95% interval of the mean; "evaluations to random's score" the median
    over the seeds of how many a method needed for the score that random search ended with under the same seed.
    """
    samples = "sequences" if "protocol" in results["workload"] else "images"
    header = [
        "method", "seeds", "test loss", "test loss, fine-tuned", "test, fine-tuned", "score",
        "evaluations", "evaluations to random's score", "mean best score", "seconds", f"{samples} read",
    ]  # fmt: skip
    rows = []
    for entry in results["summary"]:
        mark = " (best rule)" if entry["best_rule"] else ""
        rows.append(
            [
                f"{entry['method']}{mark}",
                str(entry["seeds"]),
                *[
                    interval(entry[name])
                    for name in ("test_loss", "test_loss_finetuned", "test_finetuned", "score")
                ],
                _number(entry["evaluations"]["mean"], ".0f"),
                _reached(entry.get("evaluations_to_random")),
                _number(entry.get("area", {}).get("mean"), ".4f"),
                _number(entry["seconds"]["mean"], ".1f"),
                _number(entry["samples"]["mean"], ",.0f"),
            ]
        )
    return header, rows


def paired(results: Results) -> Table:
    """Header and rows: differences under the same seed, mean [95% interval] (seeds on which the method is better)."""
    header = ["method"]
    kinds = (
        ("against_loss", "test loss"),
        ("against_loss_finetuned", "test loss, fine-tuned"),
        ("against", "score"),
    )
    header += [f"{what} − {reference}" for _, what in kinds for reference in REFERENCES]
    rows = [
        [entry["method"], *[against(entry[kind].get(other)) for kind, _ in kinds for other in REFERENCES]]
        for entry in results["summary"]
    ]
    return header, rows


def equal_seconds(results: Results) -> Table:
    """Header and rows: the score each search had when the fastest one under the same seed was done; the best first.

    Evaluations of one search are taken to last equally long, its own computations included: so many as fit count.
    A search whose computations grow with what it knows was further by then than the table says. No rows where
    fewer than two searches, or no seconds, are known.
    """
    header = ["method", "seconds an evaluation", "evaluations by then", "score by then", "score at its end"]
    rows = [row for row in _searches(results) if is_finite(row.get("seconds")) and row["seconds"] > 0]
    found: dict[str, list[tuple[float, int, float, float]]] = {}
    for row in rows:
        fastest = min(other["seconds"] for other in rows if other["seed"] == row["seed"])
        each = row["seconds"] / row["evaluations"]
        count = max(1, min(row["evaluations"], math.floor(fastest / each + 1e-9)))
        before = [score for first, score in row["improvements"] if first <= count]
        if before:
            found.setdefault(row["method"], []).append((each, count, before[-1], row["improvements"][-1][1]))
    if len(found) < 2:
        return header, []
    means = {name: [sum(v) / len(v) for v in zip(*of, strict=True)] for name, of in found.items()}
    ranked = sorted(means.items(), key=lambda item: -item[1][2])
    return header, [
        [name, f"{each:.2f}", f"{count:.0f}", f"{then:.4f}", f"{end:.4f}"]
        for name, (each, count, then, end) in ranked
    ]


def notes(results: Results) -> list[str]:
    """What a reader of the tables has to know: methods left out, cells that failed."""
    protocol = results.get("protocol") or {}
    left_out: dict[str, list[str]] = {}
    for name, why in protocol.get("left_out", {}).items():
        left_out.setdefault(why, []).append(name)
    lines = [f"Left out ({why}): {', '.join(names)}." for why, names in left_out.items()]
    return lines + [f"Failed: {cell}: {why}." for cell, why in protocol.get("failed", {}).items()]


def interval(spread: Spread) -> str:
    """Mean and 95% interval; the mean alone where all values are the same."""
    if spread["mean"] is None:
        return "–"
    if spread["min"] == spread["max"]:
        return f"{spread['mean']:.4f}"
    return f"{spread['mean']:.4f} [{spread['low']:.4f}, {spread['high']:.4f}]"


def figures(results: Results) -> list[tuple[str, Figure, str]]:
    """(file name, picture, text) of a benchmark's results of one budget; empty for those of a run."""
    if not results.get("summary"):
        return []
    unit = score_unit(results.get("score"), as_mapping(results.get("workload")).get("task"))
    losses = {"test loss": "test_loss", "test loss, fine-tuned": "test_loss_finetuned"}
    panels = {label: rows for label, field in losses.items() if (rows := chart(results, field))}
    found = []
    if panels:
        text = "Test loss before and after the fine-tune: mean and 95% interval of every method"
        dense = {label: dense_mean(results, "test_loss") for label in panels}
        found.append(("benchmark", plots.comparison(panels, dense), text))
    if scores := chart(results, "score"):
        text = "Score: mean and 95% interval of every method"
        figure = plots.comparison({unit: scores}, {unit: dense_mean(results, "score")}, higher=True)
        found.append(("score", figure, text))
    searches = curves(results)
    if searches:
        best = {
            f"best rule: {entry['method']}": entry["score"]["mean"]
            for entry in results["summary"]
            if entry["best_rule"] and entry["score"]["mean"] is not None
        }
        # The agent and its yardstick first, then the searches that found the best plans.
        ranked = sorted(results["summary"], key=lambda entry: -(entry["score"]["mean"] or -math.inf))
        order = dict.fromkeys(["ppo", "random", *(str(entry["method"]) for entry in ranked)])
        figure = plots.learning({name: searches[name] for name in order if name in searches}, best, unit)
        found.append(
            ("learning", figure, "Best score so far against the evaluations spent, for every search")
        )
    return found


def curves(results: Results) -> dict[str, list[list[float]]]:
    """{search method: the best score so far after each evaluation, a list for each seed}; NaN before there is one."""
    found: dict[str, list[list[float]]] = {}
    for row in _searches(results):
        count = row["evaluations"]
        best = [math.nan] * count
        for first, score in row["improvements"]:
            best[first - 1 :] = [score] * (count - first + 1)
        found.setdefault(row["method"], []).append(best)
    return found


def _searches(results: Results) -> list[dict[str, Any]]:
    """The rows of methods that search, whose curves are known.

    Raises ValueError where a curve does not fit its evaluations.
    """
    rows = [
        row for row in results["rows"] if row["kind"] not in ("dense", "rule") and row.get("improvements")
    ]
    for row in rows:
        count = row["evaluations"]
        if not is_whole(count, _EVALUATIONS) or not all(
            is_whole(first, count) and first for first, _ in row["improvements"]
        ):
            raise ValueError(f"{row['method']}: its improvements do not fit its evaluations")
    return rows


def dense_mean(results: Results, field: str) -> float | None:
    """The mean of a field over the dense models, None where one of them has none."""
    values = [row.get(field) for row in results["rows"] if row.get("kind") == "dense"]
    known = [float(value) for value in values if is_finite(value)]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def chart(results: Results, field: str) -> Sequence[Mapping[str, Any]]:
    """What `report.plots.comparison` draws of a field: the methods for which it is known."""
    return [
        {"method": entry["method"], **{k: entry[field][k] for k in ("values", "mean", "low", "high")}}
        for entry in results["summary"]
        if entry[field]["mean"] is not None
    ]


def against(difference: Difference | None) -> str:
    """Mean of paired differences [95% interval] (seeds won/seeds); a dash where there is none."""
    if difference is None or difference["mean"] is None:
        return "–"
    inside = ""
    if difference["min"] != difference["max"]:
        inside = f" [{difference['low']:+.4f}, {difference['high']:+.4f}]"
    return f"{difference['mean']:+.4f}{inside} ({difference['wins']}/{difference['seeds']})"


def _reached(counts: Reached | None) -> str:
    """Median [interval] (seeds that reached it); "never" stands for a bound above all evaluations."""
    if counts is None or not counts["seeds"]:
        return "–"
    shown = {
        name: "never" if counts[name] is None else f"{counts[name]:g}" for name in ("median", "low", "high")
    }
    inside = f" [{shown['low']}, {shown['high']}]" if shown["low"] != shown["high"] else ""
    return f"{shown['median']}{inside} ({counts['reached']}/{counts['seeds']})"


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
