"""Policy gradient over Bernoulli masks, forward passes only (Gao et al., arXiv 2406.10576)."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

import numpy as np

from ...envs.task import Task
from ...pruning.history import final_widths
from ...utils.arrays import Floats, Ints
from ..base import TrialRecorder
from .gradient_free import PATIENCE, GradientFree, spend_rest

# The moving average of the loss that the paper subtracts.
_WINDOW = 5
# Keep probabilities stay this far from 0 and 1: the gradient divides by their standard deviation.
_EDGE = 0.01
_BETAS, _EPSILON = (0.9, 0.999), 1e-8


class Bypass(GradientFree):
    """Learns a keep probability for every unit from the losses of sampled masks.

    Step: K = ``masks`` masks m ~ Bernoulli(s); gradient sum_k (L_k - delta) (m_k - s) / sqrt(s (1 - s)) /
    (K - 1), delta the mean loss of the last five steps; Adam, learning rate falling to 0 by a cosine;
    then one shift, found by bisection, brings the expected cost back to the budget. The probabilities start at
    the keep ratios of the best start (``start: rule``), at the sigmoid of the standardised logarithms of the
    unit importances as in the paper (``importance``), or all equal (``uniform``).

    What differs from the paper: a candidate is given by its widths, and which units stay follows from their
    importance, so a mask counts through the number of units that it keeps in each group, projected onto the
    budget; the loss is minus the score (the divergence from the dense model); the budget is a cost and not
    a count; the learning rate suits hundreds of evaluations (2e-3 and 120,000 samples in the paper); the last
    evaluation goes to the expected widths. Masks are compared on all samples, in pairs too few to halve.
    """

    name = "bypass"

    def spend(self, task: Task, recorder: TrialRecorder, seed: Sequence[int]) -> None:
        """See :class:`GradientFree`."""
        settings = self.settings.bypass
        generator = np.random.default_rng(seed)
        shift = _Shift(task)
        keep = shift(_first(task, recorder, shift, settings.start))
        adam = _Adam(len(keep))
        losses: deque[float] = deque(maxlen=_WINDOW)
        limit = recorder.account.left
        first = recorder.account.spent
        idle = 0
        while recorder.account.left > 1 and idle < PATIENCE:
            before = recorder.account.spent
            masks = generator.random((settings.masks, len(keep))) < keep
            found = []
            plans = [shift.widths(mask) for mask in masks[: recorder.account.left]]
            recorder.prefetch(plans)
            for plan in plans:
                found.append(-recorder.evaluate(plan).score)
            delta = float(np.mean(losses)) if losses else float(np.mean(found))
            losses.append(float(np.mean(found)))
            weights = np.array(found) - delta
            centred = (masks[: len(found)] - keep) / np.sqrt(keep * (1.0 - keep))
            gradient = weights @ centred / max(settings.masks - 1, 1)
            progress = (recorder.account.spent - first) / limit
            rate = settings.lr * 0.5 * (1.0 + math.cos(math.pi * progress))
            keep = shift(keep - rate * adam(gradient))
            idle = 0 if recorder.account.spent > before else idle + 1
        spend_rest(task, recorder, [shift.widths(keep)], generator)


class _Shift:
    """Keep probabilities (U,) of all units on the budget, and the widths of masks."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._space = task.space
        self._group = np.repeat(np.arange(len(task.space.groups)), task.space.unit_counts)
        self._target = task.space.target(task.highest_budget, task.metric)

    def __call__(self, keep: Floats) -> Floats:
        """``keep - v``, held between the edges, with v by bisection so that the expected cost is the budget."""
        low, high = float(keep.min()) - 1.0, float(keep.max())
        for _ in range(50):
            middle = (low + high) / 2
            counts = self.counts(np.clip(keep - middle, _EDGE, 1.0 - _EDGE))
            if self._space.cost(counts, self._task.metric) <= self._target:
                high = middle
            else:
                low = middle
        return np.clip(keep - high, _EDGE, 1.0 - _EDGE)

    def counts(self, keep: Floats) -> Floats:
        """Units kept in each group (G,), of a mask or in expectation; a mean over lanes (`Group.lanes`)."""
        kept = np.bincount(self._group, weights=keep, minlength=len(self._space.groups)).astype(np.float64)
        return kept / self._space.lanes

    def widths(self, keep: Floats) -> Ints:
        """Counts projected onto the budget, (G,)."""
        cut = 1.0 - self.counts(keep) / np.maximum(self._space.widths, 1)
        return self._space.project(np.maximum(cut, 1e-9), self._task.highest_budget, self._task.metric)

    def spread(self, values: Floats) -> Floats:
        """One number a group (G,) given to each of its units (U,)."""
        return values[self._group]


def _first(task: Task, recorder: TrialRecorder, shift: _Shift, start: str) -> Floats:
    """Keep probabilities (U,) to begin with, before the shift onto the budget."""
    groups = len(task.space.groups)
    if start == "importance":
        scores = np.concatenate([np.asarray(s, dtype=np.float64) for s in task.evaluator.importance])
        positive = scores[scores > 0]
        smallest = positive.min() if len(positive) else 1.0
        logs = np.log(np.maximum(scores, smallest))
        keep: Floats = 1.0 / (1.0 + np.exp(-(logs - logs.mean()) / max(float(logs.std()), 1e-9)))
        return keep
    within = recorder.within(task, task.highest_budget)
    if start == "rule" and within:
        return shift.spread(final_widths(within[0]) / np.maximum(task.space.widths, 1))
    return shift.spread(np.full(groups, 0.5))


class _Adam:
    """Adam's direction (Kingma and Ba, arXiv 1412.6980) for one vector."""

    def __init__(self, size: int) -> None:
        self._first, self._second, self._steps = np.zeros(size), np.zeros(size), 0

    def __call__(self, gradient: Floats) -> Floats:
        self._steps += 1
        a, b = _BETAS
        self._first = a * self._first + (1.0 - a) * gradient
        self._second = b * self._second + (1.0 - b) * gradient**2
        scaled = np.sqrt(self._second / (1.0 - b**self._steps)) + _EPSILON
        return self._first / (1.0 - a**self._steps) / scaled
