"""What a search knows of the logits of its plans.

Shape legend: K known plans (the dense model first), N images or tokens, L logits.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Changes:
    """Changes (K, L) of the logits that grow by a row at a time, and their second moments (K, K); the first is zero.

    Args:
        length: L, the logits of all images.
        classes: of one image.
    """

    def __init__(self, length: int, classes: int, dtype: torch.dtype = torch.float32) -> None:
        self._classes, self._count = classes, 1
        self._all = torch.zeros(16, length, dtype=dtype)
        self._side = torch.zeros(16, 2 * length // classes, dtype=dtype)
        self._moments = torch.zeros(0, 0, dtype=torch.float64)

    def append(self, centred: Tensor, shift: Tensor) -> None:
        """A change (L,) of the centred logits, classes first, and of what they are centred by (N,)."""
        if self._count == len(self._all):
            self._all = torch.cat([self._all, torch.empty_like(self._all)])
            self._side = torch.cat([self._side, torch.empty_like(self._side)])
        self._all[self._count] = centred
        rest = centred.unflatten(0, (self._classes, -1)).sum(dim=0) + 0.5 * self._classes * shift
        self._side[self._count] = torch.cat([shift, rest])
        self._count += 1

    @property
    def rows(self) -> Tensor:
        """The changes of the centred logits (K, L)."""
        return self._all[: self._count]

    def gram(self) -> Tensor:
        """Means of products of the logits' changes, of which only those of new rows are computed.

        They are those of the logits as they are: with what was taken away for centring. One row at a time: sums of
        floats depend on how many rows are multiplied at once, and a resumed search, which takes all in at once, has to
        expect the same to the bit.
        """
        before = len(self._moments)
        if before < self._count:
            moments = torch.zeros(self._count, self._count, dtype=torch.float64)
            moments[:before, :before] = self._moments
            for i in range(before, self._count):
                shift, rest = self._side[i].chunk(2)
                products = self._all[: i + 1] @ self._all[i]
                products = products + self._side[: i + 1] @ torch.cat([rest, shift])
                products = products.double() / self._all.shape[1]
                moments[i, : i + 1] = moments[: i + 1, i] = products
            self._moments = moments
        return self._moments
