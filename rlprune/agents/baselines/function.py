"""An agent from one function: `@rlprune.agent("...")` over `def mine(session)` makes a whole one of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike

from ...config.search import SearchConfig
from ...envs.task import Task
from ...evaluation.candidate import Scored
from ...pruning.history import PlanLike
from ...utils.arrays import Floats, Ints
from ..base import TrialRecorder
from .gradient_free import GradientFree


class SearchContext:
    """What the function of an agent works with: one task and the account that pays for its evaluations.

    ``space`` is the pruning space, ``importance`` holds G arrays of unit scores, ``budget`` and ``metric`` say
    what may be left. ``generator`` is the only source of randomness to be used: with it the seed decides
    everything, and a stopped run repeats its way through the ledger to the same result.
    """

    def __init__(self, task: Task, recorder: TrialRecorder, generator: np.random.Generator) -> None:
        self.space = task.space
        self.importance = task.evaluator.importance
        self.budget = task.highest_budget
        self.metric = task.metric
        self.generator = generator
        self._task, self._recorder = task, recorder

    @property
    def left(self) -> int:
        """Evaluations that are left; one for each plan not scored before."""
        return int(self._recorder.account.left)

    @property
    def best(self) -> Scored:
        """The best-scoring candidate within the budget so far; the starts (uniform, rules) have been scored."""
        return self._recorder.scores[self._recorder.best(self._task)]

    def project(self, distribution: ArrayLike) -> Ints:
        """Widths (G,) of a distribution (G,) that meet the budget exactly; (N, G) for (N, G).

        With a range of budgets each call draws one of them.
        """
        budget = self._task.draw_budget(self.generator)
        widths: Ints = self.space.project(np.asarray(distribution, dtype=np.float64), budget, self.metric)
        return widths

    def shares(self, widths: ArrayLike) -> Floats:
        """Share (G,) of its units that each group loses at these widths: a distribution again."""
        return 1.0 - np.asarray(widths, dtype=np.float64) / self.space.widths

    def evaluate(self, widths: PlanLike) -> Scored:
        """Build, recover and score widths (G,); the candidate has ``widths``, ``score`` (higher is better), ``loss``.

        The same widths again are free. Where nothing is left the search ends here: the function is not
        returned to.
        """
        return self._recorder.evaluate(widths)


class FunctionAgent(GradientFree):
    """Scores the starts, then hands every task to the function until it returns or its account is empty."""

    ranges = True

    def __init__(
        self, function: Callable[[SearchContext], object], settings: SearchConfig | None = None
    ) -> None:
        super().__init__(settings)
        self.function = function

    def spend(self, task: Task, recorder: TrialRecorder, seed: Sequence[int]) -> None:
        session = SearchContext(task, recorder, np.random.default_rng(seed))
        if not recorder.scores:  # `best` has to exist before the function asks for it
            recorder.evaluate(task.uniform_widths(session.budget))
        self.function(session)
