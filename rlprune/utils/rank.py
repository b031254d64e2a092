"""Rank correlation."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from .arrays import Floats


def spearman(x: ArrayLike, y: ArrayLike) -> float:
    """Rank correlation; ties share their mean rank, and a constant side gives 0."""
    a, b = ranks(x), ranks(y)
    a, b = a - a.mean(), b - b.mean()
    norm = float(np.sqrt((a**2).sum() * (b**2).sum()))
    return float((a * b).sum() / norm) if norm > 0 else 0.0


def ranks(values: ArrayLike) -> Floats:
    """Ranks from 0.5 on, ties at their mean."""
    _, inverse, counts = np.unique(
        np.asarray(values, dtype=np.float64), return_inverse=True, return_counts=True
    )
    mean: Floats = np.cumsum(counts) - (counts + 1) / 2
    return mean[inverse]
