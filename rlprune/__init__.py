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
    from . import (
        agents,
        artifacts,
        config,
        evaluation,
        importance,
        plugins,
        pruning,
        recovery,
        rules,
        workloads,
    )
    from .agents import agent
    from .agents.ppo.policy import load_policy
    from .api import load, save, trace
    from .benchmarks.verb import benchmark
    from .config.config import Config, load_config
    from .evaluation.evaluator import Evaluator
    from .experiments.apply import AppliedPolicy, apply
    from .experiments.build import build_workload
    from .experiments.export import export_format
    from .experiments.result import PruningResult
    from .experiments.search import search
    from .experiments.train import train
    from .language.text import text_data
    from .pruning.cost_metrics import cost_metric, parameter_cost
    from .pruning.plan import Plan, make_plan
    from .pruning.space import Group, PruningSpace
    from .pruning.surgery import masked, prune
    from .recovery.steps import RecoveryContext, recovery_step
    from .rules import Context, rule
    from .utils.progress import Callback
    from .vision.data import ImageSource, data_set
    from .workloads import Workload
    from .workloads.score_kinds import score_kind

__version__ = "0.1.0"

_NAMES = {
    "AppliedPolicy": "experiments.apply",
    "Callback": "utils.progress",
    "Config": "config.config",
    "Context": "rules",
    "Evaluator": "evaluation.evaluator",
    "Group": "pruning.space",
    "ImageSource": "vision.data",
    "Plan": "pruning.plan",
    "PruningResult": "experiments.result",
    "PruningSpace": "pruning.space",
    "RecoveryContext": "recovery.steps",
    "Workload": "workloads",
    "agent": "agents",
    "apply": "experiments.apply",
    "benchmark": "benchmarks.verb",
    "build_workload": "experiments.build",
    "cost_metric": "pruning.cost_metrics",
    "data_set": "vision.data",
    "export_format": "experiments.export",
    "load": "api",
    "load_config": "config.config",
    "load_policy": "agents.ppo.policy",
    "make_plan": "pruning.plan",
    "masked": "pruning.surgery",
    "parameter_cost": "pruning.cost_metrics",
    "prune": "pruning.surgery",
    "recovery_step": "recovery.steps",
    "rule": "rules",
    "save": "api",
    "search": "experiments.search",
    "score_kind": "workloads.score_kinds",
    "text_data": "language.text",
    "trace": "api",
    "train": "experiments.train",
}
_MODULES = {
    "agents": "agents",
    "artifacts": "artifacts",
    "config": "config",
    "evaluation": "evaluation",
    "importance": "importance",
    "plugins": "plugins",
    "pruning": "pruning",
    "recovery": "recovery",
    "rules": "rules",
    "workloads": "workloads",
}

__all__ = [
    "AppliedPolicy",
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
    "ImageSource",
    "Plan",
    "PruningResult",
    "PruningSpace",
    "RecoveryContext",
    "RlpruneError",
    "Workload",
    "__version__",
    "agent",
    "agents",
    "apply",
    "artifacts",
    "benchmark",
    "build_workload",
    "config",
    "cost_metric",
    "data_set",
    "envs",
    "evaluation",
    "export_format",
    "importance",
    "load",
    "load_config",
    "load_policy",
    "make_plan",
    "masked",
    "parameter_cost",
    "plugins",
    "prune",
    "pruning",
    "recovery",
    "recovery_step",
    "rule",
    "rules",
    "save",
    "score_kind",
    "search",
    "text_data",
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
