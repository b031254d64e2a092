"""What is pruned and how it is judged: data splits, losses and metrics."""

from .base import SPLITS, Batch, Quality, Workload
from .judge import Judge, Judgement

__all__ = ["SPLITS", "Batch", "Judge", "Judgement", "Quality", "Workload"]
