"""PPO over the pruning distribution: the agent's front."""

from __future__ import annotations

from ...config.search import SearchConfig
from ...envs.distribution import DistributionEnv
from ...errors import ConfigError
from ..base import SearchRequest, SearchResult, TrialRecorder
from ..callbacks import SearchLogger
from .direct_training import direct_search
from .surrogate_training import surrogate_search
from .trainer import Search


class PPOAgent:
    """PPO with the group policy, trained on real evaluations ("direct") or on a surrogate of them."""

    def __init__(self, settings: SearchConfig | None = None) -> None:
        self.settings = settings or SearchConfig()
        if self.settings.stages > 1 and self.settings.mode == "surrogate":
            raise ConfigError(
                "search.stages: more than 1 needs search.mode=direct (the surrogate has one stage)"
            )

    @property
    def reads_logits(self) -> bool:
        """Whether the logits of what is scored will be asked for, those of the starts among them."""
        return self.settings.mode == "surrogate" and self.settings.ppo.surrogate == "logits"

    def search(self, request: SearchRequest) -> SearchResult:
        """See :class:`rlprune.agents.base.Agent`; a saved ``state`` is continued to the very same result."""
        watcher = SearchLogger(request)
        recorders = tuple(TrialRecorder(account, watcher) for account in request.accounts)
        charged = [task.with_scorer(r) for task, r in zip(request.tasks, recorders, strict=True)]
        if request.policy is not None:  # its network reads the columns that it was trained on
            charged = [task.showing(request.policy.feature_version) for task in charged]
        env = DistributionEnv(tasks=charged, stages=self.settings.stages)
        search = Search(self.settings, request, env.tasks, recorders, env, watcher)
        return direct_search(search) if self.settings.mode == "direct" else surrogate_search(search)
