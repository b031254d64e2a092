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
        execution,
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
        tracking,
        utils,
        vision,
        workloads,
    )
    from .agents import agent
    from .agents.ppo.policy import load_policy
    from .api import load, load_plan, save, trace
    from .benchmarks.verb import benchmark
    from .config.config import Config, load_config
    from .evaluation.evaluator import Evaluator
    from .experiments.apply import AppliedPolicy, apply
    from .experiments.build import build_workload
    from .experiments.formats import export_format
    from .experiments.result import PruningResult
    from .experiments.search import search
    from .experiments.train import train
    from .language.runtimes import runtime
    from .language.text import text_data
    from .pruning.compose import compose
    from .pruning.cost_metrics import cost_metric, parameter_cost
    from .pruning.plan import Plan, make_plan
    from .pruning.space import Group, PruningSpace
    from .pruning.surgery import masked, prune
    from .recovery.steps import RecoveryContext, recovery_step
    from .rules import Context, rule
    from .utils.progress import Callback
    from .vision.data import ImageSource, data_set
    from .workloads import LoaderWorkload, TaskType, TorchMetric, Workload, task_type
    from .workloads.score_kinds import score_kind

__version__ = "0.2.0"

_NAMES = {
    "AppliedPolicy": "experiments.apply",
    "Callback": "utils.progress",
    "Config": "config.config",
    "Context": "rules",
    "Evaluator": "evaluation.evaluator",
    "Group": "pruning.space",
    "ImageSource": "vision.data",
    "LoaderWorkload": "workloads",
    "Plan": "pruning.plan",
    "PruningResult": "experiments.result",
    "PruningSpace": "pruning.space",
    "RecoveryContext": "recovery.steps",
    "TaskType": "workloads",
    "TorchMetric": "workloads",
    "Workload": "workloads",
    "agent": "agents",
    "apply": "experiments.apply",
    "benchmark": "benchmarks.verb",
    "build_workload": "experiments.build",
    "compose": "pruning.compose",
    "cost_metric": "pruning.cost_metrics",
    "data_set": "vision.data",
    "export_format": "experiments.formats",
    "load": "api",
    "load_config": "config.config",
    "load_plan": "api",
    "load_policy": "agents.ppo.policy",
    "make_plan": "pruning.plan",
    "masked": "pruning.surgery",
    "parameter_cost": "pruning.cost_metrics",
    "prune": "pruning.surgery",
    "recovery_step": "recovery.steps",
    "rule": "rules",
    "runtime": "language.runtimes",
    "save": "api",
    "search": "experiments.search",
    "score_kind": "workloads.score_kinds",
    "task_type": "workloads",
    "text_data": "language.text",
    "trace": "api",
    "train": "experiments.train",
}
_MODULES = (
    "agents",
    "artifacts",
    "benchmarks",
    "config",
    "evaluation",
    "execution",
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
    "tracking",
    "utils",
    "vision",
    "workloads",
)

__getattr__, __dir__ = lazy_names(__name__, _NAMES, _MODULES)

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
    "LoaderWorkload",
    "Plan",
    "PruningResult",
    "PruningSpace",
    "RecoveryContext",
    "RlpruneError",
    "TaskType",
    "TorchMetric",
    "Workload",
    "__version__",
    "agent",
    "agents",
    "apply",
    "artifacts",
    "benchmark",
    "benchmarks",
    "build_workload",
    "compose",
    "config",
    "cost_metric",
    "data_set",
    "envs",
    "evaluation",
    "execution",
    "experiments",
    "export_format",
    "importance",
    "language",
    "latency",
    "load",
    "load_config",
    "load_plan",
    "load_policy",
    "make_plan",
    "masked",
    "parameter_cost",
    "plugins",
    "prune",
    "pruning",
    "recovery",
    "recovery_step",
    "report",
    "rule",
    "rules",
    "runtime",
    "save",
    "score_kind",
    "search",
    "surrogates",
    "task_type",
    "text_data",
    "trace",
    "tracing",
    "tracking",
    "train",
    "utils",
    "vision",
    "workloads",
]
