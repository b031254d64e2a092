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
        FinishConfig,
        ModelConfig,
        PruneConfig,
        RecoveryConfig,
        ScoreConfig,
        load_config,
    )
    from .search import SearchConfig

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "BudgetConfig": "config",
        "Config": "config",
        "DataConfig": "config",
        "FinishConfig": "config",
        "ModelConfig": "config",
        "PruneConfig": "config",
        "RecoveryConfig": "config",
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
