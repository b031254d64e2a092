"""No search: the plan of one rule under the same door, so that a published rule is a method like any other."""

from __future__ import annotations

from collections.abc import Sequence

from ...envs.task import Task
from ..base import TrialRecorder
from .gradient_free import GradientFree


class OneRule(GradientFree):
    """Scores the plan of the rule that ``search.base_rule`` names, and ends; probes of the rule are charged to it."""

    name = "rule"

    def spend(self, task: Task, recorder: TrialRecorder, seed: Sequence[int]) -> None:
        """See :class:`GradientFree`; nothing is random."""
        recorder.evaluate(task.base_plan(task.highest_budget))
