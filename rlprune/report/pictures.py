"""The charts of the report: quality against cost, learning, quality against budget, methods compared."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from ..utils.values import is_finite
from .svg import Axis, Dot, Drawing, Frame, Line, Picture, Word, in_percent, plain, shortened

WIDE, NARROW = (510, 330), (350, 290)
ROLES: Mapping[str, tuple[Literal["circle", "square", "diamond", "star"], str, str]] = {
    "dense": ("diamond", "c6", "dense model"),
    "chosen": ("star", "c0", "chosen plan"),
    "agent": ("star", "c0", "agents"),
    "rule": ("circle", "c4", "rules"),
    "search": ("square", "c1", "other searches"),
}
"""Shape, colour and name of what a dot may be."""
COLOURED = ("c0", "c1", "c2", "c3")
"""Lines with a colour of their own; what comes after them is thin and grey."""
_BANDS = COLOURED[:2]
"""More bands than two cover each other."""


@dataclass(frozen=True)
class Place:
    """A method in the picture of quality against cost."""

    name: str
    cost: float
    quality: float
    role: str
    title: str
    key: str = ""
    named: bool = False
    low: float | None = None
    high: float | None = None


def rescaled(place: Place, scale: float) -> Place:
    """The same place with its cost in units of ``scale``."""
    return replace(place, cost=place.cost / scale)


def tradeoff(
    places: Sequence[Place], cost: str, unit: str, quality: str, higher: bool, share: bool
) -> Picture:
    """Quality against a cost, a dot a method; the dense and the chosen one are named."""
    better = "higher is better" if higher else "lower is better"

    def draw(size: tuple[int, int]) -> Drawing:
        ends = [v for p in places for v in (p.quality, p.low, p.high) if v is not None]
        x = Axis.over([p.cost for p in places], f"{cost}{unit} (← lower is better)")
        log = not share and min(ends) > 0 and max(ends) > 8 * min(ends)
        label = f"{'↑' if higher else '↓'} {quality} ({better}{', log scale' if log else ''})"
        y = Axis.over(ends, label, log, in_percent if share else plain)
        if share:
            y = replace(y, low=max(y.low, -0.02), high=min(y.high, 1.02))
        frame = Frame(*size, x, y)
        frame.draw_axes()
        for place in places:
            if place.low is not None and place.high is not None:
                bar = [frame.at(place.cost, end) for end in (place.low, place.high)]
                frame.lines.append(Line(bar, f"bar {ROLES[place.role][1]}", place.title))
        for place in sorted(places, key=lambda p: p.named):
            shape, css, _ = ROLES[place.role]
            frame.dots.append(Dot(*frame.at(place.cost, place.quality), shape, css, place.title, place.key))
        for place in places:
            if place.named:
                frame.name(*frame.at(place.cost, place.quality), shortened(place.name, 24))
        return frame.drawing()

    roles = [role for role in ROLES if any(place.role == role for place in places)]
    legend = [(ROLES[role][1], ROLES[role][0], ROLES[role][2]) for role in roles]
    bar = any(place.low is not None for place in places)
    note = "Bar: 95% interval of the difference to the dense model on the same test samples." if bar else ""
    alt = f"{quality} after the fine-tune against {cost}, a dot a method"
    return Picture(f"{quality} against {cost}", alt, draw(WIDE), draw(NARROW), legend, note)


def learning(
    curves: Mapping[str, Sequence[Sequence[float]]],
    references: Mapping[str, float],
    unit: str,
    first: Sequence[str] = (),
) -> Picture:
    """Best score so far against evaluations: a line a method, a band over its seeds.

    Args:
        curves: method -> one list of scores per seed, in the order in which they were charged.
        references: label -> score of a plan that needed no search.
        first: the methods that get a colour before others; four have one, the first two a band.
    """
    order = [m for m in first if m in curves] + [m for m in curves if m not in first]
    best = {name: _means(curves[name]) for name in order}
    best = {name: found for name, found in best.items() if found[0]}
    floor = [
        *references.values(),
        *(mean[min(len(mean) - 1, len(mean) // 20)] for mean, _, _ in best.values()),
    ]
    tops = [mean[-1] for mean, _, _ in best.values()]
    seen = _worth_seeing(floor, tops, next(iter(references.values()), None))
    longest = max((len(mean) for mean, _, _ in best.values()), default=1)
    coloured = dict(zip(best, COLOURED, strict=False))

    def draw(size: tuple[int, int]) -> Drawing:
        x = Axis(0, longest * 1.02, "evaluations (distinct plans scored)")
        y = Axis.over(seen, "↑ best score so far (higher is better)")
        frame = Frame(*size, x, y)
        frame.draw_axes()
        for number, (label, value) in enumerate(references.items()):
            if value < y.low:
                continue
            ends = [frame.at(x.low, value), frame.at(x.high, value)]
            frame.lines.append(Line(ends, f"reference r{number % 2}", f"{label}: {value:.4g}"))
        for name in reversed(list(best)):
            frame.lines += _curve(frame, name, *best[name], coloured.get(name, ""))
        return frame.drawing()

    seeds = max(len(curves[name]) for name in best) if best else 0
    legend = [(css, "line", name) for name, css in coloured.items()]
    if others := [name for name in best if name not in coloured]:
        legend.append(("thin", "line", f"thin: {', '.join(others)}"))
    legend += [
        (f"r{n % 2}", "dashed", f"{label} ({plain(value)})")
        for n, (label, value) in enumerate(references.items())
    ]
    banded = [name for name, css in coloured.items() if css in _BANDS]
    bands = f", bands: the range of the seeds ({' and '.join(banded)})" if seeds > 1 else ""
    note = f"{unit}. Lines: {'the mean over the seeds' if seeds > 1 else 'one seed'}{bands}."
    return Picture(
        "Learning curve", "Best score so far against evaluations", draw(WIDE), draw(NARROW), legend, note
    )


def budgets(points: Sequence[Mapping[str, Any]], metric: str, unit: str) -> Picture:
    """Score against budget: a line a method; negative scores on a log scale.

    Args:
        points: {"budget": share of the dense cost, "method", "score", "kind"}; seeds of a method are averaged.
    """
    every: dict[str, dict[float, list[float]]] = {}
    for point in points:
        if is_finite(point.get("score")):
            by_budget = every.setdefault(str(point["method"]), {})
            by_budget.setdefault(float(point["budget"]), []).append(float(point["score"]))
    rules = {str(point["method"]) for point in points if point.get("kind") == "rule"}
    order = sorted(every, key=lambda name: name in rules)
    coloured = dict(zip(order, COLOURED, strict=False))
    means = {m: [(100 * b, sum(s) / len(s)) for b, s in sorted(every[m].items())] for m in order}
    scores = [score for line in means.values() for _, score in line]
    falling = bool(scores) and max(scores) < 0

    def draw(size: tuple[int, int]) -> Drawing:
        x = Axis.over([b for line in means.values() for b, _ in line], f"budget (% of the dense {metric})")
        form: Callable[[float], str] = (lambda value: f"−{plain(value)}") if falling else plain
        shown = [-score if falling else score for score in scores]
        y = Axis.over(shown, f"↑ score (higher is better){', log scale' if falling else ''}", falling, form)
        frame = Frame(*size, x, _Turned(y.low, y.high, y.label, y.log, y.form) if falling else y)
        frame.draw_axes()
        for name in reversed(order):
            css = coloured.get(name, "")
            spots = [frame.at(b, -score if falling else score) for b, score in means[name]]
            frame.lines.append(Line(spots, f"line {css or 'thin'}", name))
            for spot, (b, score) in zip(spots, means[name], strict=True):
                title = f"{name}: {score:.4g} at {b:.4g}%"
                frame.dots.append(Dot(*spot, "circle", f"small {css or 'thin'}", title))
        return frame.drawing()

    legend = [(css, "line", name) for name, css in coloured.items()]
    if others := [name for name in order if name not in coloured]:
        legend.append(("thin", "line", f"thin: {', '.join(others)}"))
    note = f"{unit}, before the fine-tune, of plans made without a further search."
    return Picture(
        "Quality against budget", "Score against the budget", draw(WIDE), draw(NARROW), legend, note
    )


def methods(
    rows: Sequence[Mapping[str, Any]], label: str, dense: float | None, higher: bool, unit: str = ""
) -> Picture:
    """A line a method: its seeds as small marks, the mean and its 95% interval, and the dense model's value.

    Args:
        rows: {"method", "values", "mean", "low", "high"}, best first.
        unit: what the numbers are, for the line below.
    """
    seeds = max((len(row["values"]) for row in rows), default=0)
    values = [v for row in rows for v in [*row["values"], row["mean"]] if is_finite(v)]
    log = bool(values) and min(values) > 0 and max(values) > 8 * min(values)
    longest = max((len(str(row["method"])) for row in rows), default=1)

    def draw(size: tuple[int, int]) -> Drawing:
        letters = min(longest, 24 if size is WIDE else 16)
        known = [*values, *([dense] if dense is not None and (dense > 0 or not log) else [])]
        x = Axis.over(known, f"{label} ({'higher is better →' if higher else '← lower is better'})", log)
        height = int(Frame.TOP + Frame.BOTTOM + 20 * len(rows))
        frame = Frame(size[0], height, x, Axis(-len(rows) + 0.5, 0.5, ""), left=12 + 6.2 * letters)
        frame.draw_axes(y_ticks=False)
        if dense is not None and x.low <= dense <= x.high:
            ends = [frame.at(dense, frame.y.low), frame.at(dense, frame.y.high)]
            frame.lines.append(Line(ends, "reference r0", f"dense: {dense:.4g}"))
            frame.words.append(Word(ends[1][0], 12, "dense", "middle"))
        for place, row in enumerate(rows):
            _interval(frame, -place, row, shortened(str(row["method"]), letters))
        return frame.drawing()

    note = (
        f"Dot: mean over {seeds} seeds; bar: its 95% bootstrap interval; ticks: the seeds."
        if seeds > 1
        else "One seed, so there is no interval: differences may be chance."
    )
    note = f"{unit}. {note}" if unit else note
    return Picture(label, f"{label} of every method", draw(WIDE), draw(NARROW), note=note)


class _Turned(Axis):
    """An axis whose low end is at the top."""

    def place(self, value: float) -> float:
        return 1.0 - super().place(value)


def _interval(frame: Frame, y: float, row: Mapping[str, Any], name: str) -> None:
    spot = frame.at(row["mean"], y)
    title = f"{row['method']}: {row['mean']:.4g}"
    frame.words.append(Word(frame.left - 6, spot[1] + 4, name, "end"))
    several = len(row["values"]) > 1
    if several and is_finite(row["low"]) and is_finite(row["high"]):
        title += f" [{row['low']:.4g}, {row['high']:.4g}]"
        frame.lines.append(Line([frame.at(row["low"], y), frame.at(row["high"], y)], "bar c0", title))
    for value in row["values"] if several else ():
        x, middle = frame.at(value, y)
        frame.lines.append(Line([(x, middle - 5), (x, middle + 5)], "seed"))
    frame.dots.append(Dot(*spot, "circle", "c0", title, str(row["method"])))


def _curve(
    frame: Frame, name: str, mean: Sequence[float], low: Sequence[float], high: Sequence[float], css: str
) -> list[Line]:
    """A curve, kept within the frame: a first, collapsed candidate would squeeze the part that matters."""

    def at(index: int, value: float) -> tuple[float, float]:
        return frame.at(index + 1, min(max(value, frame.y.low), frame.y.high))

    # A running best is flat almost everywhere; its corners are all of it.
    corners = [
        i for i, v in enumerate(mean) if i in (0, len(mean) - 1) or v != mean[i - 1] or v != mean[i + 1]
    ]
    found = [Line([at(i, mean[i]) for i in corners], f"line {css or 'thin'}", f"{name}: {mean[-1]:.4g}")]
    if css in _BANDS and list(low) != list(high):
        every = range(0, len(mean), max(1, len(mean) // 200))
        edge = [at(i, low[i]) for i in every] + [at(i, high[i]) for i in reversed(every)]
        found.insert(0, Line(edge, f"band {css}", filled=True))
    return found


def _worth_seeing(floor: Sequence[float], tops: Sequence[float], rule: float | None) -> list[float]:
    """The scores that the axis has to hold: collapsed candidates far below the best rule would squeeze the others."""
    least = -math.inf if rule is None or not tops else rule - 3 * max(0.0, max(tops) - rule)
    return [score for score in (*floor, *tops) if score >= least]


def _means(seeds: Sequence[Sequence[float]]) -> tuple[list[float], list[float], list[float]]:
    """Mean, lowest and highest best score so far over the seeds, after each evaluation."""
    best = [found for scores in seeds if (found := best_so_far(scores))]
    length = max((len(scores) for scores in best), default=0)
    columns = list(zip(*[scores + [scores[-1]] * (length - len(scores)) for scores in best], strict=True))
    return [sum(c) / len(c) for c in columns], [min(c) for c in columns], [max(c) for c in columns]


def best_so_far(scores: Sequence[float]) -> list[float]:
    """The best score after each evaluation; before there is one, the first that comes."""
    best, result = -math.inf, []
    for score in scores:
        best = max(best, score) if is_finite(score) else best
        result.append(best)
    first = next((value for value in result if math.isfinite(value)), None)
    return [] if first is None else [value if math.isfinite(value) else first for value in result]
