"""What a search asks of a model of the score."""

from __future__ import annotations

from typing import Protocol

from ..utils.arrays import Floats, Ints
from .proposals import Model
from .score_gp import Predictor


class Surrogate(Model, Predictor, Protocol):
    """What a search asks of a model of the score; there is one a task."""

    @property
    def batch(self) -> int | None:
        """Evaluations between two fits, at most; None where `search.batch` decides alone."""
        ...

    @property
    def climbs(self) -> tuple[float, ...]:
        """The weights of the deviation with which plans are climbed to."""
        ...

    @property
    def kappas(self) -> tuple[float, ...]:
        """The weights of the deviation with which the plans of a batch are picked, one after the other in turn."""
        ...

    @property
    def theta(self) -> list[float] | None:
        """What the next fit starts from."""
        ...

    @theta.setter
    def theta(self, value: list[float] | None) -> None: ...
    def fit(self, widths: Ints, scores: Floats) -> None: ...
    def ready(self, known: int) -> bool:
        """Whether a search may begin with it, when so many plans have been scored."""
        ...

    def informed(self, widths: Ints) -> bool:
        """Whether plans around the known ones promise more than random ones before the first fit."""
        ...

    def promising(self, count: int) -> Ints:
        """Plans (at most count, G) that it knows to be good and that may not have been scored."""
        ...
