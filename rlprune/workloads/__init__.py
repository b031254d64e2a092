"""What is pruned and how it is judged: models, data splits, losses and metrics."""

from .base import SPLITS, Batch, Quality, Workload
from .build import build_workload, resolve_device, train_dense
from .checkpoint import load_checkpoint
from .data import VisionData, cache_folder, list_data, load_data
from .vision import VisionWorkload
from .zoo import base_of, build_model, list_models, rebuild

__all__ = [
    "SPLITS",
    "Batch",
    "Quality",
    "VisionData",
    "VisionWorkload",
    "Workload",
    "base_of",
    "build_model",
    "build_workload",
    "cache_folder",
    "list_data",
    "list_models",
    "load_checkpoint",
    "load_data",
    "rebuild",
    "resolve_device",
    "train_dense",
]
