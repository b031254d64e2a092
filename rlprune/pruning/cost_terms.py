"""What each layer adds to a cost, and which protected layers keep a model from becoming cheaper."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike
from torch import nn

from .cost import AxisSize, CostFormula, FormulaBuilder, Term

if TYPE_CHECKING:
    from .space import Cut, PruningSpace

NARROW = 0.5
"""A space whose lowest budget is above this is narrow: half of the costs cannot be cut."""
OUTSIDE = "matrix products outside of layers"
_OUTSIDE_REASON = "they follow no layer's width"
_UNREACHED = "no group reaches it"
_NUMBER = re.compile(r"\b\d+\b")


class NarrowSpaceWarning(UserWarning):
    """Even at the smallest widths a model keeps more than half of a cost."""


@dataclass(frozen=True)
class ProtectedShare:
    """A protected layer, the share of a dense model's cost that it keeps at the smallest widths, and why."""

    name: str
    share: float
    reason: str


def parameter_terms(model: nn.Module, cuts: Sequence[Cut]) -> dict[str, Term]:
    """The number of elements of each parameter, by its name, as a term of the metric `params`."""
    by_tensor: dict[str, dict[int, int]] = defaultdict(dict)
    for cut in cuts:
        by_tensor[cut.tensor][cut.dim] = cut.axis
    terms = {}
    for name, parameter in model.named_parameters():
        axes = by_tensor.get(name, {})
        rest = math.prod(n for dim, n in enumerate(parameter.shape) if dim not in axes)
        terms[name] = Term(layer_of(name), "params", float(rest), tuple(axes.values()))
    return terms


def layer_of(parameter: str) -> str:
    """The layer that a parameter belongs to, by its name; one of the model itself stands for itself."""
    return parameter.rpartition(".")[0] or parameter


def formulas(terms: Sequence[Term], sizes: Sequence[AxisSize], groups: int) -> dict[str, CostFormula]:
    """The cost of each metric as one formula of the widths; ``sizes`` are those of all axes."""
    builders = {metric: FormulaBuilder(groups) for metric in ("macs", "params")}
    for term in terms:
        builders[term.metric].add(term.coefficient, *(sizes[axis] for axis in term.axes))
    return {metric: builder.build() for metric, builder in builders.items()}


def layer_ratios(space: PruningSpace, widths: ArrayLike, metric: str) -> dict[str, float]:
    """What is left of each layer's cost at some widths (G,), between 0 and 1, by the layer's name."""
    at = np.asarray(widths, dtype=np.float64)
    costs: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    sizes = space.axis_sizes()
    for term in space.terms:
        if term.metric == metric:
            for i, w in enumerate((at, space.widths)):
                factors = [float(sizes[axis].constant + sizes[axis].slope @ w) for axis in term.axes]
                costs[term.layer][i] += term.coefficient * math.prod(factors)
    return {name: left / dense for name, (left, dense) in costs.items() if dense}


def protected_shares(space: PruningSpace, metric: str) -> tuple[ProtectedShare, ...]:
    """Protected layers by the share of the dense cost that they keep at the smallest widths, largest first.

    Among them are those that no group reaches: embeddings, norms over a width that stays.
    """
    sizes = [float(size.constant + size.slope @ space.minimums) for size in space.axis_sizes()]
    kept: dict[str, float] = defaultdict(float)
    reached: set[str] = set()
    for term in space.terms:
        if term.axes:
            reached.add(term.layer)
        if term.metric == metric:
            kept[term.layer] += term.coefficient * math.prod(sizes[axis] for axis in term.axes)
    dense = space.dense_cost(metric)
    found = []
    for name, cost in kept.items():
        reason = _OUTSIDE_REASON if name == OUTSIDE else _reason(name, space.protected)
        if reason is None and name not in reached:
            reason = _UNREACHED
        if reason is not None and cost > 0:
            found.append(ProtectedShare(name, cost / dense, reason))
    return tuple(sorted(found, key=lambda part: -part.share))


def _reason(name: str, protected: Mapping[str, str]) -> str | None:
    """Why a layer, or the one that it is a part of, is protected."""
    while name:
        if name in protected:
            return protected[name]
        name = name.rpartition(".")[0]
    return None


def narrow_lines(space: PruningSpace, most_parts: int = 5) -> list[str]:
    """A line for each metric whose lowest budget is above `NARROW`, with the protected parts that keep most of it."""
    lines = []
    for metric in ("macs", "params"):
        lowest = space.lowest(metric)
        if lowest <= NARROW:
            continue
        parts = _alike(protected_shares(space, metric))
        told = [f"{name} {share:.1%} ({reason})" for name, share, reason in parts[:most_parts]]
        more = sum(share for _, share, _ in parts[most_parts:])
        if more > 0:
            told.append(f"others {more:.1%}")
        kept = f"; of it are protected: {'; '.join(told)}" if told else ""
        lines.append(f"the lowest budget of {metric} is {lowest:.4f} of the dense model{kept}")
    return lines


def _alike(parts: Sequence[ProtectedShare]) -> list[tuple[str, float, str]]:
    """(name, share, reason) of layers that differ in the numbers of their names only, taken together, largest first."""
    together: dict[tuple[str, str], list[ProtectedShare]] = defaultdict(list)
    for part in parts:
        name, reason = (_NUMBER.sub("*", text) for text in (part.name, part.reason))
        together[name, reason].append(part)
    rows = []
    for (pattern, _), found in together.items():
        name = f"{pattern} ({len(found)} layers)" if len(found) > 1 else found[0].name
        rows.append((name, sum(part.share for part in found), found[0].reason))
    return sorted(rows, key=lambda row: -row[1])
