"""Models of images, and every model of a user's that is no causal language model.

The names of :data:`__all__` load when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..utils.lazy import lazy_names

if TYPE_CHECKING:
    from .image_folder import DataWarning
    from .workload import VisionWorkload
    from .zoo import base_of, build_model, example_for, task_of

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "DataWarning": "image_folder",
        "VisionWorkload": "workload",
        "base_of": "zoo",
        "build_model": "zoo",
        "example_for": "zoo",
        "task_of": "zoo",
    },
)

__all__ = [
    "DataWarning",
    "VisionWorkload",
    "base_of",
    "build_model",
    "example_for",
    "task_of",
]
