"""Means, intervals and paired comparisons of a benchmark's rows.

All intervals are bootstrap intervals over the seeds; with a handful of seeds they are too narrow.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from ..utils.arrays import Floats, Ints

Row = dict[str, Any]
Curves = Mapping[tuple[str, int], Sequence[float]]

RESAMPLES = 2000
FIELDS = (
    "score", "validation", "test", "test_loss", "test_finetuned", "test_loss_finetuned",
    "evaluations", "samples", "seconds", "finish_seconds",
)  # fmt: skip
REFERENCES = ("uniform", "best rule", "random")
# What pairs are compared in: the score (higher is better), and the test loss before and after the fine-tune.
PAIRED = {"against": "score", "against_loss": "test_loss", "against_loss_finetuned": "test_loss_finetuned"}


def bootstrap(
    statistic: Callable[[Ints], float], count: int, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """95% interval of a statistic of ``count`` observations; it is given their drawn indices.

    The bias-corrected and accelerated bootstrap (BCa; Efron 1987) of scipy, or the percentile bootstrap (Efron 1979)
    where BCa has no value: the draws all lie on one side of the statistic, or the statistic is the same without any
    one observation. With a handful of observations both are too narrow.
    """
    if count == 1:
        return (only := statistic(np.zeros(1, dtype=np.int64)), only)
    found = math.nan, math.nan
    for method in ("BCa", "percentile"):
        with warnings.catch_warnings(), np.errstate(divide="ignore", invalid="ignore"):
            warnings.simplefilter("ignore", stats.DegenerateDataWarning)
            interval = stats.bootstrap(
                (np.arange(count),),
                lambda drawn: statistic(drawn.astype(np.int64)),
                vectorized=False,
                n_resamples=resamples,
                method=method,
                rng=np.random.default_rng(seed),
            ).confidence_interval
        found = float(interval.low), float(interval.high)
        if math.isfinite(found[0]) and math.isfinite(found[1]):
            break
    return found


def summarise(rows: Sequence[Row], curves: Curves | None = None, limit: int | None = None) -> list[Row]:
    """Per method mean, range and 95% interval of every field, and paired differences; the best first.

    A paired difference is that of two methods under one seed, to uniform, to the best rule (by mean score)
    and to random search; "wins" counts the seeds on which the method is strictly better. The best have the lowest
    mean test loss; where that is not known, the highest mean score.

    Args:
        rows: of one budget, with "method", "kind", "seed" and the fields.
        curves: scores in the order charged for each (method, seed), NaN where a plan is out of the budget.
        limit: evaluations of a search, the length over which the area under a curve is taken.
    """
    by_method: dict[str, dict[int, Row]] = {}
    for row in rows:
        if row["kind"] != "dense":
            by_method.setdefault(row["method"], {})[row["seed"]] = row
    rules = [name for name in by_method if next(iter(by_method[name].values()))["kind"] == "rule"]
    best = max(rules, key=lambda name: _mean(by_method[name], "score"), default=None)
    references = dict(zip(REFERENCES, ("uniform", best, "random"), strict=True))
    finals = {
        seed: running_best(c)[-1] for (name, seed), c in (curves or {}).items() if name == "random" and c
    }
    summary = []
    for name, found in by_method.items():
        entry: Row = {"method": name, "kind": next(iter(found.values()))["kind"], "seeds": len(found)}
        entry["best_rule"] = name == best
        entry |= {field: spread([row.get(field) for row in found.values()]) for field in FIELDS}
        for label, field in PAIRED.items():
            entry[label] = {
                reference: difference(found, by_method[other], field, higher=field == "score")
                for reference, other in references.items()
                if other in by_method and other != name
            }
        ours = {seed: curve for (method, seed), curve in (curves or {}).items() if method == name and curve}
        if limit is not None and ours:
            entry["area"] = spread([area(curve, limit) for curve in ours.values()])
        if finals and ours:
            pairs = [(curve, finals[seed]) for seed, curve in ours.items() if seed in finals]
            entry["evaluations_to_random"] = reached([evaluations_to(*pair) for pair in pairs])
        summary.append(entry)
    known = all(entry["test_loss"]["mean"] is not None for entry in summary)
    return sorted(summary, key=lambda e: e["test_loss"]["mean"] if known else -(e["score"]["mean"] or 0.0))


def running_best(scores: Sequence[float]) -> list[float]:
    """The best score so far after each evaluation; -inf before there is one."""
    cleaned = np.where(np.isnan(np.asarray(scores, dtype=float)), -np.inf, scores)
    return [float(value) for value in np.maximum.accumulate(cleaned)]


def improvements(scores: Sequence[float]) -> list[list[float]]:
    """The running best as [evaluation, score] wherever it rises, counted from 1: all of the curve, in little space."""
    best = running_best(scores)
    before = [-math.inf, *best]
    return [[n + 1, score] for n, score in enumerate(best) if score > before[n]]


def evaluations_to(scores: Sequence[float], target: float) -> int | None:
    """How many evaluations it takes to reach a score; None where that never happens."""
    hits = np.flatnonzero(np.array(running_best(scores)) >= target)
    return int(hits[0]) + 1 if len(hits) else None


def area(scores: Sequence[float], limit: int) -> float:
    """Mean of the best score so far over ``limit`` evaluations: the area under its curve, on the score's scale.

    Before there is a plan within the budget the first one counts, after the last evaluation the last. NaN where
    there is none at all.
    """
    best = running_best(scores)[:limit]
    known = [value for value in best if math.isfinite(value)]
    if not known:
        return math.nan
    filled = [known[0]] * (len(best) - len(known)) + known
    return float(np.mean(filled + [filled[-1]] * (limit - len(filled))))


def reached(counts: Sequence[int | None]) -> Row:
    """Median and its 95% interval of numbers of evaluations; None is "never", which is above every number.

    The mean would not exist with one "never" in it. A bound of the interval that is None is "never" as well.
    """
    numbers = np.array([math.inf if count is None else float(count) for count in counts])
    if not len(numbers):
        return {"median": None, "low": None, "high": None, "reached": 0, "seeds": 0, "values": []}
    rng = np.random.default_rng(0)
    medians = np.sort(
        [_median(numbers[rng.integers(len(numbers), size=len(numbers))]) for _ in range(RESAMPLES)]
    )
    low, high = (float(medians[round(share * (RESAMPLES - 1))]) for share in (0.025, 0.975))
    shown = {"median": _median(numbers), "low": low, "high": high}
    return {
        **{name: value if math.isfinite(value) else None for name, value in shown.items()},
        "reached": int(np.isfinite(numbers).sum()),
        "seeds": len(numbers),
        "values": list(counts),
    }


def spread(values: Sequence[object]) -> Row:
    """Mean, range, 95% interval of the mean and the values themselves; null where one is missing."""
    numbers = [float(value) for value in values if isinstance(value, int | float)]
    if not numbers or len(numbers) < len(values) or not np.isfinite(numbers).all():
        known = [v if isinstance(v, int | float) and math.isfinite(v) else None for v in values]
        return {"mean": None, "min": None, "max": None, "low": None, "high": None, "values": known}
    array = np.array(numbers)
    low, high = bootstrap(lambda index: float(array[index].mean()), len(array))
    return {
        "mean": float(array.mean()),
        "min": float(array.min()),
        "max": float(array.max()),
        "low": low,
        "high": high,
        "values": numbers,
    }


def difference(
    ours: Mapping[int, Row], theirs: Mapping[int, Row], field: str = "score", higher: bool = True
) -> Row:
    """Ours minus theirs on the seeds that both have; ``higher`` says which sign is a win."""
    both = [seed for seed in ours if seed in theirs]
    pairs = [(ours[seed].get(field), theirs[seed].get(field)) for seed in both]
    values = [None if a is None or b is None else a - b for a, b in pairs]
    wins = sum(v is not None and (v > 0 if higher else v < 0) for v in values)
    return spread(values) | {"wins": wins, "seeds": len(both)}


def _median(numbers: Floats) -> float:
    """np.median, which warns about infinity minus infinity."""
    ordered = np.sort(numbers)
    low, high = ordered[(len(ordered) - 1) // 2], ordered[len(ordered) // 2]
    return float(low if low == high else (low + high) / 2)


def _mean(rows: Mapping[int, Row], field: str) -> float:
    return float(np.mean([row[field] for row in rows.values()]))
