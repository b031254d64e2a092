"""A plan by the widths of its groups after each stage, as plain numbers: a key that files and dictionaries keep.

One stage is the rule; only incremental pruning has several. Shape legend: G groups, N plans.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..utils.arrays import Ints

Widths = tuple[int, ...]
"""The units that each of the G groups keeps."""
History = tuple[Widths, ...]
"""The widths after each stage, the first stage first."""
PlanLike = Sequence[ArrayLike] | NDArray[np.generic]
"""Widths (G,), or one such for each stage, as callers have them: a list, a tuple, an array."""


def as_widths(widths: ArrayLike | PlanLike) -> Widths:
    """Widths (G,) as plain numbers."""
    return tuple(int(w) for w in np.asarray(widths))


def as_history(plan: PlanLike) -> History:
    """Widths (G,), or one such for each stage, as a history."""
    if len(plan) and np.ndim(plan[0]):
        return tuple(as_widths(stage) for stage in plan)
    return (as_widths(plan),)


def final_widths(history: History) -> Ints:
    """Widths (G,) after the last stage."""
    return np.array(history[-1], dtype=np.int64)


def all_final_widths(histories: Iterable[History]) -> Ints:
    """Widths (N, G) after the last stage of each history; (0,) of none."""
    return np.array([history[-1] for history in histories], dtype=np.int64)
