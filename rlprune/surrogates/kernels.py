"""Matern 2.5 kernels over the logarithms of keep ratios, and the gradients of what is fitted to them.

Two kernels make up every process of this package: a sum of one kernel a group, and one kernel over all groups with a
length a group. Written down as they are, both need the gaps of all pairs of plans in all groups, K x P x G numbers, at
every call. Neither is computed like that here:

- the one over all groups needs distances only, which are a product of matrices, and so is the gradient by the lengths;
- in the sum, plans share widths: what a group does is computed once a distinct value of it (`Levels`), and summed by
  look-up; groups that never move are one row for all plans together.

Shape legend: K known plans, P other plans, G groups, M distinct values over all groups. Everything is float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

_ROOT5 = 5.0**0.5
# Numbers that are worked on at once: what stays in a core's own cache.
_BLOCK = 2**17


@dataclass(frozen=True)
class Levels:
    """The distinct values of each group over P plans.

    Of the S groups in which no two plans differ: ``still`` (S,) which they are, ``still_values`` (S,). Of the others:
    ``values`` (M,), group after group, each ascending. ``group`` (M,): whose they are. ``index`` (P, G - S): where each
    plan's values stand in them. ``first`` (G - S + 1,): where each group's begin. ``plans`` ((G - S) P,): the plans by
    group and value, so that those of a value stand together; ``start`` (M,): where.
    """

    still: Tensor
    still_values: Tensor
    values: Tensor
    group: Tensor
    index: Tensor
    first: Tensor
    plans: Tensor
    start: Tensor

    @classmethod
    def of(cls, x: Tensor) -> Levels:
        """The levels of plans x (P, G)."""
        moves = (x != x[:1]).any(dim=0)
        still, moving = (~moves).nonzero()[:, 0], moves.nonzero()[:, 0]
        plans, groups = len(x), len(moving)
        ordered, order = x.T[moving].sort(dim=1)
        new = torch.ones(groups, plans, dtype=torch.bool)
        new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
        where = new.flatten().cumsum(0).reshape(groups, plans) - 1
        index = torch.empty(groups, plans, dtype=torch.int64).scatter_(1, order, where)
        counts = new.sum(dim=1)
        first = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
        group = torch.repeat_interleave(moving, counts)
        start = new.flatten().nonzero()[:, 0]
        return cls(
            still, x[0, still], ordered[new], group, index.T.contiguous(), first, order.flatten(), start
        )

    def blocks(self, width: int) -> Iterator[tuple[slice, slice]]:
        """Groups, and their values, in portions that make about `_BLOCK` numbers of rows of this width."""
        first = self.first.tolist()
        most, begin = max(1, _BLOCK // max(1, width)), 0
        for g in range(1, len(first)):
            if g == len(first) - 1 or first[g + 1] - first[begin] > most:
                yield slice(begin, g), slice(first[begin], first[g])
                begin = g


def additive(known: Tensor, levels: Levels, heights: Tensor, lengths: Tensor) -> Tensor:
    """Sum over the groups of height * Matern(gap / length): the plans of ``levels`` with known (K, G) -> (P, K)."""
    columns = known.T.contiguous()
    near = _matern(_scaled(columns, levels.still, levels.still_values, lengths))
    total = near.mul_(heights[levels.still, None]).sum(dim=0).repeat(len(levels.index), 1)
    for groups, rows in levels.blocks(len(known)):
        group = levels.group[rows]
        near = _matern(_scaled(columns, group, levels.values[rows], lengths)).mul_(heights[group, None])
        total += embedding_bag(levels.index[:, groups] - rows.start, near, mode="sum")
    return total


def additive_gradient(
    known: Tensor, levels: Levels, heights: Tensor, lengths: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients (G,), (G,) of sum(weights * additive) by the logarithms of heights and lengths; weights (P, K)."""
    by_height, by_length = torch.zeros_like(heights), torch.zeros_like(lengths)
    columns = known.T.contiguous()
    plans = len(levels.index)

    def add(group: Tensor, values: Tensor, weighed: Tensor) -> None:
        near = _scaled(columns, group, values, lengths)
        tails = near.neg().exp_().mul_(weighed)
        squares = near.square().div_(3.0).mul_(tails)
        # Of (1 + t + t^2 / 3) exp(-t), and of t^2 (1 + t) / 3 exp(-t), which is what the logarithm of a length moves.
        by_length.index_add_(0, group, torch.addcmul(squares, squares, near).sum(dim=1))
        by_height.index_add_(0, group, torch.addcmul(tails, tails, near).add_(squares).sum(dim=1))

    add(levels.still, levels.still_values, weights.sum(dim=0))
    for groups, rows in levels.blocks(len(known)):
        # What all plans of a value weigh, in one row.
        members = levels.plans[groups.start * plans : groups.stop * plans]
        weighed = embedding_bag(members, weights, levels.start[rows] - groups.start * plans, mode="sum")
        add(levels.group[rows], levels.values[rows], weighed)
    return by_height * heights, by_length * heights


def distances(a: Tensor, b: Tensor, lengths: Tensor) -> Tensor:
    """Distances (K, P) of plans a (K, G) and b (P, G), with a length (G,) a group."""
    # Around a common middle: products of small numbers lose least.
    middle = a.mean(dim=0)
    return torch.cdist((a - middle) / lengths, (b - middle) / lengths, compute_mode="use_mm_for_euclid_dist")


def matern(distance: Tensor) -> Tensor:
    """Matern 2.5 of distances in lengths, any shape."""
    return _matern(distance * _ROOT5)


def lengths_gradient(x: Tensor, lengths: Tensor, distance: Tensor, weights: Tensor) -> Tensor:
    """Gradient (G,) of sum(weights * matern(distance)) by the logarithms of the lengths; all of plans x (P, G).

    Every length moves a pair by its own squared gap, and sum_ij V_ij (x_i - x_j)^2 is two products of matrices.
    ``weights`` (P, P) are symmetric.
    """
    scaled = distance * _ROOT5
    pull = scaled.neg().exp_().mul_(scaled + 1.0).mul_(weights).mul_(5 / 3)
    centred = x - x.mean(dim=0)
    gaps = pull.sum(dim=1) @ centred.square() - (centred * (pull @ centred)).sum(dim=0)
    return 2.0 * gaps / lengths.square()


def _matern(scaled: Tensor) -> Tensor:
    """Of sqrt(5) distances."""
    tails = scaled.neg().exp_()
    return torch.addcmul(scaled, scaled, scaled, value=1 / 3).add_(1.0).mul_(tails)


def _scaled(columns: Tensor, group: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
    """sqrt(5) gap / length (m, K) of values (m,) of some groups (m,) to the known plans' values, columns (G, K)."""
    gap = columns[group].sub_(values[:, None]).abs_()
    return gap.mul_(_ROOT5 / lengths[group, None])
