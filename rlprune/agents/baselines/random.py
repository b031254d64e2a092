"""Random search under the same door: the baseline that EagleEye made strong (Li et al., arXiv 2007.02491)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...envs.task import Task
from ...surrogates.proposals import fresh, random_plans
from ..base import TrialRecorder
from .gradient_free import PATIENCE, GradientFree, spend_on_random

# Plans of a batch where successive halving compares them.
_HALVED = 16


class RandomSearch(GradientFree):
    """Scores the starts, then random distributions projected onto the budget, until the account is empty."""

    name = "random"
    ranges = True

    def spend(self, task: Task, recorder: TrialRecorder, seed: Sequence[int]) -> None:
        """See :class:`GradientFree`; of a range of budgets each batch draws one."""
        generator = np.random.default_rng(seed)
        if not recorder.halves:
            spend_on_random(task, recorder, lambda: task.draw_budget(generator), generator)
            return
        idle = 0
        while recorder.account.left > 0 and idle < PATIENCE:
            budget = task.draw_budget(generator)
            count = min(_HALVED, recorder.account.left)
            plans = fresh(random_plans(task, budget, count, generator), recorder.known)
            idle = 0 if len(plans) else idle + 1
            recorder.evaluate_batch(plans)
