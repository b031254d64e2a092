"""Units ranked by the closed form's own error: greedy backward elimination, a structured Optimal Brain Surgeon.

A layer with input x and weights W (outputs O) is to be replaced by one that reads fewer units of x. With
``A = E[x x'] + lambda I`` and the least-squares weights for the columns that are left, removing the block
of columns B raises the squared error of the output by ``tr(W_B (H_BB)^-1 W_B')``, where ``H`` is the
inverse of A on those columns (Hassibi and Stork 1993, Optimal Brain Surgeon; blocks of columns: Kurtic et
al. 2023, ZipLM, arXiv 2302.04089). The cheapest unit goes, W and H are updated, and so on until none is
left. The order is nested: what width k keeps, width k + 1 keeps too. Where several layers read the units, a unit costs
the sum of what it costs in each of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ..utils.arrays import Floats, Ints
from .prefixes import penalised

# Removals whose updates of the two big matrices are applied together, as one matrix product.
_LAZY = 64


@dataclass(frozen=True)
class Elimination:
    """The order in which a group's units go, and what that costs.

    ``order`` (units,) lists the units, the first one removed first. ``errors`` (units,) is the squared
    error of the consumers' output (mean over tokens, summed over outputs, the ridge's penalty included)
    after each removal; ``energy`` that of an output of zeros, so ``errors[-1]`` is ``energy`` too where the consumers
    read nothing but these units.

    Of a group with lanes ``order`` lists those of one lane after the other, and an error is the sum over the lanes when
    each of them has lost as many units.
    """

    order: Ints = field(repr=False)
    errors: Floats = field(repr=False)
    energy: float
    lanes: int = 1

    @property
    def ranks(self) -> Floats:
        """Score of each unit (units,): 0 for the one that goes first."""
        ranks = np.empty(len(self.order))
        ranks[self.order] = np.tile(np.arange(len(self.errors)), self.lanes)
        return ranks

    def beside(self, other: Elimination) -> Elimination:
        """The elimination of this group and of one lane more."""
        order = np.concatenate([self.order, len(self.order) + other.order])
        return Elimination(order, self.errors + other.errors, self.energy + other.energy, self.lanes + 1)


def eliminate(product: Tensor, matrix: Tensor, columns: Ints, ridge: float) -> Elimination:
    """Remove one unit after another, each time the one that the others replace best.

    Only two (I, I) matrices are needed, H and the products ``P = V V'`` of the current weights' rows
    (one row an input): both follow a removal in closed form, so the weights themselves are never formed.

    Args:
        product: (I, I) Gram matrix of the input, or its covariance where an intercept is fitted.
        matrix: (I, O) weights, inputs first.
        columns: (units, columns of a unit) input columns of each unit.
        ridge: penalty, as a share of the mean of the product's diagonal.

    Raises:
        DataError: the Gram matrix cannot be inverted (activations that are not finite).
    """
    w = matrix.double()
    p = w @ w.T
    a, lower = penalised(product, ridge)
    energy = float(torch.dot(a.flatten(), p.flatten()))
    del a
    both = [torch.cholesky_inverse(lower), p]
    del lower, p  # every (I, I) matrix in float64 is as large as two layers of the model
    return eliminate_units([reader(both, np.arange(len(columns)), columns)], len(columns), energy)


def eliminate_units(
    readers: Sequence[Reader], units: int, energy: float | None = None, order: Ints | None = None
) -> Elimination:
    """Remove all of the ``units`` of a group that one or more layers read, the cheapest one first.

    ``energy``: see :class:`Elimination`; the last error where it is not given. ``order`` (units,): the order in which
    they go, where another ranking decides. The readers are used up.
    """
    gone = torch.zeros(units, dtype=torch.bool)
    went: list[int] = []
    errors: list[float] = []
    for turn in range(units):
        costs = torch.zeros(units, dtype=torch.float64)
        for one in readers:
            one.add_costs(costs)
        costs.masked_fill_(gone, torch.inf)
        unit = int(costs.argmin()) if order is None else int(order[turn])
        went.append(unit)
        errors.append(max(float(costs[unit]), 0.0))
        gone[unit] = True
        for one in readers:
            one.remove(unit)
    total = np.cumsum(errors)
    return Elimination(np.array(went, dtype=np.int64), total, float(total[-1]) if energy is None else energy)


class Reader(ABC):
    """A layer that reads units of a group: what each unit that is left costs it, brought up to date as units go."""

    @abstractmethod
    def add_costs(self, costs: Tensor) -> None:
        """Add what taking each unit away costs to ``costs`` (units,), on the CPU; those that are gone may get anything
        finite."""

    @abstractmethod
    def remove(self, unit: int) -> None:
        """A unit goes, and the others take over what they can."""


class Alone(Reader):
    """A layer in which no unit stands in for another one: ``errors`` (units,) is what each costs."""

    def __init__(self, errors: Tensor) -> None:
        self._errors = errors.double().cpu()

    def add_costs(self, costs: Tensor) -> None:
        costs += self._errors

    def remove(self, unit: int) -> None:
        pass


def reader(both: list[Tensor], units: Ints, columns: Ints) -> Reader:
    """A layer whose H and P (I, I) are taken out of ``both``, so that nobody else holds them.

    Args:
        units: numbers (n,) of the units of the group that it reads.
        columns: (n, columns of a unit) input columns of each of them. Other columns stay and stand in for them.
    """
    return (_Columns if columns.shape[1] == 1 else _Blocks)(both, units, columns)


class _Columns(Reader):
    """Units of one column: H and P are brought up to date every ``_LAZY`` removals only.

    Between two updates ``H = h - U U'`` and ``P = p - U Q' - Q U' + U D U'``; one step reads one column
    of each, so it costs O(I * _LAZY) instead of O(I^2).
    """

    def __init__(self, both: list[Tensor], units: Ints, columns: Ints) -> None:
        p, h = both.pop(), both.pop()
        flat = torch.from_numpy(columns[:, 0].copy()).to(h.device)
        self._h = h[flat[:, None], flat]
        del h
        self._p = p[flat[:, None], flat]
        del p
        self._alive = torch.from_numpy(units.copy())
        self._begin()

    def _begin(self) -> None:
        """Start a bundle of updates."""
        count = len(self._alive)
        steps = min(_LAZY, count)
        self._u, self._q = self._h.new_zeros(count, steps), self._h.new_zeros(count, steps)
        self._d = self._h.new_zeros(steps)
        self._own, self._norm = self._h.diagonal().clone(), self._p.diagonal().clone()
        self._left = torch.ones(count, dtype=torch.bool, device=self._h.device)
        self._place = {int(unit): i for i, unit in enumerate(self._alive)}
        self._t = 0

    def add_costs(self, costs: Tensor) -> None:
        saliency = (self._norm / self._own).masked_fill_(~self._left, 0.0)
        costs.index_add_(0, self._alive, saliency.cpu())

    def remove(self, unit: int) -> None:
        j = self._place.get(unit)
        if j is None:  # not one of its units
            return
        t, u, q, d = self._t, self._u, self._q, self._d
        self._left[j] = False
        uj, qj = u[j, :t], q[j, :t]
        root = self._own[j].sqrt()
        cu = (self._h[:, j] - u[:, :t] @ uj) / root
        cq = (self._p[:, j] - u[:, :t] @ (qj - d[:t] * uj) - q[:, :t] @ uj) / root
        d[t] = self._norm[j] / self._own[j]
        u[:, t], q[:, t] = cu, cq
        self._own = self._own - cu * cu
        self._norm = self._norm - 2 * cu * cq + d[t] * cu * cu
        self._t += 1
        if self._t == u.shape[1]:
            self._finish()

    def _finish(self) -> None:
        """Apply a bundle of updates to what is left."""
        stay = self._left.nonzero()[:, 0]
        u, q = self._u[stay], self._q[stay]
        self._h = self._h[stay[:, None], stay].addmm_(u, u.T, alpha=-1)
        mixed = u @ (q - 0.5 * self._d * u).T
        self._p = self._p[stay[:, None], stay].sub_(mixed).sub_(mixed.T)
        self._alive = self._alive[stay.cpu()]
        self._begin()


class _Blocks(Reader):
    """Units of several columns, few of them: every removal updates both matrices."""

    def __init__(self, both: list[Tensor], units: Ints, columns: Ints) -> None:
        p, h = both.pop(), both.pop()
        index = torch.from_numpy(columns.reshape(-1).copy()).to(h.device)
        self._h, self._p = h[index][:, index], p[index][:, index]
        self._size, self._alive = columns.shape[1], units.tolist()

    def _spots(self) -> list[slice]:
        return [slice(i * self._size, (i + 1) * self._size) for i in range(len(self._alive))]

    def add_costs(self, costs: Tensor) -> None:
        if not self._alive:
            return
        spots = self._spots()
        own = torch.stack([self._h[s, s] for s in spots])
        rows = torch.stack([self._p[s, s] for s in spots])
        saliency = torch.linalg.solve(own, rows).diagonal(dim1=1, dim2=2).sum(dim=1)
        costs.index_add_(0, torch.tensor(self._alive), saliency.cpu())

    def remove(self, unit: int) -> None:
        if unit not in self._alive:
            return
        h, p, j = self._h, self._p, self._alive.index(unit)
        spots = self._spots()
        gone = spots.pop(j)
        del self._alive[j]
        index = torch.arange(len(h), device=h.device)
        stay = torch.cat([index[s] for s in spots] or [index[:0]])
        own, rows = h[gone, gone], p[gone, gone]
        c = torch.linalg.solve(own, h[gone][:, stay]).T  # H_SB (H_BB)^-1
        cross = c @ p[gone][:, stay]
        self._h = h[stay][:, stay] - c @ h[gone][:, stay]
        self._p = p[stay][:, stay] - cross - cross.T + c @ rows @ c.T
