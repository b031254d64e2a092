"""A model of the score through the logits of the scored plans, for the search that PPO trains in.

An evaluation tells more than a score: the logits of every validation image. They are nearly additive over the
groups where the divergence is not, so a process of the logits (:class:`rlprune.expectation.LogitModel`) knows after a
third of the evaluations what one of the scores knows after all of them. (Bayesian optimisation of composite functions,
Astudillo & Frazier 2019, arXiv 1906.01537.) The interface is that of :class:`.surrogate.ScoreModel`.

Shape legend: N plans, P new plans, G groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np

from ..envs.task import Floats, Ints, Task
from ..expectation import LogitModel

# Logits of a plan that are modelled, at most: those of every plan are kept, and predicted for every proposal.
_MOST_LOGITS = 2**16
# Divergences are told apart down to this (nats).
_FLOOR = 1e-6


class CompositeModel:
    """Minus the logarithm of the divergence of the expected logits, and how uncertain that is, relative to it."""

    noise = 1e-3
    enough = 5
    """Scored plans from which on the process is worth asking."""

    def __init__(self, task: Task) -> None:
        self._evaluator = cast(Any, task.evaluator)  # `applies` has found what is asked of it here
        self._step = 1
        dense = self._evaluator.dense_logits()
        self._step = max(1, -(-dense.numel() // _MOST_LOGITS))
        recovered = self._part(self._evaluator.logits(task.space.widths))
        self._model = LogitModel(task.space.widths, recovered, self._part(dense))

    @staticmethod
    def applies(task: Task) -> bool:
        """Whether the evaluator keeps the logits of what it scores, and the task has one budget.

        Over a range of budgets hundreds of plans are far from each other, and the process of the scores is cheaper.
        """
        keep = getattr(task.evaluator, "keep_logits", None)
        return not task.is_range and keep is not None and bool(keep())

    def fit(self, widths: Ints, scores: Floats) -> None:
        """Take in N scored plans of widths (N, G); of their scores the logits tell more."""
        for plan in np.asarray(widths, dtype=np.int64):
            key = tuple(int(w) for w in plan)
            if key not in self._model.known:
                self._model.learn(plan, self._part(self._evaluator.logits(plan)))
        self._model.fit()

    def predict(self, widths: Ints) -> tuple[Floats, Floats]:
        """Mean (P,) and standard deviation (P,) of minus the logarithm of the divergence."""
        centre, spread = (np.maximum(part, _FLOOR) for part in self._model.expected(widths))
        return -np.log(centre), spread / (centre + spread)

    def covariance(self, widths: Ints) -> tuple[Floats, Floats]:
        """Mean (P,) and joint covariance (P, P)."""
        mean, deviation = self.predict(widths)
        return mean, np.outer(deviation, deviation) * self._model.correlation(widths)

    def informed(self, widths: Ints) -> bool:
        """Whether enough is known for more than random plans."""
        return len(self._model.known) >= self.enough

    @property
    def theta(self) -> list[float] | None:
        """What the next fit starts from."""
        return self._model.state

    @theta.setter
    def theta(self, value: Sequence[float] | None) -> None:
        if value is not None:
            self._model.state = list(value)

    def _part(self, logits: Any) -> Any:
        """Logits (N, C) of some of the images, evenly spread, where all would be too many."""
        return logits[:: self._step]
