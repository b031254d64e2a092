"""What scoring a plan gave."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from ..pruning.history import Widths


@dataclass(frozen=True)
class Candidate:
    """A plan that has been built, recovered and scored on the validation split.

    ``cost`` is absolute, in the metric of the evaluator; ``score`` higher is better; ``error`` the
    standard error of the score over the images (sequences of a text); ``loss`` is the mean over images or
    tokens, ``metric`` accuracy or perplexity. ``samples`` is how many images or sequences were read, 0
    where that is not known (ledgers of older versions).
    """

    widths: Widths
    cost: float
    score: float
    loss: float
    metric: float
    error: float
    seconds: float
    samples: int = 0


class Scored(Protocol):
    """A scored candidate; the part of it that rules, environments and agents read."""

    @property
    def widths(self) -> tuple[int, ...]: ...
    @property
    def cost(self) -> float: ...
    @property
    def score(self) -> float: ...
    @property
    def loss(self) -> float: ...
    @property
    def metric(self) -> float: ...
    @property
    def seconds(self) -> float: ...
