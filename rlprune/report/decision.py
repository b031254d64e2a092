"""What a run decides: what was asked, what the chosen plan costs in quality, and what it saves."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..utils.arrays import Floats
from ..utils.values import is_finite
from . import words
from .paired import Change, paired, read_outcomes, unpaired
from .results import OUTCOMES_FILE, Results, as_list, as_mapping, kind_of, learned

Row = Mapping[str, Any]
_COST_TOLERANCE, _LATENCY_TOLERANCE = 0.01, 0.03
"""Relative differences that are no saving: plans under one budget differ by a step, a measurement by its noise."""


@dataclass(frozen=True)
class Saving:
    """A cost of the dense model and of the chosen plan, in the cost's own unit."""

    metric: str
    label: str
    before: float
    after: float

    @property
    def change(self) -> float:
        """The relative change: -0.5 for half of it."""
        return self.after / self.before - 1.0


@dataclass(frozen=True)
class Decision:
    """The chosen plan compared with the dense model, and the rows that are as good and cheaper.

    ``before`` is the dense model's quality on the test split, ``after`` the chosen model's after the fine-tune;
    ``change`` is their difference sample by sample: of the metric, or of the loss (``change_of``).
    """

    asked: str
    chosen: Row
    dense: Row
    metric: str
    higher: bool
    before: float | None
    after: float | None
    change: Change | None
    change_of: str
    noun: str
    tuned: bool
    exp_of_loss: bool
    savings: tuple[Saving, ...]
    rivals: Mapping[int, str] = field(default_factory=dict)
    """Why a row (by its number in results.json) is as good and cheaper."""


class Compared:
    """The rows of a run with their quality, and how far any two of them are apart."""

    def __init__(self, results: Results, folder: Path | None) -> None:
        self.rows: list[Row] = as_list(results.get("rows"))
        workload = as_mapping(results.get("workload"))
        self.metric = str(workload.get("metric") or "test metric")
        self.higher = bool(workload.get("higher_is_better", "protocol" not in workload))
        self.exp_of_loss = bool(workload.get("exp_of_loss", False))
        size = as_mapping(workload.get("sizes")).get("test")
        self.size = int(size) if is_finite(size) else 0
        self.tuned = any(row.get("test") != row.get("test_finetuned", row.get("test")) for row in self.rows)
        """Whether a fine-tune changed anything."""
        self.kind = str(results.get("outcomes", "metric"))
        self.outcomes: Mapping[str, Floats] = {} if folder is None else read_outcomes(folder / OUTCOMES_FILE)

    def quality(self, row: Row) -> float | None:
        """The test metric of a row: after the fine-tune, and of the dense model as it came."""
        names = ("test",) if kind_of(row) == "dense" else ("test_finetuned", "test")
        return next((float(row[name]) for name in names if is_finite(row.get(name))), None)

    def change(self, row: Row, other: Row) -> Change | None:
        """How much better a row is than another on the same test samples, positive for better."""
        ours, theirs = (self.outcomes.get(f"{r.get('method')}/{r.get('seed')}") for r in (row, other))
        rises = self.kind == "metric" and self.higher
        if ours is not None and theirs is not None:
            return paired(ours, theirs) if rises else paired(theirs, ours)
        a, b = self.quality(row), self.quality(other)
        if a is None or b is None or not words.is_share(self.metric) or self.size < 2:
            return None
        return unpaired(a, b, self.size) if 0 <= min(a, b) and max(a, b) <= 1 else None

    def as_good(self, row: Row, other: Row) -> str | None:
        """In words, where a row is not worse than another: "as good", or "not told apart" within the interval."""
        a, b = self.quality(row), self.quality(other)
        if a is None or b is None:
            return None
        if (a - b) * (1 if self.higher else -1) >= 0:
            return "at least as good"
        change = self.change(row, other)
        return "not told apart" if change is not None and change.paired and change.high >= 0 else None


def decide(results: Results, folder: Path | None = None) -> Decision | None:
    """The decision of a run's results; None without a dense model or a learned plan, and for a benchmark."""
    dense = next((row for row in as_list(results.get("rows")) if kind_of(row) == "dense"), None)
    chosen = learned(results)
    if dense is None or chosen is None or results.get("summary"):
        return None
    compared = Compared(results, folder)
    before, after = compared.quality(dense), compared.quality(chosen)
    noun = str(as_mapping(results.get("workload")).get("samples", "samples"))
    return Decision(
        asked=words.budget_words(as_mapping(results.get("budget"))),
        chosen=chosen,
        dense=dense,
        metric=compared.metric,
        higher=compared.higher,
        before=before,
        after=after,
        change=compared.change(chosen, dense),
        change_of=compared.kind,
        noun="sequences" if noun == "sequences" else "samples",
        tuned=compared.tuned,
        exp_of_loss=compared.exp_of_loss,
        savings=tuple(_savings(results, dense, chosen)),
        rivals=rivals(compared, chosen),
    )


def costs_of(row: Row, metric: str = "macs") -> dict[str, float]:
    """Every known cost of a row by its key: those that the budget can count, the file's bytes, latencies by batch."""
    found = {name: row.get(name) for name in (metric, "macs", "params", "bytes")}
    if not is_finite(found[metric]):
        found[metric] = row.get("cost")
    found |= {f"latency b{batch}": ms for batch, ms in as_mapping(row.get("latency_ms")).items()}
    if metric == "latency":
        found["latency (table)"] = found.pop("latency")
    return {name: float(value) for name, value in found.items() if is_finite(value) and value > 0}


