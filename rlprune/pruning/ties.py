"""Groups of one width: what a runtime that knows a single number for all blocks makes of a space.

Each group keeps its own units, by its own ranking; only how many is shared. A projection works on the sets of such
groups as if each were one group (`budget.project`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike

from ..utils.arrays import Floats, Ints
from .cost import Cost

Ties = tuple[tuple[int, ...], ...]
"""Sets of groups, by their numbers, that have one width."""


def classes(ties: Ties, groups: int) -> Ints:
    """The class of each group, (G,), numbered by their first groups; a group without a tie is one by itself."""
    first = np.arange(groups)
    for tie in ties:
        first[list(tie)] = min(tie)
    found: Ints = np.unique(first, return_inverse=True)[1].astype(np.int64)
    return found


@dataclass(frozen=True)
class Tied(Cost):
    """A cost as a function of one width a class, (T,) or (N, T); ``of_group`` (G,) is the class of each group."""

    cost: Cost
    of_group: Ints

    @cached_property
    def _firsts(self) -> Ints:
        firsts: Ints = np.unique(self.of_group, return_index=True)[1].astype(np.int64)
        return firsts

    def first(self, values: Ints) -> Ints:
        """The value of each class's first group: (G,) -> (T,)."""
        return values[..., self._firsts]

    def mean(self, values: Floats) -> Floats:
        """Means over the groups of each class: (..., G) -> (..., T)."""
        means: Floats = self._sum(values) / np.bincount(self.of_group)
        return means

    def whole(self, values: ArrayLike) -> Ints:
        """One value a group: (..., T) -> (..., G)."""
        every: Ints = np.asarray(values)[..., self.of_group]
        return every

    def _sum(self, values: Floats) -> Floats:
        """Sums over the groups of each class: (..., G) -> (..., T)."""
        sums: Floats = values @ (self.of_group[:, None] == np.arange(len(self._firsts)))
        return sums

    def __call__(self, widths: ArrayLike) -> Floats:
        return self.cost(self.whole(widths))

    def increase(self, widths: Floats, steps: Floats) -> Floats:
        """Cost added by widening all groups of one class at a time; shapes (..., T), (..., T) -> (..., T)."""
        before, added = self(widths), np.empty(np.broadcast_shapes(widths.shape, steps.shape))
        for index in range(len(self._firsts)):
            wider = np.array(widths, dtype=np.float64)
            wider[..., index] += steps[..., index]
            added[..., index] = self(wider) - before
        return added

    def unit_costs(self, widths: Floats) -> Floats:
        """Cost of one unit of all groups of a class; (..., T) -> (..., T)."""
        return self._sum(self.cost.unit_costs(self.whole(widths).astype(np.float64)))

    def root(self, start: Floats, end: Floats, target: float) -> Floats:
        """As `Cost.root`, of the cost that the classes stand for."""
        return self.cost.root(
            self.whole(start).astype(np.float64), self.whole(end).astype(np.float64), target
        )
