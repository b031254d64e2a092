"""Labels: for every element of a tensor the channel that it belongs to.

A tensor of labels has the shape of the tensor that it describes, so that whatever moves elements (views, slices,
shuffles, padding) moves their labels by the same operation. A weight has one such tensor for each of its dimensions.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..utils.arrays import Ints
from .channel_sets import CONSTANT, ChannelSets

Origin = tuple[str, int]
"""A dimension of a parameter or buffer, by name."""


@dataclass(frozen=True)
class Labels:
    """``of`` (the tensor's shape, int64; dimensions without change have stride 0), the dimensions that it varies along,
    and the parameter's dimension that it began as, while it has met no activation."""

    of: Tensor
    varies: frozenset[int]
    origin: Origin | None = None

    @property
    def constant(self) -> bool:
        """Whether no channel stands behind any element."""
        return not self.varies and bool((self.of.flatten()[:1] == CONSTANT).all())

    def unique(self) -> Ints:
        """All labels in it but CONSTANT."""
        found = np.unique(narrowed(self.of).numpy())
        return found[found != CONSTANT]

    def along(self, dim: int) -> Ints:
        """The labels along one dimension, at the first place of all others; (size,)."""
        index = tuple(slice(None) if d == dim else 0 for d in range(self.of.ndim))
        return self.of[index].numpy().copy()


def narrowed(of: Tensor) -> Tensor:
    """The labels without the repetitions along dimensions of stride 0, which keep one place."""
    return of[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in of.stride())]


def settled(sets: ChannelSets, of: Tensor, origin: Origin | None = None) -> Labels:
    """Labels by their lowest equals, with one place along each dimension that they do not vary along."""
    ids = sets.find(narrowed(of).contiguous().numpy())
    varies = set()
    for dim in range(ids.ndim):
        if ids.shape[dim] > 1:
            first = ids.take([0], axis=dim)
            if (ids == first).all():
                ids = first
            else:
                varies.add(dim)
    return Labels(torch.from_numpy(np.ascontiguousarray(ids)).expand(of.shape), frozenset(varies), origin)


def first_along(of: Tensor, dims: Collection[int]) -> Tensor:
    """The first place along some dimensions, which stay with a size of 1."""
    return of[tuple(slice(0, 1) if d in dims else slice(None) for d in range(of.ndim))]


def vector(labels: Ints, dim: int, shape: Sequence[int]) -> Tensor:
    """Labels (n,) along one dimension of a shape, the same everywhere else."""
    sizes = [1] * len(shape)
    sizes[dim] = len(labels)
    return torch.from_numpy(labels).view(sizes).expand(*shape)