def cost_label(key: str) -> str:
    """A key of `costs_of` in words."""
    if key.startswith("latency b"):
        return f"latency, batch {key.removeprefix('latency b')}"
    return "latency by the table" if key == "latency (table)" else words.cost_name(key)


def rivals(compared: Compared, chosen: Row) -> dict[int, str]:
    """Rows that are as good as the chosen one after the fine-tune, no dearer in any cost, and cheaper in one.

    A rule of the same costs is cheaper in what it took to find it. The dense model cannot be one.
    """
    found = {}
    for index, row in enumerate(compared.rows):
        if row is chosen or kind_of(row) == "dense" or row.get("budget") != chosen.get("budget"):
            continue
        good, cheaper = compared.as_good(row, chosen), _cheaper(row, chosen)
        if good and cheaper:
            found[index] = f"{good}, and cheaper: {cheaper}"
    return found


def _cheaper(row: Row, chosen: Row) -> str | None:
    """What a row saves over the chosen one; None where it saves nothing, or costs more somewhere."""
    ours, theirs = costs_of(row), costs_of(chosen)
    less = []
    for key in ours.keys() & theirs.keys():
        tolerance = _LATENCY_TOLERANCE if key.startswith("latency") else _COST_TOLERANCE
        change = ours[key] / theirs[key] - 1.0
        if change > tolerance:
            return None
        if change < -tolerance:
            less.append((list(theirs).index(key), f"{cost_label(key)} {words.signed(100 * change, '.0f')}%"))
    if less:
        return ", ".join(text for _, text in sorted(less))
    searched = is_finite(row.get("evaluations")) and is_finite(chosen.get("evaluations"))
    if searched and row["evaluations"] < 0.5 * chosen["evaluations"]:
        return f"{row['evaluations']} instead of {chosen['evaluations']} evaluations"
    return None


def _savings(results: Results, dense: Row, chosen: Row) -> Iterable[Saving]:
    metric = str(as_mapping(results.get("budget")).get("metric", "macs"))
    before, after = costs_of(dense, metric), costs_of(chosen, metric)
    for key, value in before.items():
        if key in after:
            yield Saving(key, cost_label(key), value, after[key])


def change_words(decision: Decision) -> str:
    """The change of quality with its interval: "−0.8 points (95% interval −1.9 to +0.4)"; empty without one."""
    change = decision.change
    if change is None:
        return ""
    if decision.exp_of_loss and decision.change_of == "loss":
        # A smaller loss is better: the change is that of minus the loss.
        shown = [100 * (math.exp(-value) - 1) for value in (change.mean, change.high, change.low)]
        unit, form = "%", ".1f"
    else:
        sign = 1 if decision.change_of == "metric" and decision.higher else -1
        ends = (change.low, change.high) if sign > 0 else (change.high, change.low)
        percent = words.is_share(decision.metric) and decision.change_of == "metric"
        shown = [sign * (100 if percent else 1) * value for value in (change.mean, *ends)]
        unit, form = (" points", ".1f") if percent else ("", ".3g")
    mean, low, high = (words.signed(value, form) for value in shown)
    how = "" if change.paired else ", not paired, so too wide"
    of = "loss " if decision.change_of == "loss" and not decision.exp_of_loss else ""
    return f"{of}{mean}{unit}, 95% interval {low} to {high} on {change.count:,} test {decision.noun}{how}"


def sentence(decision: Decision) -> str:
    """The decision in one sentence: what was asked, what it costs in quality, what it buys."""
    before, after = (words.quality(v, decision.metric) for v in (decision.before, decision.after))
    change = change_words(decision)
    asked = f"Asked for at most {decision.asked}, the" if decision.asked else "The"
    inside = f" ({change})" if change else ""
    tuned = " after the fine-tune" if decision.tuned else ""
    method = decision.chosen.get("method")
    cost = f"{asked} plan of {method} brings {decision.metric} from {before} to {after}{tuned}{inside}"
    gains, losses = ([s for s in decision.savings if (s.change < 0) is less] for less in (True, False))
    bought = f" and buys: {'; '.join(map(_saving_words, gains))}" if gains else ""
    dearer = f"; not: {'; '.join(map(_saving_words, losses))}" if losses else ""
    return f"{cost}{bought}{dearer}."


def _saving_words(saving: Saving) -> str:
    before, after = (words.amount(value, saving.metric) for value in (saving.before, saving.after))
    return f"{saving.label} {before} → {after} ({words.signed(100 * saving.change, '.0f')}%)"


def rival_words(decision: Decision, rows: Sequence[Row]) -> str:
    """Which other methods are as good and cheaper, in a sentence."""
    if not decision.rivals:
        return "No other method is as good and cheaper."
    named = [f"{rows[index].get('method')} ({why})" for index, why in list(decision.rivals.items())[:3]]
    more = len(decision.rivals) - len(named)
    return f"As good and cheaper: {'; '.join(named)}{f'; and {more} more' if more else ''}."


def as_plain(decision: Decision) -> dict[str, Any]:
    """The decision as plain values, for ``--json``."""
    change = decision.change
    return {
        "asked": decision.asked,
        "method": decision.chosen.get("method"),
        "metric": decision.metric,
        "higher_is_better": decision.higher,
        "dense": decision.before,
        "pruned": decision.after,
        "change": None
        if change is None
        else {
            "of": decision.change_of,
            "better_by": change.mean,
            "low": change.low,
            "high": change.high,
            "samples": change.count,
            "paired": change.paired,
        },
        "costs": {s.metric: {"dense": s.before, "pruned": s.after} for s in decision.savings},
    }
