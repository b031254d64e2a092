"""A plan as the stages that lead to it, and what scoring it gave."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

History = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Candidate:
    """A plan that has been built, recovered and scored on the validation split.

    ``cost`` is absolute, in the metric of the evaluator; ``score`` higher is better; ``error`` the
    standard error of the score over the images (sequences of a text); ``loss`` is the mean over images or
    tokens, ``metric`` accuracy or perplexity. ``samples`` is how many images or sequences were read, 0
    where that is not known (ledgers of older versions).
    """

    widths: tuple[int, ...]
    cost: float
    score: float
    loss: float
    metric: float
    error: float
    seconds: float
    samples: int = 0


def as_history(widths: Any) -> History:
    """Widths (G,), or one such for each stage, as a history of plain numbers."""
    stages = widths if len(widths) and np.ndim(widths[0]) else (widths,)
    return tuple(tuple(int(w) for w in stage) for stage in stages)
