"""Budgets, and the exact projection of a distribution onto one (DESIGN: contract 3)."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from ..errors import BudgetError
from ..utils.arrays import Floats, Ints
from .cost import Cost, amount
from .ties import Tied, Ties, classes

_SUFFIX = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
_NUMBER = re.compile(r"^\s*([0-9]*\.?[0-9]+(?:e[+-]?[0-9]+)?)\s*(%|[kmgt]?)\s*$", re.IGNORECASE)
_FORMS = 'a ratio above 0 and up to 1 (0.5, "50%") or an absolute number ("150M")'
_TIME = re.compile(r"^\s*([0-9]*\.?[0-9]+(?:e[+-]?[0-9]+)?)\s*(%|ms|)\s*$", re.IGNORECASE)
_TIME_FORMS = 'a ratio above 0 and up to 1 (0.5, "50%") or milliseconds ("3.5ms")'
# Two floats closer than this, in units, are the same width: the root of the quadratic carries rounding.
_TOLERANCE = 1e-7
# A group that is asked for less than this share of the largest is treated as asked for this share.
_SMALLEST_SHARE = 1e-12


@dataclass(frozen=True)
class Budget:
    """A target on a cost: ``ratio`` of the dense cost, or an ``absolute`` cost."""

    kind: str
    value: float

    def target(self, dense: float) -> float:
        """The absolute cost allowed, given the dense cost."""
        return self.value * dense if self.kind == "ratio" else self.value


BudgetLike = Budget | float | str | np.integer | np.floating
"""A budget as users give it: 0.5, "50%", "150M", for latency "3.5ms"."""


def parse_budget(value: BudgetLike, metric: str = "macs") -> Budget:
    """Read ``0.5``, ``"50%"`` or ``"150M"`` (for latency ``"3.5ms"``); raises :class:`BudgetError` for anything else.

    A number up to 1 is a ratio. Counts: a number of 1,000 and more, or one with a suffix K, M, G or T, is
    absolute; what lies between (1.5, 80) is refused because it could be a mistyped ratio. Latency: a number
    above 1, or one with the suffix ms, is milliseconds.
    """
    if isinstance(value, Budget):
        return value
    timed = metric == "latency"
    experiment = BudgetError(
        f"budget: {value!r} is not a budget; allowed: {_TIME_FORMS if timed else _FORMS}"
    )
    if isinstance(value, bool) or not isinstance(value, (int, float, str, np.integer, np.floating)):
        raise experiment
    match = (_TIME if timed else _NUMBER).match(str(value))
    if match is None:
        raise experiment
    number, suffix = float(match.group(1)), match.group(2).lower()
    if suffix == "%":
        number, suffix = number / 100.0, ""
        if number > 1.0:
            raise experiment
    number *= 1.0 if timed else _SUFFIX[suffix]
    if not math.isfinite(number) or number <= 0.0:
        raise experiment
    if number <= 1.0 and not suffix:
        return Budget("ratio", number)
    if number < 1000.0 and not timed:
        raise experiment
    return Budget("absolute", number)


@dataclass(frozen=True)
class Limits:
    """What may be cut: dense widths, minimum widths and steps, all in units, each of shape (G,)."""

    dense: Ints
    minimum: Ints
    step: Ints

    def floor(self, widths: Floats, tolerance: float = _TOLERANCE) -> Ints:
        """The nearest allowed widths below: multiples of the step, the minimum, or the dense width."""
        kept = np.floor((widths + tolerance) / self.step).astype(np.int64) * self.step
        kept = np.where(widths >= self.dense - tolerance, self.dense, kept)
        allowed: Ints = np.maximum(kept, self.minimum)
        return allowed

    def above(self, widths: Ints) -> Ints:
        """The next allowed widths above (the dense width at most)."""
        wider: Ints = np.minimum((widths // self.step + 1) * self.step, self.dense)
        return wider

    def below(self, widths: Ints) -> Ints:
        """The next allowed widths below (the minimum at least)."""
        narrower: Ints = np.maximum((widths - 1) // self.step * self.step, self.minimum)
        return narrower


def project(
    distribution: ArrayLike,
    target: float,
    cost: Cost,
    limits: Limits,
    *,
    metric: str = "macs",
    ties: Ties = (),
) -> Ints:
    """Widths whose cost is at most ``target`` and to which no step can be added.

    Args:
        distribution: shape (G,) or (N, G); non-negative, finite, not all zero. Group g gives up the
            share ``min(s_max_g, lambda * distribution_g)`` of its units.
        target: absolute cost allowed.
        ties: sets of groups that have one width; each of them gives up what the mean of its numbers asks for, and a
            step is one of all of its groups.

    Returns:
        int64 widths of the shape of ``distribution``.

    Raises:
        BudgetError: malformed distribution, or a target outside of the feasible range (which is named).
    """
    shares = _checked(distribution, len(limits.dense))
    if ties:
        of_group = classes(ties, len(limits.dense))
        tied = Tied(cost, of_group)
        own = Limits(*(tied.first(values) for values in (limits.dense, limits.minimum, limits.step)))
        found: Ints = tied.whole(project(tied.mean(shares), target, tied, own, metric=metric))
        return found
    dense_cost, lowest = float(cost(limits.dense)), float(cost(limits.minimum))
    if target < lowest or target > dense_cost:
        side = "below the feasible minimum" if target < lowest else "above the dense model"
        raise BudgetError(
            f"budget: {amount(target, metric)} is {side}; feasible: {lowest:.6g} to {amount(dense_cost, metric)} "
            f"(ratio {lowest / dense_cost:.4f} to 1)"
        )
    rows = np.atleast_2d(shares)
    wanted = _spread(rows, target, cost, limits)
    widths = limits.floor(wanted)
    over = cost(widths) > target
    if over.any():
        widths[over] = limits.floor(wanted[over], tolerance=0.0)
    _take_back(widths, rows, target, cost, limits)
    _give_back(widths, wanted, target, cost, limits)
    return widths.reshape(shares.shape)


def _checked(distribution: ArrayLike, groups: int) -> Floats:
    try:
        shares = np.array(distribution, dtype=np.float64)
    except (TypeError, ValueError):
        raise BudgetError("distribution: not an array of numbers") from None
    if shares.ndim not in (1, 2) or shares.shape[-1] != groups:
        raise BudgetError(
            f"distribution: shape {shares.shape} does not fit; allowed: ({groups},) or (N, {groups})"
        )
    if not np.isfinite(shares).all():
        raise BudgetError("distribution: holds NaN or infinity; allowed: finite numbers of 0 and more")
    if (shares < 0).any():
        raise BudgetError("distribution: holds a negative number; allowed: finite numbers of 0 and more")
    peak = shares.max(axis=-1, keepdims=True)
    if shares.size and (peak == 0).any():
        raise BudgetError("distribution: all zero; at least one group must be above 0")
    # Only the proportions count; scaled so that no product overflows.
    shares = shares / np.where(peak > 0, peak, 1.0)
    return np.where(shares > 0, np.maximum(shares, _SMALLEST_SHARE), 0.0)


def _spread(shares: Floats, target: float, cost: Cost, limits: Limits) -> Floats:
    """Real-valued widths (N, G) that meet the target: bisection over the kinks of cost(lambda), then its root.

    Between two neighbouring kinks (a group reaching its limit) the widths are linear in lambda, so the last
    step is the root of the cost along a straight line: a formula knows it in closed form.
    """
    dense = limits.dense.astype(np.float64)
    # A part that an earlier stage dropped has no width left to share out.
    most = 1.0 - limits.minimum / np.maximum(dense, 1.0)
    with np.errstate(divide="ignore"):
        kinks = np.where(shares > 0, most / np.where(shares > 0, shares, 1.0), 0.0)
    kinks = np.concatenate([np.zeros((len(shares), 1)), np.sort(kinks, axis=1)], axis=1)

    def widths_at(scale: Floats) -> Floats:
        return dense * (1.0 - np.minimum(most, scale[:, None] * shares))

    rows = np.arange(len(shares))
    low = np.zeros(len(shares), dtype=np.int64)  # cost above the target here, or the dense start
    high = np.full(len(shares), kinks.shape[1] - 1)
    while (high - low > 1).any():
        middle = (low + high) // 2
        above = cost(widths_at(kinks[rows, middle])) > target
        low, high = np.where(above, middle, low), np.where(above, high, middle)
    start, end = widths_at(kinks[rows, low]), widths_at(kinks[rows, high])
    # Every asked group at its limit and still above the target: the others give in proportion to what they can.
    rest = cost(end) > target
    start = np.where(rest[:, None], end, start)
    end = np.where(rest[:, None], limits.minimum.astype(np.float64), end)
    return start + cost.root(start, end, target)[:, None] * (end - start)


def _take_back(widths: Ints, shares: Floats, target: float, cost: Cost, limits: Limits) -> None:
    """Take single steps from rows above the target, largest share first, ties by index; in place.

    Only the rounding of the root leaves a row above it, by a part of a step.
    """
    over = np.flatnonzero(cost(widths) > target)
    # A row at its minimum stays: the cost of many rows may round otherwise than that of one, which met the target.
    while len(over := over[(widths[over] > limits.minimum).any(axis=1)]):
        w = widths[over]
        chosen = np.where(w > limits.minimum, shares[over], -np.inf).argmax(axis=1)
        pick = np.arange(len(over)), chosen
        widths[over, chosen] = limits.below(w)[pick]
        over = over[cost(widths[over]) > target]


def _give_back(widths: Ints, wanted: Floats, target: float, cost: Cost, limits: Limits) -> None:
    """Add single steps, largest remainder first, ties by index, until no step fits; in place, all rows at once."""
    open_rows = np.arange(len(widths))
    # Rounded, so that equal remainders are equal in floats too and the tie goes to the lower index.
    remainder = np.round((wanted - widths) / limits.step, 9)
    spent = cost(widths)
    # The increase and the cost may differ by a rounding; the cost decides, and what it refused is not asked again.
    refused = np.zeros(widths.shape, dtype=bool)
    while len(open_rows):
        w = widths[open_rows]
        add = limits.above(w) - w
        increase = cost.increase(w.astype(np.float64), add.astype(np.float64))
        fits = (add > 0) & ~refused[open_rows] & (increase <= (target - spent[open_rows])[:, None])
        alive = fits.any(axis=1)
        open_rows, fits, add = open_rows[alive], fits[alive], add[alive]
        chosen = np.where(fits, remainder[open_rows], -np.inf).argmax(axis=1)
        wider = widths[open_rows]
        wider[np.arange(len(open_rows)), chosen] += add[np.arange(len(open_rows)), chosen]
        costs = cost(wider)
        taken = costs <= target
        refused[open_rows[~taken], chosen[~taken]] = True
        rows, groups = open_rows[taken], chosen[taken]
        widths[rows], spent[rows] = wider[taken], costs[taken]
        remainder[rows, groups] -= 1.0
