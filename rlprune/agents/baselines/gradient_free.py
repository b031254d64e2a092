"""What the agents without a policy share: task by task, the starts first, then whatever the method proposes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from typing import ClassVar

import numpy as np

from ...config.search import SearchConfig
from ...envs.task import Task
from ...errors import ConfigError
from ...evaluation.ledger import BudgetExhausted
from ...pruning.history import PlanLike
from ...surrogates.proposals import fresh, random_plans
from ..base import SearchRequest, SearchResult, TrialRecorder
from ..callbacks import SearchLogger

# A space so small that this many proposals in a row bring nothing new is exhausted.
PATIENCE = 200


class GradientFree(ABC):
    """Searches each task by itself, with the account of that task.

    Everything follows from the seed and from the scores, which a resumed run reads from its ledger: the
    search is simply done again, and ``state`` stays empty.
    """

    name: ClassVar[str]
    # Whether the method can search a range of budgets; one that looks for a single best plan cannot.
    ranges: ClassVar[bool] = False

    def __init__(self, settings: SearchConfig | None = None) -> None:
        self.settings = settings or SearchConfig()

    @abstractmethod
    def spend(self, task: Task, recorder: TrialRecorder, seed: Sequence[int]) -> None:
        """Spend what the starts have left of an account; ``seed`` decides everything random."""

    def search(self, request: SearchRequest) -> SearchResult:
        """See :class:`rlprune.agents.base.Agent`; a ``policy`` only adds its plan to the starts."""
        tasks = request.tasks
        if not self.ranges and any(task.is_range for task in tasks):
            raise ConfigError(
                f"search.budget_range: the agent {self.name!r} searches one budget, not a range"
            )
        watcher = SearchLogger(request)
        recorders = [TrialRecorder(account, watcher) for account in request.accounts]
        for index, (task, recorder) in enumerate(zip(tasks, recorders, strict=True)):
            recorder.score_starts(task, request.starts_of(index), request.policy)
            with suppress(BudgetExhausted):  # an account also ends after too many repeats
                self.spend(task, recorder, (request.seed, index))
        return SearchResult(tuple(r.best(task) for task, r in zip(tasks, recorders, strict=True)))


def spend_rest(
    task: Task, recorder: TrialRecorder, plans: Sequence[PlanLike], generator: np.random.Generator
) -> None:
    """Score plans, then, where a method ends before its account does, random ones."""
    for plan in plans:
        if recorder.account.left > 0:
            recorder.evaluate(plan)
    idle = 0
    while recorder.account.left > 0 and idle < PATIENCE:
        found = fresh(random_plans(task, task.highest_budget, 1, generator), recorder.known)
        recorder.evaluate_batch(found)
        idle = 0 if len(found) else idle + 1
