"""Shared by the rules that have one free number: find it so that the budget is met."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike

from ..pruning.space import PruningSpace
from ..utils.arrays import Bools, Floats, Ints
from .context import Context


def threshold_distribution(context: Context, scores: Sequence[ArrayLike]) -> Floats:
    """Cut every unit whose score lies under one global threshold, the lowest that meets the budget.

    ``scores`` holds one array a group; those of groups that are not active do not count. Groups keep their
    minimum and lose whole steps, those with lanes the mean of what their lanes lose. Returns 1 - widths / dense,
    shape (G,).
    """
    space, active = context.space, context.active
    target = space.target(context.budget, context.metric)
    ordered = [np.sort(np.asarray(s, dtype=np.float64)) for s in scores]
    pooled = np.unique(np.concatenate([s for s, a in zip(ordered, active, strict=True) if a]))

    def widths(index: int) -> Ints:
        """Widths when everything up to the ``index`` lowest values is cut."""
        limit = pooled[index - 1] if index else -np.inf
        kept = [len(s) - np.searchsorted(s, limit, side="right") for s in ordered]
        counts = np.asarray(kept, dtype=np.float64) / space.lanes
        return np.where(active, space.limits.floor(counts), space.widths)

    low, high = 0, len(pooled)  # all is kept; only the minimums are kept, which a feasible budget allows
    while low < high:
        middle = (low + high) // 2
        if space.cost(widths(middle), context.metric) <= target:
            high = middle
        else:
            low = middle + 1
    return widths_distribution(space, widths(low))


def pooled_widths(context: Context, scores: Sequence[ArrayLike], groups: Bools, count: int) -> Ints:
    """Widths (G,) when the ``count`` units of the lowest scores of some groups (G,) go; the others keep all.

    Groups keep their minimum and lose whole steps.
    """
    space = context.space
    chosen = [np.asarray(s, dtype=np.float64) for s, own in zip(scores, groups, strict=True) if own]
    if not chosen or count <= 0:
        return space.widths.copy()
    pooled = np.sort(np.concatenate(chosen))
    limit = pooled[min(count, len(pooled)) - 1]
    kept = np.array([float((np.asarray(s) > limit).sum()) for s in scores]) / space.lanes
    widths: Ints = np.where(groups, np.maximum(space.limits.floor(kept), space.minimums), space.widths)
    return widths


def least_share(space: PruningSpace, metric: str, target: float, widths_at: Callable[[float], Ints]) -> Ints:
    """Widths (G,) at the least share in [0, 1] whose cost meets an absolute target, by bisection.

    ``widths_at(share)`` falls with the share; where none meets the target those at 1 are given.
    """
    found, low, high = widths_at(1.0), 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        tried = widths_at(middle)
        if space.cost(tried, metric) <= target:
            found, high = tried, middle
        else:
            low = middle
    return found


def scaled_distribution(context: Context, keep: Callable[[float], Floats]) -> Floats:
    """1 - keep(t) for the t in [0, 1] where the cost meets the budget.

    ``keep(t)`` gives the kept shares (G,), rising with t; they are held between the minimum and 1, and groups
    that are not active keep everything.
    """
    space = context.space
    target = space.target(context.budget, context.metric)
    least = space.minimums / np.maximum(space.widths, 1)

    def shares(t: float) -> Floats:
        return np.where(context.active, np.clip(keep(t), least, 1.0), 1.0)

    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if space.cost(shares(middle) * space.widths, context.metric) <= target:
            low = middle
        else:
            high = middle
    return as_distribution(np.where(space.widths > 0, 1.0 - shares(low), 0.0))


def mean_share(context: Context) -> float:
    """The share p in [0, 1] that every active group would lose if all lost the same (minimums aside)."""
    space = context.space
    target = space.target(context.budget, context.metric)
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        kept = space.widths * (1.0 - middle * context.active)
        if space.cost(kept, context.metric) <= target:
            high = middle
        else:
            low = middle
    return high


def widths_distribution(space: PruningSpace, widths: Ints | Floats) -> Floats:
    """1 - widths / dense, shape (G,); 0 for groups of which an earlier stage has left nothing."""
    return as_distribution(np.where(space.widths > 0, 1.0 - widths / np.maximum(space.widths, 1), 0.0))


def as_distribution(cut: Floats) -> Floats:
    """The cut shares as a distribution; where nothing has to be cut, the uniform one."""
    cut = np.maximum(np.asarray(cut, dtype=np.float64), 0.0)
    return cut if cut.any() else np.ones_like(cut)
