"""Models of the score that also read probes of the network: a few evaluations that tell checkpoints apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor

from ..envs.task import Task
from ..pruning.budget import BudgetLike
from ..pruning.space import PruningSpace
from ..utils.arrays import Floats, Ints
from .logit_gp import Build, LogitProbes

# Distances to the dense score are told apart between these (nats, or losses).
_BOUNDS = 1e-4, 20.0
# Of the logarithm of the ratio between the distance on validation and the one on the unlabelled images: variance of
# its level and of its deviation between plans, the latter's length (logarithms of keep ratios) and the noise.
_LEVEL, _OWN, _LENGTH, _NOISE = 1.0, 0.03, 0.7, 0.003


class ProbedModel:
    """A model of the score on a probed checkpoint; the interface is that of :class:`.surrogate.ScoreGP`.

    Its prior mean is what the process of the logits expects; what evaluations add is a level (validation images
    are not the unlabelled ones) and a smooth deviation between plans.
    """

    theta: list[float] | None = None
    noise = _NOISE
    batch = None
    # A few evaluations on top of experience have to be spent on what it is sure of, too.
    climbs = (0.0, 0.5)

    def __init__(self, task: Task) -> None:
        self._task, self._logits = task, probes_of(task)
        self.fit(np.zeros((0, len(task.space.groups)), dtype=np.int64), np.zeros(0))

    def fit(self, widths: Ints, scores: Floats) -> None:
        """Take in N plans of this checkpoint: widths (N, G), scores (N,)."""
        # What has been evaluated has been built: its logits on the unlabelled images tell of its neighbours, too.
        # The kernel stays as it is, so that a resumed search, which takes all in at once, expects the same.
        for plan in widths:
            self._logits.measure(plan)
        self._logits.fit(adapt=False)
        self._x = log_ratios(self._task, widths)
        prior, unsure = self._prior(widths)
        gram = self._kernel(self._x, self._x) + np.diag(unsure + _NOISE)
        self._inverse = np.linalg.inv(gram)
        self._weights = self._inverse @ (log_distance(self._task, scores) - prior)

    def predict(self, widths: Ints) -> tuple[Floats, Floats]:
        """Mean (P,) and standard deviation (P,) of the target."""
        mean, unsure, cross = self._cross(widths)
        variance = _LEVEL + _OWN + unsure - np.einsum("np,nm,mp->p", cross, self._inverse, cross)
        return mean, np.sqrt(np.maximum(variance, 1e-12))

    def covariance(self, widths: Ints) -> tuple[Floats, Floats]:
        """Mean (P,) and joint covariance (P, P)."""
        mean, unsure, cross = self._cross(widths)
        x = log_ratios(self._task, widths)
        return mean, self._kernel(x, x) + np.diag(unsure) - cross.T @ self._inverse @ cross

    def ready(self, known: int) -> bool:
        return True

    def informed(self, widths: Ints) -> bool:
        return True

    def promising(self, count: int) -> Ints:
        """The best of the plans that have been built."""
        return self._logits.best(count)

    def _cross(self, widths: Ints) -> tuple[Floats, Floats, Floats]:
        prior, unsure = self._prior(widths)
        cross = self._kernel(self._x, log_ratios(self._task, widths))
        return prior + cross.T @ self._weights, unsure, cross

    def _prior(self, widths: Ints) -> tuple[Floats, Floats]:
        """Expected target (P,), and its variance (P,) because the logits are not known for certain."""
        if not len(widths):
            return np.zeros(0), np.zeros(0)
        centre, spread = self._logits.expected(widths)
        total = np.maximum(centre + spread, _BOUNDS[0])
        return -np.log(total), (spread / total) ** 2

    def _kernel(self, a: Floats, b: Floats) -> Floats:
        distance = np.sqrt(5.0 * ((a[:, None] - b[None]) ** 2).sum(axis=-1)) / _LENGTH
        return _LEVEL + _OWN * (1.0 + distance + distance**2 / 3.0) * np.exp(-distance)


@runtime_checkable
class GivesProbes(Protocol):
    """An evaluator whose checkpoint can be built for the logits of unlabelled samples."""

    def logit_probes(
        self, target: float, make: Callable[[PruningSpace, Build, Tensor], LogitProbes]
    ) -> LogitProbes | None: ...


def find_probes(task: Task, budget: BudgetLike | None = None) -> LogitProbes | None:
    """The builds of a task's checkpoint at a budget (its own by default); None where they tell nothing."""
    evaluator = task.evaluator
    if not isinstance(evaluator, GivesProbes):
        return None
    target = task.space.target(task.highest_budget if budget is None else budget, task.metric)
    return evaluator.logit_probes(target, LogitProbes)


def probes_of(task: Task, budget: BudgetLike | None = None) -> LogitProbes:
    """`find_probes` where there are some."""
    found = find_probes(task, budget)
    assert found is not None
    return found


def log_ratios(task: Task, widths: ArrayLike) -> Floats:
    found: Floats = np.log(np.maximum(np.asarray(widths, dtype=np.float64), 0.5) / task.space.widths)
    return found


def log_distance(task: Task, scores: ArrayLike) -> Floats:
    distance = task.evaluator.dense.score - np.nan_to_num(np.asarray(scores), nan=-1e9, neginf=-1e9)
    found: Floats = -np.log(np.clip(distance, *_BOUNDS))
    return found
