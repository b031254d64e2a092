"""What the agents without a policy share: task by task, the starts first, then whatever the method proposes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import ClassVar

import numpy as np

from ...config.search import SearchConfig
from ...envs.task import Task
from ...errors import ConfigError
from ...evaluation.ledger import BudgetExhausted
from ...pruning.budget import BudgetLike
from ...pruning.history import PlanLike, as_history
from ...surrogates.proposals import fresh, random_plans
from ...utils.arrays import Ints
from ..base import SearchRequest, SearchResult, TrialRecorder
from ..callbacks import SearchLogger

# A space so small that this many proposals in a row bring nothing new is exhausted.
PATIENCE = 200
# Random plans that each worker is given at once.
_AHEAD = 8


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
            later = () if request.round.number == 1 else (request.round.number,)
            with suppress(BudgetExhausted):  # an account also ends after too many repeats
                self.spend(task, recorder, (request.seed, index, *later))
        return SearchResult(tuple(r.best(task) for task, r in zip(tasks, recorders, strict=True)))


def spend_rest(
    task: Task, recorder: TrialRecorder, plans: Sequence[PlanLike], generator: np.random.Generator
) -> None:
    """Score plans, then, where a method ends before its account does, random ones."""
    recorder.prefetch(plans)
    for plan in plans:
        if recorder.account.left > 0:
            recorder.evaluate(plan)
    spend_on_random(task, recorder, lambda: task.highest_budget, generator)


def spend_on_random(
    task: Task, recorder: TrialRecorder, budget: Callable[[], BudgetLike], generator: np.random.Generator
) -> None:
    """Score random plans until the account is empty, or nothing new is found; ``budget()`` is that of the next one.

    Workers get several at once. Each is drawn as if it had been asked for after the one before it was scored.
    """
    ahead = 1 if recorder.workers == 1 or recorder.halves else _AHEAD * recorder.workers
    while recorder.account.left > 0:
        found: list[Ints] = []
        known, idle = recorder.known, 0
        while len(found) < min(ahead, recorder.account.left) and idle < PATIENCE:
            drawn = fresh(random_plans(task, budget(), 1, generator), known)
            known |= {as_history(plan) for plan in drawn}
            found += list(drawn)
            idle = 0 if len(drawn) else idle + 1
        if not found:
            return
        recorder.evaluate_batch(np.array(found))
