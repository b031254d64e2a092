"""Closed forms for nested rankings: one Cholesky factor of a layer's Gram matrix serves every width.

With the columns of a layer's input in the order of their units' ranks, ``A = E[x x'] + lambda I = L L'``. The first k
columns have the factor ``L_k``, the leading block of L, so whatever a width asks of A_kk costs triangular solves and
no factorisation of its own. lambda comes from the whole input: one that followed the kept columns would be another
matrix for every width.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError
from ..utils.arrays import Ints
from .shelf import Shelf


class Triangles:
    """Lower triangular (n, n) matrices, two of a size in one buffer of (n, n + 1).

    The second one lies transposed in the other half, so 30 layers of a language model need half the
    memory; triangular solves never read the half that is not theirs.
    """

    def __init__(self, shelf: Shelf | None = None) -> None:
        self._shelf = shelf or Shelf()
        self._waiting: dict[tuple[int, torch.dtype, torch.device], _Pair] = {}

    def add(self, lower: Tensor) -> Triangle:
        """Store the lower triangle of a matrix; returns the handle for :meth:`upper`."""
        key = (len(lower), lower.dtype, lower.device)
        if key in self._waiting:
            pair = self._waiting.pop(key)
            assert pair.buffer is not None
            pair.buffer[:, 1:] += lower.T.triu()
            pair.place, pair.buffer = self._shelf.put(pair.buffer), None
            return Triangle(pair, True)
        buffer = lower.new_zeros(len(lower), len(lower) + 1)
        buffer[:, :-1] = lower.tril()
        pair = self._waiting[key] = _Pair(buffer)
        return Triangle(pair, False)

    def settle(self) -> None:
        """No more are added: those that have no second one lie on the shelf as well."""
        for pair in self._waiting.values():
            assert pair.buffer is not None
            pair.place, pair.buffer = self._shelf.put(pair.buffer), None
        self._waiting.clear()

    def upper(self, handle: Triangle, size: int) -> Tensor:
        """``L[:size, :size]'``: a view that is right above and on the diagonal, and holds anything below it."""
        buffer = self._rows(handle, size)
        return buffer[:size, 1 : size + 1] if handle.second else buffer[:size, :size].T

    def leading(self, handle: Triangle, size: int, whole: int) -> tuple[Tensor, Tensor]:
        """What the first ``size`` of ``whole`` columns need of a factor; views of what was stored.

        Returns:
            ``L[:size, :size]'`` as :meth:`upper` gives it, and ``L[size:, :size]'`` (size, whole - size).
        """
        if not handle.second:
            full = self.upper(handle, whole)
            return full[:size, :size], full[:size, size:]
        rows = self._rows(handle, size)  # the others need not be read from a disk
        return rows[:, 1 : size + 1], rows[:, size + 1 :]

    def _rows(self, handle: Triangle, size: int) -> Tensor:
        pair = handle.pair
        return pair.buffer[:size] if pair.buffer is not None else self._shelf.rows(pair.place, size)

    @property
    def nbytes(self) -> int:
        """Bytes in memory: what waits for its second half, and what lies on the shelf."""
        waiting = sum(p.buffer.nbytes for p in self._waiting.values() if p.buffer is not None)
        return waiting + self._shelf.nbytes


@dataclass
class _Pair:
    """A buffer of two triangles: in memory until the second one has come or none will, then at a place on the shelf."""

    buffer: Tensor | None
    place: int = -1


@dataclass(frozen=True)
class Triangle:
    """Which half of which buffer of `Triangles` a matrix is."""

    pair: _Pair = field(repr=False)
    second: bool


def penalised(
    product: Tensor, ridge: float, name: str = "layer", shrink: float = 0.0
) -> tuple[Tensor, Tensor]:
    """``A = product + lambda I + shrink * diag(product)`` and its lower Cholesky factor, (I, I) in float64.

    lambda = ridge * mean(diag). The second penalty is in proportion to each input's own power, as dropout's
    is (Wager et al. 2013, arXiv 1307.1493), so inputs of every size are held back alike.

    Raises:
        DataError: A is not positive definite, because activations are not finite; names the layer.
    """
    a = product.to(torch.float64, copy=True)
    a.diagonal().mul_(1.0 + shrink).add_(ridge * product.diagonal().double().mean().clamp_min(1e-30))
    lower, failed = torch.linalg.cholesky_ex(a)
    if int(failed) or not bool(torch.isfinite(lower).all()):
        raise DataError(f"{name}: the Gram matrix of its input is not positive definite")
    return a, lower


class NestedRegression:
    """The regression of the removed columns of one layer's input on the kept ones, for every prefix of a ranking.

    ``A_k: = L_k (L')[:k]``, so ``B = (A_kk)^-1 A_kr = L_k^-T (L_rk)'``: one triangular solve, (k, k) with R right-hand
    sides.

    Args:
        product: (I, I) Gram matrix of the input, or its covariance where an intercept is fitted.
        order: (I,) columns by rank, those that are kept longest first.
        ridge: penalty, as a share of the mean of the product's diagonal.
        store: where the factor is put.

    Raises:
        DataError: see `penalised`.
    """

    def __init__(self, product: Tensor, order: Ints, ridge: float, store: Triangles) -> None:
        index = torch.from_numpy(order.copy()).to(product.device)
        self._order, self._store = order, store
        self._triangle = store.add(penalised(product[index[:, None], index], ridge)[1])

    def __call__(self, kept: Ints) -> Tensor:
        """B (K, R), float64, for the sorted columns ``kept``; R are the other ones, sorted."""
        size = len(kept)
        if np.array_equal(np.sort(self._order[:size]), kept):
            upper, right = self._store.leading(self._triangle, size, len(self._order))
            found = torch.linalg.solve_triangular(upper, right, upper=True)
            rows, columns = np.argsort(self._order[:size]), np.argsort(self._order[size:])
        else:  # any other columns: theirs of A come back from the factor
            upper = self._store.upper(self._triangle, len(self._order)).triu()
            places = np.argsort(self._order)
            left = upper[:, torch.from_numpy(places[kept]).to(upper.device)]
            gone = np.setdiff1d(np.arange(len(self._order)), kept)
            right = upper[:, torch.from_numpy(places[gone]).to(upper.device)]
            return torch.linalg.solve(left.T @ left, left.T @ right)
        return found[torch.from_numpy(rows).to(found.device)][:, torch.from_numpy(columns).to(found.device)]
