"""The Cholesky factor of a covariance that grows plan by plan.

Shape legend: K known plans.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.linalg import solve_triangular


class Factor:
    """Lower factor of the covariance (K, K) of noisy plans.

    It is made at once for the plans that are there, and extended for later ones row by row: K^2 operations a plan
    instead of K^3. By rows, because a resumed search, which takes in at once what the uninterrupted one took in batch
    by batch, has to come out equal to the bit.
    """

    def __init__(self, covariance: Tensor, noise: float) -> None:
        self._noise = noise
        diagonal = torch.eye(len(covariance), dtype=covariance.dtype) * noise
        self.lower = torch.linalg.cholesky(covariance + diagonal)
        """(K, K)."""

    def extend(self, count: int, row: Callable[[int], tuple[Tensor, float]]) -> None:
        """Grow to ``count`` plans; ``row(k)`` gives plan k's covariance (k,) with those before it, and with itself."""
        known = len(self.lower)
        if count <= known:
            return
        grown = torch.zeros(count, count, dtype=self.lower.dtype)
        grown[:known, :known] = self.lower
        for k in range(known, count):
            others, own = row(k)
            solved = solve_triangular(grown[:k, :k], others[:, None], upper=False)[:, 0]
            grown[k, :k] = solved
            # What is left of a plan's own variance is never less than the noise, but for rounding.
            grown[k, k] = max(own + self._noise - float(solved @ solved), self._noise) ** 0.5
        self.lower = grown

    def half(self, cross: Tensor) -> Tensor:
        """lower^-1 cross, (K, P): its columns' squared lengths are what is known of the P plans."""
        return solve_triangular(self.lower, cross, upper=False)

    def rest(self, half: Tensor) -> Tensor:
        """covariance^-1 cross, (K, P), from :meth:`half` of it: the weights of the known plans."""
        return solve_triangular(self.lower.T, half, upper=True)
