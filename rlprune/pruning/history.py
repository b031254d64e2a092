"""A plan by the widths of its groups after each stage, as plain numbers: a key that files and dictionaries keep.

One stage is the rule; only incremental pruning has several. Shape legend: G groups, N plans.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from ..utils.arrays import Ints

Widths = tuple[int, ...]
"""The units that each of the G groups keeps."""
History = tuple[Widths, ...]
"""The widths after each stage, the first stage first."""


def as_widths(widths: Any) -> Widths:
    """Widths (G,) as plain numbers."""
    return tuple(int(w) for w in widths)


def as_history(plan: Any) -> History:
    """Widths (G,), or one such for each stage, as a history."""
    stages = plan if len(plan) and np.ndim(plan[0]) else (plan,)
    return tuple(as_widths(stage) for stage in stages)


def final_widths(history: History) -> Ints:
    """Widths (G,) after the last stage."""
    return np.array(history[-1], dtype=np.int64)


def all_final_widths(histories: Iterable[History]) -> Ints:
    """Widths (N, G) after the last stage of each history; (0,) of none."""
    return np.array([history[-1] for history in histories], dtype=np.int64)
