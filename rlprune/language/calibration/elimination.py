"""Units ranked by the closed form's own error: greedy backward elimination, a structured Optimal Brain Surgeon.

A layer with input x and weights W (outputs O) is to be replaced by one that reads fewer units of x. With
``A = E[x x'] + lambda I`` and the least-squares weights for the columns that are left, removing the block
of columns B raises the squared error of the output by ``tr(W_B (H_BB)^-1 W_B')``, where ``H`` is the
inverse of A on those columns (Hassibi and Stork 1993, Optimal Brain Surgeon; blocks of columns: Kurtic et
al. 2023, ZipLM, arXiv 2302.04089). The cheapest unit goes, W and H are updated, and so on until none is
left. The order is nested: what width k keeps, width k + 1 keeps too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from ...pruning.space import PruningSpace
from ...recovery.prefixes import penalised
from ...utils.arrays import Floats, Ints
from .grams import Consumer, GramSource, InputGram, group_consumers

# Removals whose updates of the two big matrices are applied together, as one matrix product.
_LAZY = 64


@dataclass(frozen=True)
class Elimination:
    """The order in which a group's units go, and what that costs.

    ``order`` (units,) lists the units, the first one removed first. ``errors`` (units,) is the squared
    error of the consumer's output (mean over tokens, summed over outputs, the ridge's penalty included)
    after each removal; ``energy`` that of an output of zeros, so ``errors[-1]`` is ``energy`` too.

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
    h = torch.cholesky_inverse(lower)
    del lower  # every (I, I) matrix in float64 is as large as two layers of the model
    if columns.shape[1] == 1:
        flat = torch.from_numpy(columns[:, 0].copy()).to(h.device)
        h = h[flat[:, None], flat]
        p = p[flat[:, None], flat]
        both = [h, p]
        del h, p
        order, errors = _columns(both)
    else:
        order, errors = _blocks(h, p, columns)
    return Elimination(order, np.cumsum(errors), energy)


def _columns(both: list[Tensor]) -> tuple[Ints, list[float]]:
    """Units of one column: H and P, taken out of ``both``, are brought up to date every ``_LAZY`` removals only.

    Between two updates ``H = h - U U'`` and ``P = p - U Q' - Q U' + U D U'``; one step reads one column
    of each, so it costs O(I * _LAZY) instead of O(I^2).
    """
    p, h = both.pop(), both.pop()
    alive = torch.arange(len(h), device=h.device)
    order: list[int] = []
    errors: list[float] = []
    while len(alive):
        steps = min(_LAZY, len(alive))
        u, q = h.new_zeros(len(alive), steps), h.new_zeros(len(alive), steps)
        d = h.new_zeros(steps)
        own, norm = h.diagonal().clone(), p.diagonal().clone()
        left = torch.ones(len(alive), dtype=torch.bool, device=h.device)
        for t in range(steps):
            saliency = (norm / own).masked_fill_(~left, torch.inf)
            j = int(saliency.argmin())
            errors.append(max(float(saliency[j]), 0.0))
            order.append(int(alive[j]))
            left[j] = False
            uj, qj = u[j, :t], q[j, :t]
            root = own[j].sqrt()
            cu = (h[:, j] - u[:, :t] @ uj) / root
            cq = (p[:, j] - u[:, :t] @ (qj - d[:t] * uj) - q[:, :t] @ uj) / root
            d[t] = norm[j] / own[j]
            u[:, t], q[:, t] = cu, cq
            own = own - cu * cu
            norm = norm - 2 * cu * cq + d[t] * cu * cu
        stay = left.nonzero()[:, 0]
        u, q = u[stay], q[stay]
        h = h[stay[:, None], stay].addmm_(u, u.T, alpha=-1)
        mixed = u @ (q - 0.5 * d * u).T
        p = p[stay[:, None], stay].sub_(mixed).sub_(mixed.T)
        alive = alive[stay]
    return np.array(order, dtype=np.int64), errors


def _blocks(h: Tensor, p: Tensor, columns: Ints) -> tuple[Ints, list[float]]:
    """Units of several columns, few of them: every removal updates both matrices."""
    size = columns.shape[1]
    index = torch.from_numpy(columns.reshape(-1).copy()).to(h.device)
    h, p = h[index][:, index], p[index][:, index]
    alive = list(range(len(columns)))
    order: list[int] = []
    errors: list[float] = []
    while alive:
        count = len(alive)
        spots = [slice(i * size, (i + 1) * size) for i in range(count)]
        own = torch.stack([h[s, s] for s in spots])
        rows = torch.stack([p[s, s] for s in spots])
        saliency = torch.linalg.solve(own, rows).diagonal(dim1=1, dim2=2).sum(dim=1)
        j = int(saliency.argmin())
        errors.append(max(float(saliency[j]), 0.0))
        order.append(alive.pop(j))
        gone = spots[j]
        stay = torch.cat(
            [torch.arange(s.start, s.stop, device=h.device) for s in spots if s != gone] or [index[:0]]
        )
        c = torch.linalg.solve(own[j], h[gone][:, stay]).T  # H_SB (H_BB)^-1
        cross = c @ p[gone][:, stay]
        h = h[stay][:, stay] - c @ h[gone][:, stay]
        p = p[stay][:, stay] - cross - cross.T + c @ rows[j] @ c.T
    return np.array(order, dtype=np.int64), errors


Ranked = Callable[[Consumer, InputGram, Floats], None]
"""Is told of every consumer, its Gram matrix and its units' scores, while the matrix is there."""


def eliminations(
    model: nn.Module, space: PruningSpace, grams: GramSource, ridge: float = 1e-3, then: Ranked | None = None
) -> dict[int, Elimination]:
    """The :class:`Elimination` of each group (by index) of a language model, from its consumers' Gram matrices.

    A layer with a bias is judged with the intercept that its reconstruction will get. The hidden size has
    no single consumer and is left out.
    """
    found: dict[int, Elimination] = {}
    with torch.no_grad():
        for consumer, gram in grams.each(group_consumers(space, "prune.importance: 'obs'")):
            product = gram.centred() if consumer.has_bias(model) else gram.product
            one = eliminate(product, consumer.matrix(model), consumer.columns, gram.ridge(ridge))
            note_elimination(found, consumer, one)
            if then is not None:
                then(consumer, gram, one.ranks)
            del gram, product  # before the next block's are made
    return found


def note_elimination(found: dict[int, Elimination], consumer: Consumer, one: Elimination) -> None:
    """Add a consumer's elimination to those of the groups."""
    before = found.get(consumer.group)
    found[consumer.group] = one if before is None else before.beside(one)
