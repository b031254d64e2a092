"""The widths under a budget at which a sum of curves, one a group, is least: a knapsack with costs that interact.

A model's MACs are a quadratic form of the widths, so what a cut saves depends on the other cuts, and no order of the
cuts is right for all budgets. Here a greedy descent along the curves' convex hulls meets the budget (Everett 1963,
generalized Lagrange multipliers, with each cut's saving at the widths that are left), and exchanges improve the plan:
one group goes to another of its allowed widths, and a second one becomes as wide as the budget then allows. Costs are
exact everywhere. What comes out cannot be improved by changing one group or any two (among the widths that are tried);
for three and more that is not shown, so a few other starts are tried as well. Pairs of groups grow with the square of
their number, so that deep models are given fewer widths and no other starts: seconds for a DenseNet-121.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..utils.arrays import Floats, Ints
from .budget import Limits
from .cost import Cost, formula
from .space import PruningSpace
from .ties import classes

# Widths of a group that an exchange tries at most; of more, those near its own and ever fewer further away. With more
# groups than _MANY in proportion fewer, and with twice as many a single start.
_MOST_LEVELS, _LEAST_LEVELS = 96, 8
_MANY = 25
# What counts as an improvement, as a share of the sum.
_GAIN = 1e-9


def least_sum(space: PruningSpace, curves: Mapping[int, Floats], target: float, metric: str) -> Ints:
    """Widths (G,) within an absolute cost at which the sum of ``curves`` is small, and no step more fits.

    Args:
        curves: {group: (width + 1,)}, the value when 0, 1, ..., all units are gone; taken as rising. Groups without one
            stay as wide as they are.

    Where the groups with curves cannot meet the target all of them are at their minimum.
    """
    problem = _Problem(space, curves, target, metric)
    descended = problem.descended()
    if problem.cost(descended) > target:
        return descended
    # Exchanges may end in different places: the best of several starts is taken.
    starts = [descended, *(problem.spread() if len(problem.members) <= 2 * _MANY else ())]
    return min((problem.improved(start) for start in starts), key=problem.total)


class _Problem:
    """Classes of groups that have one width, their allowed widths (the widest first), and the value at each."""

    def __init__(self, space: PruningSpace, curves: Mapping[int, Floats], target: float, metric: str) -> None:
        self.space, self.target, self.metric = space, target, metric
        self.cost: Cost = formula(space.costs, metric)
        of_group = classes(space.ties, len(space.groups))
        known = [np.flatnonzero(of_group == k) for k in np.unique(of_group)]
        self.members = [m for m in known if all(int(g) in curves for g in m)]
        self.levels = [_allowed(space, int(m[0])) for m in self.members]
        self.most = max(_LEAST_LEVELS, _MOST_LEVELS * _MANY // max(_MANY, len(self.members)))
        self.values: list[Floats] = []
        for group, levels in zip(self.members, self.levels, strict=True):
            cut = space.widths[group[0]] - levels
            rising = [np.maximum.accumulate(np.asarray(curves[int(g)], dtype=np.float64))[cut] for g in group]
            self.values.append(np.sum(rising, axis=0))

    def total(self, widths: Ints) -> float:
        return float(sum(self.values[k][self.at(widths, k)] for k in range(len(self.members))))

    def at(self, widths: Ints, k: int) -> int:
        """The number of a class's level."""
        return int(np.flatnonzero(self.levels[k] == widths[self.members[k][0]])[0])

    def descended(self) -> Ints:
        """From the dense widths along the hulls, the cheapest cut for what it saves first, until the target is met."""
        widths = self.space.widths.copy()
        corners = [_corners(levels, values) for levels, values in zip(self.levels, self.values, strict=True)]
        place = np.zeros(len(corners), dtype=np.int64)
        cost = float(self.cost(widths))
        while cost > self.target:
            left = [k for k in range(len(corners)) if place[k] + 1 < len(corners[k])]
            if not left:
                return widths
            rows = np.repeat(widths[None], len(left), axis=0)
            added = np.empty(len(left))
            for row, k in enumerate(left):
                here, there = corners[k][place[k]], corners[k][place[k] + 1]
                rows[row, self.members[k]] = self.levels[k][there]
                added[row] = self.values[k][there] - self.values[k][here]
            costs = self.cost(rows)
            saved = cost - costs
            # What saves nothing at these widths may be what other cuts wait for: it goes last.
            rates = np.where(saved > 0, added / np.where(saved > 0, saved, 1.0), np.inf)
            pick = int(rates.argmin())
            place[left[pick]] += 1
            widths, cost = rows[pick], float(costs[pick])
        return self.filled(widths)

    def spread(self) -> list[Ints]:
        """Plans that share the cut out otherwise: evenly, and mainly to the first and to the last of the classes."""
        depth = np.zeros(len(self.space.groups))
        movable = np.zeros(len(depth), dtype=bool)
        for k, members in enumerate(self.members):
            depth[members], movable[members] = k / max(1, len(self.members) - 1), True
        limits = Limits(
            self.space.widths,
            np.where(movable, self.space.minimums, self.space.widths),
            self.space.steps,
        )
        shares = np.stack([np.ones_like(depth), 1.1 - depth, 0.1 + depth]) * movable
        return list(self.space.project_cost(shares, self.target, self.metric, limits))

    def improved(self, widths: Ints) -> Ints:
        """Exchanges until none helps."""
        while True:
            before = self.total(widths)
            for k in range(len(self.members)):
                widths = self.exchanged(widths, k)
            if self.total(widths) >= before - _GAIN * max(before, 1e-12):
                return self.filled(widths)

    def filled(self, widths: Ints) -> Ints:
        """Steps that still fit, the one that gains most first."""
        while True:
            best, found = -1.0, None
            for k, members in enumerate(self.members):
                at = self.at(widths, k)
                if at == 0:
                    continue
                wider = widths.copy()
                wider[members] = self.levels[k][at - 1]
                gain = float(self.values[k][at] - self.values[k][at - 1])
                if gain > best and float(self.cost(wider)) <= self.target:
                    best, found = gain, wider
            if found is None:
                return widths
            widths = found

    def exchanged(self, widths: Ints, k: int) -> Ints:
        """The best plan that differs from ``widths`` in class k and at most one other; itself if none is better."""
        tried = _near(len(self.levels[k]), self.at(widths, k), self.most)
        rows = np.repeat(widths[None], len(tried), axis=0)
        rows[:, self.members[k]] = self.levels[k][tried][:, None]
        own = self.values[k][tried]
        best, found = self.total(widths), widths
        least = best - _GAIN * max(best, 1e-12)
        others = best - float(self.values[k][self.at(widths, k)])
        for h in range(len(self.members)):
            if h == k:
                continue
            at, fits = self._widest(rows, h)
            totals = own + others - self.values[h][self.at(widths, h)] + self.values[h][at]
            totals[~fits] = np.inf
            pick = int(totals.argmin())
            if totals[pick] < least:
                least, found = float(totals[pick]), rows[pick].copy()
                found[self.members[h]] = self.levels[h][at[pick]]
        return found

    def _widest(self, rows: Ints, h: int) -> tuple[Ints, np.ndarray]:
        """The widest level of class h with which each of the rows (N, G) meets the target, and whether any does."""
        low = np.zeros(len(rows), dtype=np.int64)
        high = np.full(len(rows), len(self.levels[h]) - 1)
        rows = rows.copy()

        def meets(at: Ints) -> np.ndarray:
            rows[:, self.members[h]] = self.levels[h][at][:, None]
            return np.asarray(self.cost(rows) <= self.target)

        fits = meets(high)
        while (low < high).any():
            middle = (low + high) // 2
            enough = meets(middle)
            high, low = np.where(enough, middle, high), np.where(enough, low, np.minimum(middle + 1, high))
        return high, fits


