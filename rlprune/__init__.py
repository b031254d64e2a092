"""rlprune learns how much to prune from each layer of a network.

Everything public is a name of this module; the parts load when they are first used, so that importing
the package is quick. Importing it also registers the environments with Gymnasium.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import envs
from .errors import ArtifactError, BudgetError, ConfigError, DataError, GraphError, RlpruneError
from .utils.lazy import lazy_names

if TYPE_CHECKING:
    from . import (
        agents,
        artifacts,
        benchmarks,
        config,
        evaluation,
        experiments,
        importance,
        language,
        latency,
        plugins,
        pruning,
        recovery,
        report,
        rules,
        surrogates,
        tracing,
        utils,
        vision,
        workloads,
    )
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
    from .workloads import LoaderWorkload, Workload

__version__ = "0.1.0"

_NAMES = {
    "Callback": "utils.progress",
    "Config": "config.config",
    "Context": "rules",
    "Evaluator": "evaluation.evaluator",
    "Group": "pruning.space",
    "LoaderWorkload": "workloads",
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
_MODULES = (
    "agents",
    "artifacts",
    "benchmarks",
    "config",
    "evaluation",
    "experiments",
    "importance",
    "language",
    "latency",
    "plugins",
    "pruning",
    "recovery",
    "report",
    "rules",
    "surrogates",
    "tracing",
    "utils",
    "vision",
    "workloads",
)

__getattr__, __dir__ = lazy_names(__name__, _NAMES, _MODULES)

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
    "LoaderWorkload",
    "Plan",
    "PruningResult",
    "PruningSpace",
    "RlpruneError",
    "Workload",
    "__version__",
    "agent",
    "agents",
    "artifacts",
    "benchmarks",
    "build_workload",
    "config",
    "envs",
    "evaluation",
    "experiments",
    "importance",
    "language",
    "latency",
    "load",
    "load_config",
    "load_policy",
    "make_plan",
    "masked",
    "plugins",
    "prune",
    "pruning",
    "recovery",
    "report",
    "rule",
    "rules",
    "save",
    "search",
    "surrogates",
    "trace",
    "tracing",
    "train",
    "utils",
    "vision",
    "workloads",
]
