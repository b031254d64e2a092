"""What is pruned and how it is judged: data splits, losses and metrics.

The names of :data:`__all__` load when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..utils.lazy import lazy_names

if TYPE_CHECKING:
    from .adapter import ModelAdapter, Tuned, TuneJob
    from .base import SPLITS, Batch, Quality, Workload
    from .checks import check_workload
    from .judge import Judge, Judgement
    from .loaders import LoaderWorkload
    from .metrics import TorchMetric
    from .scoring_format import ScoringFormat
    from .tasks import TaskType, task_type

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "Batch": "base",
        "Judge": "judge",
        "Judgement": "judge",
        "LoaderWorkload": "loaders",
        "ModelAdapter": "adapter",
        "Quality": "base",
        "SPLITS": "base",
        "ScoringFormat": "scoring_format",
        "TaskType": "tasks",
        "TorchMetric": "metrics",
        "TuneJob": "adapter",
        "Tuned": "adapter",
        "Workload": "base",
        "check_workload": "checks",
        "task_type": "tasks",
    },
)

__all__ = [
    "SPLITS",
    "Batch",
    "Judge",
    "Judgement",
    "LoaderWorkload",
    "ModelAdapter",
    "Quality",
    "ScoringFormat",
    "TaskType",
    "TorchMetric",
    "TuneJob",
    "Tuned",
    "Workload",
    "check_workload",
    "task_type",
]
