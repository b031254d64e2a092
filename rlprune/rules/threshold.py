"""Shared by the rules that have one free number: find it so that the budget is met."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .context import Context, Floats


def threshold_distribution(context: Context, scores: Sequence[NDArray[Any]]) -> Floats:
    """Cut every unit whose score lies under one global threshold, the lowest that meets the budget.

    ``scores`` holds one array a group. Groups keep their minimum and lose whole steps. Returns
    1 - widths / dense, shape (G,).
    """
    space = context.space
    target = space.target(context.budget, context.metric)
    ordered = [np.sort(np.asarray(s, dtype=np.float64)) for s in scores]
    pooled = np.unique(np.concatenate(ordered))

    def widths(index: int) -> NDArray[np.int64]:
        """Widths when everything up to the ``index`` lowest values is cut."""
        limit = pooled[index - 1] if index else -np.inf
        kept = [len(s) - np.searchsorted(s, limit, side="right") for s in ordered]
        return space.limits.floor(np.asarray(kept, dtype=np.float64))

    low, high = 0, len(pooled)  # all is kept; only the minimums are kept, which a feasible budget allows
    while low < high:
        middle = (low + high) // 2
        if space.cost(widths(middle), context.metric) <= target:
            high = middle
        else:
            low = middle + 1
    return as_distribution(1.0 - widths(low) / space.widths)


def scaled_distribution(context: Context, keep: Callable[[float], Floats]) -> Floats:
    """1 - keep(t) for the t in [0, 1] where the cost meets the budget.

    ``keep(t)`` gives the kept shares (G,), rising with t; they are held between the minimum and 1.
    """
    space = context.space
    target = space.target(context.budget, context.metric)
    least = space.minimums / space.widths

    def shares(t: float) -> Floats:
        return np.clip(keep(t), least, 1.0)

    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if space.cost(shares(middle) * space.widths, context.metric) <= target:
            low = middle
        else:
            high = middle
    return as_distribution(1.0 - shares(low))


def as_distribution(cut: Floats) -> Floats:
    """The cut shares as a distribution; where nothing has to be cut, the uniform one."""
    cut = np.maximum(np.asarray(cut, dtype=np.float64), 0.0)
    return cut if cut.any() else np.ones_like(cut)
