"""Costs of a model as a closed formula of its widths."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike

from ..errors import BudgetError, near_miss
from ..utils.arrays import Floats

METRICS = ("macs", "params")
UNITS = {"latency": "ms"}
"""Units of the metrics that are not plain counts."""


class Cost(Protocol):
    """A cost of the widths (G,) or (N, G) that never falls when a width grows: a formula, or a table.

    On whole widths the values are exact in float64: ``cost(w) + increase(w, steps)[g]`` equals the cost after
    the step of group g, to the last bit, so that a budget can be met exactly.
    """

    def __call__(self, widths: ArrayLike) -> Floats: ...

    def increase(self, widths: Floats, steps: Floats) -> Floats:
        """Cost added by widening one group at a time; shapes (..., G), (..., G) -> (..., G)."""

    def unit_costs(self, widths: Floats) -> Floats:
        """Cost of one unit of each group at these widths, to compare groups by; (..., G) -> (..., G)."""

    def root(self, start: Floats, end: Floats, target: float) -> Floats:
        """The t in [0, 1], shape (N,), with ``cost(start + t (end - start)) = target``; rows (N, G) that fall."""


@dataclass(frozen=True)
class AxisSize:
    """Number of slots of one tensor dimension: ``constant + slope @ widths``; ``slope`` has shape (G,)."""

    constant: float
    slope: Floats


@dataclass(frozen=True)
class Term:
    """What a layer adds to a metric: ``coefficient`` times the sizes of at most two axes (their numbers)."""

    layer: str
    metric: str
    coefficient: float
    axes: tuple[int, ...]


@dataclass(frozen=True)
class CostFormula:
    """``constant + linear @ w + w @ quadratic @ w`` for widths ``w`` of shape (G,) or (N, G).

    Every cost term of a network is a coefficient times the sizes of at most two axes (the output and
    the input of one layer), and an axis is linear in the widths, so the sum is a quadratic form. All
    coefficients are integers below 2**53, so float64 gives the exact count.
    """

    constant: float
    linear: Floats
    quadratic: Floats

    def __call__(self, widths: ArrayLike) -> Floats:
        w = np.asarray(widths, dtype=np.float64)
        cost: Floats = self.constant + w @ self.linear + ((w @ self.quadratic) * w).sum(axis=-1)
        return cost

    def increase(self, widths: Floats, steps: Floats) -> Floats:
        """Cost added by widening one group at a time; shapes (..., G), (..., G) -> (..., G)."""
        slope = self.linear + 2.0 * (widths @ self.quadratic)
        return steps * slope + steps**2 * np.diagonal(self.quadratic)

    def unit_costs(self, widths: Floats) -> Floats:
        """What one unit less of each group saves; (..., G) -> (..., G)."""
        return -self.increase(widths, -np.ones_like(widths))

    def root(self, start: Floats, end: Floats, target: float) -> Floats:
        """The t in [0, 1], shape (N,), with ``cost(start + t (end - start)) = target``: a quadratic's root."""
        change = end - start
        excess = np.maximum(self(start) - target, 0.0)
        slope = change @ self.linear + 2.0 * ((start @ self.quadratic) * change).sum(axis=-1)
        curve = ((change @ self.quadratic) * change).sum(axis=-1)
        root = np.sqrt(np.maximum(slope**2 - 4.0 * curve * excess, 0.0))
        with np.errstate(divide="ignore", invalid="ignore"):
            t = 2.0 * excess / (root - slope)  # the form of the quadratic's root that does not cancel
        found: Floats = np.clip(np.nan_to_num(t, nan=0.0, posinf=1.0), 0.0, 1.0)
        return found


class FormulaBuilder:
    """Adds up ``coefficient * size(a) * size(b)`` terms into one :class:`CostFormula`."""

    def __init__(self, groups: int) -> None:
        self._constant = 0.0
        self._linear = np.zeros(groups)
        self._quadratic = np.zeros((groups, groups))

    def add(self, coefficient: float, *axes: AxisSize) -> None:
        """Add one term; no axis is a constant, one is linear, two are quadratic."""
        if len(axes) > 2:
            raise ValueError("a tensor has at most two prunable dimensions")
        if not axes:
            self._constant += coefficient
            return
        a = axes[0]
        if len(axes) == 1:
            self._constant += coefficient * a.constant
            self._linear += coefficient * a.slope
            return
        b = axes[1]
        self._constant += coefficient * a.constant * b.constant
        self._linear += coefficient * (a.constant * b.slope + b.constant * a.slope)
        where_a, where_b = np.nonzero(a.slope)[0], np.nonzero(b.slope)[0]
        if len(where_a) and len(where_b):
            outer = coefficient * np.outer(a.slope[where_a], b.slope[where_b]) / 2.0
            self._quadratic[np.ix_(where_a, where_b)] += outer
            self._quadratic[np.ix_(where_b, where_a)] += outer.T

    def build(self) -> CostFormula:
        return CostFormula(self._constant, self._linear, self._quadratic)


def amount(value: float, metric: str) -> str:
    """A cost as text: "1.2e+06 macs", "3.5 ms"."""
    return f"{value:.6g} {UNITS.get(metric, metric)}"


def plain_amount(value: float, metric: str) -> str:
    """A cost for people, next to its metric's name: "1,234,567", "3.512 ms"."""
    return f"{value:,.3f} ms" if metric == "latency" else f"{value:,.0f}"


def formula(costs: Mapping[str, Cost], metric: str) -> Cost:
    """The cost of a metric; raises :class:`BudgetError` with the near miss for an unknown one."""
    if metric == "latency" and metric not in costs:
        raise BudgetError(
            "budget.metric: latency needs a table of this model (rlprune.latency.profile.with_latency)"
        )
    if metric not in costs:
        raise BudgetError(
            f"budget.metric: unknown metric {metric!r}{near_miss(metric, costs)}; allowed: {', '.join(costs)}"
        )
    return costs[metric]
