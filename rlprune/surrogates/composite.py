"""A model of the score through the logits of the scored plans, for the search that PPO trains in.

An evaluation tells more than a score: the logits of every validation image, or of every scored token of a text the
log-probabilities of the dense model's likeliest tokens. They are nearly additive over the groups where the divergence
is not, so a process of the logits (:class:`rlprune.surrogates.logit_gp.LogitGP`) makes more of each evaluation than
one of the scores. (Bayesian optimisation of composite functions, Astudillo & Frazier 2019, arXiv 1906.01537.) The
interface is that of :class:`.guided.Surrogate`.

Shape legend: N plans, P new plans, G groups.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np

from ..envs.task import Task
from ..evaluation.logit_cache import LogitCache
from ..pruning.history import as_history
from ..utils.arrays import Floats, Ints
from .logit_gp import LogitGP

# Scored plans from which on the process is worth asking.
_ENOUGH = 5
# What the curves expect is off by a power, which the scored plans tell, within these bounds.
_SLOPES = (0.5, 2.0)
# Divergences are told apart down to this (nats).
_FLOOR = 1e-6


@runtime_checkable
class KeepsLogits(Protocol):
    """An evaluator that can keep the logits of what it scores."""

    def logit_cache(self) -> LogitCache | None: ...


def _logit_cache(task: Task) -> LogitCache | None:
    evaluator = task.evaluator
    return evaluator.logit_cache() if isinstance(evaluator, KeepsLogits) else None


class CompositeGP:
    """Minus the logarithm of the expected divergence, and how much of that is due to not knowing the logits."""

    noise = 1e-3
    # The process makes more of each evaluation than one of the scores does.
    batch = 6
    # Far from what it knows it is so unsure that a heavier weight asks for plans that are several times as bad.
    climbs = (0.0, 0.25, 0.5)
    kappas = (0.0, 0.0, 0.25, 0.0, 0.0, 0.5)

    def __init__(self, task: Task) -> None:
        cache = _logit_cache(task)
        assert cache is not None
        self._logits = cache
        self._groups = len(task.space.groups)
        dense = as_history(task.space.widths)
        self._task = task
        self._trend: tuple[float, float] | None = None
        self._model = LogitGP(task.space.widths, self._logits.take(dense), self._logits.dense)

    @staticmethod
    def applies(task: Task) -> bool:
        """Whether the evaluator keeps the logits of what it scores."""
        return _logit_cache(task) is not None

    def fit(self, widths: Ints, scores: Floats) -> None:
        """Take in N scored plans of widths (N, G); of their scores the logits tell more."""
        for plan in np.asarray(widths, dtype=np.int64):
            key = as_history(plan)
            if key[-1] not in self._model.known:
                self._model.learn(plan, self._logits.take(key))
        self._model.fit()
        self._trend = self._line()

    def predict(self, widths: Ints) -> tuple[Floats, Floats]:
        """Mean (P,) and standard deviation (P,) of minus the logarithm of the divergence.

        The mean is that of the expected divergence, not of the divergence of the expected logits: where nothing is
        known the latter are the dense model's, and any plan far from the known ones would look best. Where curves of
        the groups say what cuts are expected to cost, they are the prior mean: as far as the logits are not known, the
        logarithm is that of the summed curves, on the line through the scored plans.
        """
        centre, spread = (np.maximum(part, _FLOOR) for part in self._model.expected(widths))
        logarithm, unknown = np.log(centre + spread), spread / (centre + spread)
        expected = self._prior(widths)
        if expected is not None:
            logarithm = (1.0 - unknown) * logarithm + unknown * expected
        return -logarithm, unknown

    def _prior(self, widths: Ints) -> Floats | None:
        """Logarithm (P,) of the divergence that curves of the groups lead to expect; None where there are none."""
        costs = self._task.prior(np.asarray(widths, dtype=np.int64))
        if costs is None or self._trend is None:
            return None
        slope, level = self._trend
        found: Floats = slope * np.log(np.maximum(costs.sum(axis=1), _FLOOR)) + level
        return found

    def _line(self) -> tuple[float, float] | None:
        """Slope and level of the line from what was expected of the known plans to what they cost, in logarithms."""
        plans = np.array(list(self._model.known), dtype=np.int64).reshape(-1, self._groups)
        costs = self._task.prior(plans)
        if costs is None or len(plans) < _ENOUGH:
            return None
        x = np.log(np.maximum(costs.sum(axis=1), _FLOOR))
        y = np.log(np.maximum(list(self._model.known.values()), _FLOOR))
        slope = float(np.polyfit(x, y, 1)[0]) if np.ptp(x) > 1e-9 else 1.0
        slope = min(max(slope, _SLOPES[0]), _SLOPES[1])
        return slope, float(np.median(y - slope * x))

    def covariance(self, widths: Ints) -> tuple[Floats, Floats]:
        """Mean (P,) and joint covariance (P, P)."""
        mean, deviation = self.predict(widths)
        return mean, np.outer(deviation, deviation) * self._model.correlation(widths)

    def ready(self, known: int) -> bool:
        """Whether enough plans have been scored for the process to be worth asking."""
        return known >= _ENOUGH

    def informed(self, widths: Ints) -> bool:
        """Whether enough is known for more than random plans."""
        return self.ready(len(self._model.known))

    def promising(self, count: int) -> Ints:
        """None: what it knows has been scored."""
        return np.zeros((0, self._groups), dtype=np.int64)

    @property
    def theta(self) -> list[float] | None:
        """What the next fit starts from."""
        return self._model.state

    @theta.setter
    def theta(self, value: list[float] | None) -> None:
        if value is not None:
            self._model.state = list(value)
