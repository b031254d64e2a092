"""Pruned models and policies on disk: safetensors and JSON, no pickle; and checkpoints of others.

The names of :data:`__all__` load when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..utils.lazy import lazy_names

if TYPE_CHECKING:
    from .checkpoint import CheckpointWarning, load_checkpoint, put_weights
    from .documents import ForeignFolderWarning

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "CheckpointWarning": "checkpoint",
        "ForeignFolderWarning": "documents",
        "load_checkpoint": "checkpoint",
        "put_weights": "checkpoint",
    },
)

__all__ = [
    "CheckpointWarning",
    "ForeignFolderWarning",
    "load_checkpoint",
    "put_weights",
]
