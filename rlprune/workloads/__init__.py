"""What is pruned and how it is judged: models, data splits, losses and metrics."""

from .base import SPLITS, Batch, Quality, Workload
from .build import build_workload, list_data, list_models, resolve_device, train_dense
from .causal import Causal, load_causal
from .checkpoint import load_checkpoint
from .data import VisionData, cache_folder, load_data
from .judge import Judge, Judgement
from .language import LanguageWorkload
from .text import TextData, TextSplit, load_text
from .vision import VisionWorkload
from .zoo import base_of, build_model, rebuild

__all__ = [
    "SPLITS",
    "Batch",
    "Causal",
    "Judge",
    "Judgement",
    "LanguageWorkload",
    "Quality",
    "TextData",
    "TextSplit",
    "VisionData",
    "VisionWorkload",
    "Workload",
    "base_of",
    "build_model",
    "build_workload",
    "cache_folder",
    "list_data",
    "list_models",
    "load_causal",
    "load_checkpoint",
    "load_data",
    "load_text",
    "rebuild",
    "resolve_device",
    "train_dense",
]
