"""rlprune learns how much to prune from each layer of a network.

Everything public is a name of this module; the parts load when they are first used, so that importing
the package is quick. Importing it also registers the environments with Gymnasium.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import envs
from .errors import ArtifactError, BudgetError, ConfigError, DataError, GraphError, RlpruneError

if TYPE_CHECKING:
    from . import agents, artifacts, config, evaluation, importance, pruning, recovery, rules, workloads
    from .agents import agent
    from .agents.ppo.policy import load_policy
    from .api import load, save, trace
    from .config.config import Config, load_config
    from .evaluation.evaluator import Evaluator
    from .experiments.build import build_workload
    from .experiments.result import PruningResult
    from .experiments.search import search
    from .experiments.train import train
    from .pruning.plan import Plan, make_plan
    from .pruning.space import Group, PruningSpace
    from .pruning.surgery import masked, prune
    from .rules import Context, rule
    from .utils.progress import Callback
    from .workloads import Workload

__version__ = "0.1.0"

_NAMES = {
    "Callback": "utils.progress",
    "Config": "config.config",
    "Context": "rules",
    "Evaluator": "evaluation.evaluator",
    "Group": "pruning.space",
    "Plan": "pruning.plan",
    "PruningResult": "experiments.result",
    "PruningSpace": "pruning.space",
    "Workload": "workloads",
    "agent": "agents",
    "build_workload": "experiments.build",
    "load": "api",
    "load_config": "config.config",
    "load_policy": "agents.ppo.policy",
    "make_plan": "pruning.plan",
    "masked": "pruning.surgery",
    "prune": "pruning.surgery",
    "rule": "rules",
    "save": "api",
    "search": "experiments.search",
    "trace": "api",
    "train": "experiments.train",
}
_MODULES = {
    "agents": "agents",
    "artifacts": "artifacts",
    "config": "config",
    "evaluation": "evaluation",
    "importance": "importance",
    "pruning": "pruning",
    "recovery": "recovery",
    "rules": "rules",
    "workloads": "workloads",
}

__all__ = [
    "ArtifactError",
    "BudgetError",
    "Callback",
    "Config",
    "ConfigError",
    "Context",
    "DataError",
    "Evaluator",
    "GraphError",
    "Group",
    "Plan",
    "PruningResult",
    "PruningSpace",
    "RlpruneError",
    "Workload",
    "__version__",
    "agent",
    "agents",
    "artifacts",
    "build_workload",
    "config",
    "envs",
    "evaluation",
    "importance",
    "load",
    "load_config",
    "load_policy",
    "make_plan",
    "masked",
    "prune",
    "pruning",
    "recovery",
    "rule",
    "rules",
    "save",
    "search",
    "trace",
    "train",
    "workloads",
]


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        value = getattr(importlib.import_module(f".{_NAMES[name]}", __name__), name)
    elif name in _MODULES:
        value = importlib.import_module(f".{_MODULES[name]}", __name__)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
