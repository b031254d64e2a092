"""What a person sees of a running search: progress after every evaluation, and curves on request."""

from __future__ import annotations

import time
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError
from .base import SearchRequest


@dataclass(frozen=True)
class Progress:
    """State of a search: evaluations ``spent`` of ``limit``, the ``best_score`` within the budget
    so far (-inf before there is one), and seconds.

    ``left`` estimates the seconds that remain from the pace of this process (None before there is one);
    ``improved`` says whether the last evaluation found a new best plan of the first task.
    """

    spent: int
    limit: int
    best_score: float
    seconds: float
    left: float | None
    improved: bool


class SearchLogger:
    """Called after each evaluation; reports to the caller and, on request, to TensorBoard."""

    def __init__(self, request: SearchRequest) -> None:
        self._tasks, self._accounts = request.tasks, request.accounts
        self._progress = request.progress
        self.logger = sb3_logger(request.tensorboard)
        self._log = request.tensorboard is not None
        self._started = time.monotonic()
        self._at_start: int | None = None
        self._best: float | None = None
        self._costs: list[float] = []

    def resumed(self) -> None:
        """The evaluations so far were repeated from a ledger: they say nothing about the pace."""
        self._started = time.monotonic()
        self._at_start = sum(a.spent for a in self._accounts)

    def __call__(self) -> None:
        if self._progress is None and not self._log:
            return
        spent = sum(a.spent for a in self._accounts)
        limit = sum(a.limit for a in self._accounts)
        scores = self._scores()
        best = max(scores, default=float("-inf"))
        seconds = time.monotonic() - self._started
        here = spent - (self._at_start or 0)
        left = seconds / here * (limit - spent) if here > 0 else None
        improved = self._best is None or best > self._best
        self._best = best
        if self._progress is not None:
            self._progress(Progress(spent, limit, best, seconds, left, improved))
        if self._log:
            self.logger.record("search/best_score", best)
            self.logger.record("search/score", scores[-1] if scores else best)
            self.logger.dump(spent)

    def _scores(self) -> list[float]:
        """Scores of the first task's plans that keep its budget: a rule's probes are no results."""
        task, account = self._tasks[0], self._accounts[0]
        new = account.history[len(self._costs) :]
        self._costs += [task.space.cost(np.array(c.widths), task.metric) for c in new]
        limit = task.space.target(task.highest_budget, task.metric)
        return [c.score for c, cost in zip(account.history, self._costs, strict=True) if cost <= limit]


def sb3_logger(tensorboard: Path | None) -> Any:
    """stable-baselines3's logger: silent, or writing TensorBoard files into a folder."""
    from stable_baselines3.common.logger import Logger, configure

    if tensorboard is None:
        return Logger(None, [])
    check_tensorboard()
    return configure(str(tensorboard), ["tensorboard"])


def check_tensorboard() -> None:
    """ConfigError that names the extra where TensorBoard's writer cannot be loaded."""
    try:
        import_module("torch.utils.tensorboard")
    except ImportError:
        raise ConfigError("search.tensorboard: needs `pip install 'rlprune[tensorboard]'`") from None
