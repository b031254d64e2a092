"""PPO over the pruning distribution in stages: prune, recover, look again, prune on."""

from __future__ import annotations

from dataclasses import replace

from ..search_settings import SearchConfig
from .ppo import PPOAgent


class StagedPPO(PPOAgent):
    """:class:`PPOAgent` with ``mode=direct`` and the stages of ``search.ppo_stages``; each stage is charged."""

    def __init__(self, settings: SearchConfig | None = None) -> None:
        settings = settings or SearchConfig()
        super().__init__(replace(settings, mode="direct", stages=settings.ppo_stages.stages))