def _allowed(space: PruningSpace, group: int) -> Ints:
    """The widths that a group may have, the widest first."""
    dense, least, step = (int(v[group]) for v in (space.widths, space.minimums, space.steps))
    steps = np.arange(least, dense + 1)
    allowed: Ints = steps[(steps % step == 0) | (steps == least) | (steps == dense)][::-1]
    return allowed


def _near(count: int, at: int, most: int) -> Ints:
    """Numbers of the levels that are tried from one of ``count``: all, or the nearest and ever fewer further away."""
    if count <= most:
        return np.arange(count)
    ahead = np.unique(np.round(np.geomspace(1, count, most // 2)).astype(np.int64))
    tried = np.concatenate([at - ahead, [at], at + ahead])
    return np.unique(tried[(tried >= 0) & (tried < count)])


def _corners(levels: Ints, values: Floats) -> list[int]:
    """Numbers of the levels at the corners of the lower convex hull of the values over the widths."""
    corners = [0]
    for new in range(1, len(levels)):
        while len(corners) > 1 and _slope(levels, values, corners[-2], corners[-1]) >= _slope(
            levels, values, corners[-1], new
        ):
            corners.pop()
        corners.append(new)
    return corners


def _slope(levels: Ints, values: Floats, a: int, b: int) -> float:
    return float((values[b] - values[a]) / (levels[a] - levels[b]))
