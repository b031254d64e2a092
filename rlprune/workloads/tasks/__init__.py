"""What a model's outputs mean: one file a task.

The names of :data:`__all__` load when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...utils.lazy import lazy_names

if TYPE_CHECKING:
    from .base import TASK_TYPES, TaskType, find_task, task_type
    from .classification import Classification
    from .embedding import Embedding
    from .multilabel import Multilabel
    from .outputs import find_output
    from .own import Own
    from .regression import Regression
    from .segmentation import Segmentation, SequenceLabels

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "Classification": "classification",
        "Embedding": "embedding",
        "Multilabel": "multilabel",
        "Own": "own",
        "Regression": "regression",
        "Segmentation": "segmentation",
        "SequenceLabels": "segmentation",
        "TASK_TYPES": "base",
        "TaskType": "base",
        "find_output": "outputs",
        "find_task": "base",
        "task_type": "base",
    },
)

__all__ = [
    "TASK_TYPES",
    "Classification",
    "Embedding",
    "Multilabel",
    "Own",
    "Regression",
    "Segmentation",
    "SequenceLabels",
    "TaskType",
    "find_output",
    "find_task",
    "task_type",
]
