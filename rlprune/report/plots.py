"""The pictures of a run, drawn with matplotlib's object interface (no pyplot: no global state, no display).

Every function takes plain numbers and returns a `Figure`; `to_png` turns one into bytes.
The colours are those of Okabe and Ito ("Color Universal Design", 2008), which stay apart for colour-blind
readers; methods differ by marker or line style as well.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
GREY = "#9A9A9A"
_LINES = ("-", "--", "-.", ":")
# Thin lines: five colours by four styles.
_THIN = ("#9A9A9A", "#E69F00", "#56B4E9", "#CC79A7", "#8C6D31")
_FIXED = {"ppo": 0, "random": 1, "uniform": 4}  # the methods of every run keep their colour from plot to plot
_STYLE: Any = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "svg.hashsalt": "rlprune",
}


def colours(methods: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Return {method: (colour, marker)}; `ppo`, `random` and `uniform` always get the same ones."""
    fixed = {method: _FIXED.get(method.split(" ")[0]) for method in methods}  # "ppo policy" is ppo's
    taken: dict[str, int] = {}
    for method, index in fixed.items():
        if index is not None and index not in taken.values():
            taken[method] = index
    free = [index for index in range(len(PALETTE)) if index not in taken.values()]
    for position, method in enumerate(m for m in methods if m not in taken):
        taken[method] = free[position % len(free)]
    return {method: (PALETTE[index], MARKERS[index]) for method, index in taken.items()}


