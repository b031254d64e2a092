"""Random search under the same door: the baseline that EagleEye made strong (Li et al., arXiv 2007.02491)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..config import SearchConfig
from ..envs.task import Task
from .base import Recorder, SearchResult, Starts, check_arguments
from .callbacks import Progress, Watcher
from .policy import PortablePolicy
from .proposals import fresh, random_plans
from .state import StateDir

# A space so small that this many draws in a row bring nothing new is exhausted.
_PATIENCE = 200
# Plans of a batch where successive halving compares them.
_HALVED = 16


class RandomSearch:
    """Scores the starts, then random distributions projected onto the budget, until the account is empty."""

    def __init__(self, settings: SearchConfig | None = None) -> None:
        self.settings = settings or SearchConfig()

    def search(
        self,
        tasks: Sequence[Task],
        accounts: Sequence[Any],
        *,
        starts: Starts = (),
        seed: int = 0,
        state: StateDir | None = None,
        progress: Callable[[Progress], None] | None = None,
        tensorboard: Path | None = None,
        policy: PortablePolicy | None = None,
    ) -> SearchResult:
        """See :class:`rlprune.agents.base.Agent`; a ``policy`` only adds its plan to the starts.

        Everything follows from the seed and the ledger, so ``state`` stays empty.
        """
        check_arguments(tasks, accounts, starts)
        watcher = Watcher(tasks, accounts, progress, tensorboard)
        recorders = [Recorder(account, watcher) for account in accounts]
        for index, (task, recorder) in enumerate(zip(tasks, recorders, strict=True)):
            generator = np.random.default_rng([seed, index])
            recorder.score_starts(task, starts[index] if starts else (), policy)
            _spend(task, recorder, generator)
        return SearchResult(tuple(r.best(task) for task, r in zip(tasks, recorders, strict=True)))


def _spend(task: Task, recorder: Recorder, generator: np.random.Generator) -> None:
    idle = 0
    halving = bool(getattr(getattr(recorder.account, "evaluator", None), "rungs", ()))
    size = _HALVED if halving else 1
    while recorder.account.left > 0 and idle < _PATIENCE:
        budget = task.draw_budget(generator)
        count = min(size, recorder.account.left)
        plans = fresh(random_plans(task, budget, count, generator), recorder.known)
        idle = 0 if len(plans) else idle + 1
        recorder.evaluate_batch(plans)
