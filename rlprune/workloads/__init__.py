"""What is pruned and how it is judged: data splits, losses and metrics."""

from .base import SPLITS, Batch, Quality, Workload
from .build import build_workload, list_data, list_models, resolve_device, train_dense
from .checkpoint import load_checkpoint
from .judge import Judge, Judgement

__all__ = [
    "SPLITS",
    "Batch",
    "Judge",
    "Judgement",
    "Quality",
    "Workload",
    "build_workload",
    "list_data",
    "list_models",
    "load_checkpoint",
    "resolve_device",
    "train_dense",
]
