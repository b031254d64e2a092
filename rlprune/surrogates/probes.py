"""Models of the score that also read probes of the network: a few evaluations that tell checkpoints apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy.linalg import solve_triangular
from torch import Tensor

from ..envs.task import Task
from ..pruning.budget import BudgetLike
from ..pruning.space import PruningSpace
from ..utils.arrays import Floats, Ints
from .kernels import distances, matern
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
    kappas = (0.0, 0.5, 1.0, 2.0)

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
        self._lower = np.linalg.cholesky(gram)
        self._solved = self._half((log_distance(self._task, scores) - prior)[:, None])[:, 0]

    def predict(self, widths: Ints) -> tuple[Floats, Floats]:
        """Mean (P,) and standard deviation (P,) of the target."""
        mean, unsure, half = self._cross(widths)
        variance = _LEVEL + _OWN + unsure - (half**2).sum(axis=0)
        return mean, np.sqrt(np.maximum(variance, 1e-12))

    def covariance(self, widths: Ints) -> tuple[Floats, Floats]:
        """Mean (P,) and joint covariance (P, P)."""
        mean, unsure, half = self._cross(widths)
        x = log_ratios(self._task, widths)
        return mean, self._kernel(x, x) + np.diag(unsure) - half.T @ half

    def ready(self, known: int) -> bool:
        return True

    def informed(self, widths: Ints) -> bool:
        return True

    def promising(self, count: int) -> Ints:
        """The best of the plans that have been built."""
        return self._logits.best(count)

    def _cross(self, widths: Ints) -> tuple[Floats, Floats, Floats]:
        prior, unsure = self._prior(widths)
        half = self._half(self._kernel(self._x, log_ratios(self._task, widths)))
        return prior + half.T @ self._solved, unsure, half

    def _half(self, cross: Floats) -> Floats:
        """lower^-1 cross, (N, P), of the factor of the N known plans' covariance."""
        found: Floats = solve_triangular(self._lower, cross, lower=True) if len(cross) else cross
        return found

    def _prior(self, widths: Ints) -> tuple[Floats, Floats]:
        """Expected target (P,), and its variance (P,) because the logits are not known for certain."""
        if not len(widths):
            return np.zeros(0), np.zeros(0)
        centre, spread = self._logits.expected(widths)
        total = np.maximum(centre + spread, _BOUNDS[0])
        return -np.log(total), (spread / total) ** 2

    def _kernel(self, a: Floats, b: Floats) -> Floats:
        same = torch.full((b.shape[1],), _LENGTH, dtype=torch.float64)
        return _LEVEL + _OWN * matern(distances(torch.from_numpy(a), torch.from_numpy(b), same)).numpy()


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