def learning(
    curves: Mapping[str, Sequence[Sequence[float]]], references: Mapping[str, float], unit: str = "score"
) -> Figure:
    """Best score so far against evaluations spent: mean over the seeds as a line, their range as a band.

    Of more than four methods the first four have a colour, the others a thin line, and only the first two a band:
    more of them cover each other.

    Args:
        curves: method -> one list of scores per seed, in the order in which they were charged.
        references: label -> score of a plan that needed no search, drawn as a horizontal line.
        unit: what the score is, for the axis.
    """
    figure, axes = _figure(8.0, 4.3)
    many = len(curves) > 4
    styles = colours(list(curves)[:4] if many else list(curves))
    floor = list(references.values())
    thin = 0
    for method, seeds in curves.items():
        best = [_best_so_far(scores) for scores in seeds if scores]
        if not best:
            continue
        length = max(len(scores) for scores in best)
        best = [scores + [scores[-1]] * (length - len(scores)) for scores in best]
        columns = list(zip(*best, strict=True))
        mean = [sum(column) / len(column) for column in columns]
        steps = list(range(1, length + 1))
        label = f"{method} (mean and range of {len(best)} seeds)" if len(best) > 1 and not many else method
        if method not in styles:
            line, colour = _LINES[thin % 4], _THIN[thin // 4 % 5]
            axes.plot(steps, mean, line, color=colour, linewidth=1, zorder=1, label=_plain(label))
            thin += 1
        else:
            colour = styles[method][0]
            axes.plot(steps, mean, color=colour, linewidth=2, zorder=3, label=_plain(label))
        if len(best) > 1 and (not many or method in list(curves)[:2]):
            axes.fill_between(steps, [min(c) for c in columns], [max(c) for c in columns],
                              color=colour, alpha=0.14, linewidth=0)  # fmt: skip
        floor.append(mean[min(length - 1, length // 20)])
    for (label, value), dashes in zip(references.items(), ("--", ":", "-.") * 8, strict=False):
        text = f"{label} ({value:.4g})".replace("-", "−")
        axes.axhline(value, color="#444444", linestyle=dashes, linewidth=1.2, label=_plain(text))
    _zoom(axes, floor)
    axes.set_xlabel("evaluations (distinct plans scored)")
    axes.set_ylabel(f"best so far, higher is better\n{unit}", fontsize=9)
    axes.grid(color="#E3E3E3", linewidth=0.6)
    count = max((len(found) for found in curves.values()), default=1)
    spread = f" (mean of {count} seeds; band: their range, for {' and '.join(list(curves)[:2])})"
    title = "Learning curve" + (spread if many and count > 1 else "")
    _head(axes, title, legend_rows=-(-(len(curves) + len(references)) // (4 if many else 2)))
    return figure


def quality(points: Sequence[Mapping[str, Any]], metric: str = "macs", unit: str = "score") -> Figure:
    """Quality against budget, one line a method.

    Args:
        points: {"budget": share of the dense cost, "method", "score"}; the seeds of a method are averaged.
            Where there are more than three methods, those of "kind" "rule" are thin lines.
        metric: what the budget counts, for the axis.
        unit: what the score is, for the axis.
    """
    figure, axes = _figure(8.0, 4.0)
    methods = list(dict.fromkeys(str(point["method"]) for point in points))
    rules = {str(point["method"]) for point in points if point.get("kind") == "rule"}
    thin = [method for method in methods if method in rules] if len(methods) > 3 else []
    styles = colours([method for method in methods if method not in thin])
    # Small budgets lose tens of times more than large ones: a negative score is drawn on a log scale.
    falling = all(point["score"] < 0 for point in points if _finite(point.get("score")))
    for method in methods:
        found: dict[float, list[float]] = {}
        for point in points:
            if str(point["method"]) == method and _finite(point.get("score")):
                found.setdefault(float(point["budget"]), []).append(float(point["score"]))
        budgets = sorted(found)
        if not budgets:
            continue
        means = [sum(found[budget]) / len(found[budget]) for budget in budgets]
        drawn = [-mean for mean in means] if falling else means
        if method in thin:
            place = thin.index(method)
            look: Any = {"color": _THIN[place % 5], "linewidth": 1.1, "linestyle": _LINES[place // 5 % 4]}
        else:
            colour, marker = styles[method]
            look = {"color": colour, "marker": marker, "linewidth": 2.4 if thin else 1.5, "zorder": 3}
        axes.plot([100 * b for b in budgets], drawn, label=_plain(method), **look)
    if falling:
        _negative_log(axes)
    axes.set_xlabel(f"budget (% of the dense {metric})")
    axes.set_ylabel(f"{unit}{', log scale' if falling else ''}", fontsize=9)
    axes.grid(color="#E3E3E3", linewidth=0.6)
    _head(axes, "Quality against budget", legend_rows=-(-len(methods) // 4))
    return figure


def comparison(
    panels: Mapping[str, Sequence[Mapping[str, Any]]],
    dense: Mapping[str, float | None] | None = None,
    higher: bool = False,
) -> Figure:
    """One line a method: every seed as a small mark, the mean and its 95% interval; the mean alone of one seed.

    Args:
        panels: what is drawn, with its unit, for the axis -> {"method", "values": [...], "mean", "low", "high"} of each
            method, best first; several panels stand side by side. Methods stand in the first panel's order.
        dense: the dense model's value for a panel, drawn as a vertical line.
        higher: whether more is better, for the axes.
    """
    methods = list(dict.fromkeys(str(row["method"]) for rows in panels.values() for row in rows))
    figure, every = _panels(8.0 if len(panels) < 2 else 11.0, 1.4 + 0.36 * len(methods), len(panels))
    for number, (axes, (unit, rows)) in enumerate(zip(every, panels.items(), strict=True)):
        for row in rows:
            position = methods.index(str(row["method"]))
            if len(row["values"]) > 1:
                ends, marks = [row["low"], row["high"]], row["values"]
                axes.plot(ends, [position, position], color=PALETTE[0], linewidth=2.2, zorder=2)
                axes.plot(marks, [position] * len(marks), "|", color=GREY, markersize=11, zorder=1)
            axes.plot([row["mean"]], [position], "o", color=PALETTE[0], markersize=6, zorder=3)
        axes.set_yticks(range(len(methods)), [_plain(m) for m in methods] if number == 0 else [])
        axes.set_ylim(len(methods) - 0.5, -0.5)
        values = [value for row in rows for value in row["values"]]
        if values and min(values) > 0 and max(values) > 8 * min(values):
            axes.set_xscale("log")
        _few_ticks(axes)
        value = (dense or {}).get(unit)
        if value is not None and (value > 0 or axes.get_xscale() != "log"):
            axes.axvline(value, color="#444444", linestyle="--", linewidth=1.1, zorder=0)
            axes.annotate("dense", (value, 1.0), xycoords=("data", "axes fraction"), xytext=(3, 2),
                          textcoords="offset points", fontsize=8, color="#444444")  # fmt: skip
        better = "higher is better →" if higher else "← lower is better"
        axes.set_xlabel(f"{_plain(unit)}\n{better}")
        axes.set_title(
            "Methods compared" if number == 0 else "", loc="left", fontsize=11, fontweight="bold", pad=16
        )
        axes.grid(axis="x", color="#E3E3E3", linewidth=0.6)
    several = any(len(row["values"]) > 1 for rows in panels.values() for row in rows)
    legend = "dot: mean, bar: 95% bootstrap interval, ticks: seeds" if several else "one seed: no interval"
    figure.supxlabel(legend, fontsize=8, color="#666666")
    return figure


def scatter(x: Sequence[float], y: Sequence[float], labels: tuple[str, str], title: str) -> Figure:
    """One point a candidate: `x` against `y`; `labels` name the two axes with their units."""
    figure, axes = _figure(6.0, 4.6)
    axes.plot(x, y, "o", color=PALETTE[0], markersize=6, alpha=0.8, markeredgecolor="white")
    axes.set_xlabel(_plain(labels[0]))
    axes.set_ylabel(_plain(labels[1]))
    _head(axes, _plain(title))
    axes.grid(color="#E3E3E3", linewidth=0.6)
    return figure


def to_png(figure: Figure, path: str | Path | None = None) -> bytes:
    """PNG of the figure at 110 dots an inch; also written to `path` when one is given."""
    data = _render(figure, "png", dpi=110)
    if path is not None:
        Path(path).write_bytes(data)
    return data


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure, (axes,) = _panels(width, height, 1)
    return figure, axes


def _panels(width: float, height: float, count: int) -> tuple[Figure, Sequence[Axes]]:
    """A figure with ``count`` plots side by side."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
        return figure, [figure.add_subplot(1, count, number + 1) for number in range(count)]


def _head(axes: Axes, title: str, legend_rows: int = 0) -> None:
    """Title at the left, and between it and the plot the legend, where no line can run through it."""
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", pad=8 + 16 * legend_rows)
    if legend_rows:
        entries = len(axes.get_legend_handles_labels()[0])
        columns = max(1, -(-entries // legend_rows))
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=columns, frameon=False, fontsize=9,
                    borderaxespad=0.1)  # fmt: skip


def _render(
    figure: Figure, kind: str, dpi: float | str = "figure", metadata: Mapping[str, None] | None = None
) -> bytes:
    import matplotlib

    buffer = io.BytesIO()
    with matplotlib.rc_context(_STYLE):
        figure.savefig(buffer, format=kind, dpi=dpi, metadata=metadata)
    return buffer.getvalue()


def _best_so_far(scores: Sequence[float]) -> list[float]:
    best, result = -math.inf, []
    for score in scores:
        best = max(best, score) if _finite(score) else best
        result.append(best)
    first = next((value for value in result if math.isfinite(value)), 0.0)
    return [value if math.isfinite(value) else first for value in result]


def _zoom(axes: Axes, floor: Sequence[float]) -> None:
    """Keep the first, collapsed candidates from squeezing the part of the curve that matters."""
    finite = [value for value in floor if math.isfinite(value)]
    _, top = axes.get_ylim()
    if finite and top > min(finite):
        axes.set_ylim(min(finite) - 0.06 * (top - min(finite)), top)


def _few_ticks(axes: Axes) -> None:
    """Round numbers on the horizontal axis, so few that they cannot touch."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    if axes.get_xscale() != "log":
        axes.xaxis.set_major_locator(MaxNLocator(5))
        return
    low, high = axes.get_xlim()
    wide = high > 100 * low
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0), numticks=6))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _negative_log(axes: Axes) -> None:
    """A log scale for values that were drawn with their sign turned: up is better, ticks show the sign."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.invert_yaxis()
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"−{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _plain(text: str) -> str:
    return text.replace("$", r"\$")  # matplotlib reads $...$ as mathematics


def _finite(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
