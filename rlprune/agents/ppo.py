"""PPO over the pruning distribution: the agent's front."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..envs.distribution import DistributionEnv
from ..envs.task import Task
from ..errors import ConfigError
from ..search_settings import SearchConfig
from .base import Recorder, SearchResult, Starts, check_arguments
from .callbacks import Progress, Watcher
from .direct import direct_search
from .guided import guided_search
from .policy import PortablePolicy
from .state import StateDir
from .training import Search


class PPOAgent:
    """PPO with the group policy, trained on real evaluations ("direct") or on a surrogate of them."""

    def __init__(self, settings: SearchConfig | None = None) -> None:
        self.settings = settings or SearchConfig()
        if self.settings.stages > 1 and self.settings.mode == "surrogate":
            raise ConfigError(
                "search.stages: more than 1 needs search.mode=direct (the surrogate has one stage)"
            )

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
        """See :class:`rlprune.agents.base.Agent`; a saved ``state`` is continued to the very same result."""
        check_arguments(tasks, accounts, starts)
        watcher = Watcher(tasks, accounts, progress, tensorboard)
        recorders = tuple(Recorder(account, watcher) for account in accounts)
        charged = [task.with_scorer(r) for task, r in zip(tasks, recorders, strict=True)]
        if policy is not None:  # its network reads the columns that it was trained on
            charged = [task.showing(policy.feature_version) for task in charged]
        env = DistributionEnv(tasks=charged, stages=self.settings.stages)
        search = Search(self.settings, env.tasks, recorders, env, starts, seed, state, watcher, policy)
        return direct_search(search) if self.settings.mode == "direct" else guided_search(search)
