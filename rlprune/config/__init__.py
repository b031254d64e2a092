"""Settings: their schema, their documentation, and the YAML files they are read from.

The names of :data:`__all__` load when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..utils.lazy import lazy_names

if TYPE_CHECKING:
    from .config import (
        BudgetConfig,
        Config,
        DataConfig,
        ModelConfig,
        PruneConfig,
        ScoreConfig,
        load_config,
    )
    from .search import SearchConfig
    from .training import FinishConfig, RecoveryConfig

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "BudgetConfig": "config",
        "Config": "config",
        "DataConfig": "config",
        "FinishConfig": "training",
        "ModelConfig": "config",
        "PruneConfig": "config",
        "RecoveryConfig": "training",
        "ScoreConfig": "config",
        "SearchConfig": "search",
        "load_config": "config",
    },
)

__all__ = [
    "BudgetConfig",
    "Config",
    "DataConfig",
    "FinishConfig",
    "ModelConfig",
    "PruneConfig",
    "RecoveryConfig",
    "ScoreConfig",
    "SearchConfig",
    "load_config",
]
