"""EagleEye: random rates, those that miss the budget thrown away (Li et al., arXiv 2007.02491)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...envs.task import Task
from ...errors import BudgetError
from ...surrogates.proposals import fresh
from ...utils.arrays import Ints
from ..base import TrialRecorder
from .gradient_free import PATIENCE, GradientFree

_DRAWN, _MOST = 512, 2_000  # vectors of rates drawn at once, and how often before it is given up
_ASKED = 16  # plans that are asked for together


class EagleEye(GradientFree):
    """Rates uniform in [min_rate, min_rate + max_rate] for each group; the best-scoring plan within the budget is kept.

    As in the authors' code (anonymous47823493/EagleEye, search.py) rates are drawn until the cost lies near the
    target; nothing is projected. There a cost may be half a percent of the dense one above the target, too. Here the
    window of the same width ends at the target, because a budget is met. With ``recovery.steps: [bn]`` the score is
    that of the adaptive batch norm.
    """

    name = "eagleeye"

    def spend(self, task: Task, recorder: TrialRecorder, seed: Sequence[int]) -> None:
        """See :class:`GradientFree`."""
        generator = np.random.default_rng(seed)
        idle = 0
        while recorder.account.left > 0 and idle < PATIENCE:
            drawn = self._accepted(task, min(_ASKED, recorder.account.left), generator)
            plans = fresh(drawn, recorder.known)
            idle = 0 if len(plans) else idle + 1
            recorder.evaluate_batch(plans)

    def _accepted(self, task: Task, count: int, generator: np.random.Generator) -> Ints:
        """Widths (count, G) whose cost lies in the window."""
        settings, space = self.settings.eagleeye, task.space
        target = space.target(task.highest_budget, task.metric)
        least = target - 2 * settings.tolerance * space.dense_cost(task.metric)
        found: list[Ints] = []
        for _ in range(_MOST):
            rates = settings.min_rate + settings.max_rate * generator.random((_DRAWN, len(space.groups)))
            widths = space.limits.floor(space.led(space.widths * (1.0 - rates)))
            costs = space.cost(widths, task.metric)
            found += list(widths[(costs <= target) & (costs >= least)])
            if len(found) >= count:
                return np.array(found[:count])
        raise BudgetError(
            f"search.eagleeye: {_MOST * _DRAWN:,} draws of rates up to {settings.min_rate + settings.max_rate:g} gave "
            f"{len(found)} plans near the budget; allowed: another search.eagleeye.max_rate or .tolerance"
        )
