"""Helpers that know nothing of pruning.

The names of :data:`__all__` load when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .lazy import lazy_names

if TYPE_CHECKING:
    from .files import read_json, write_json_atomic, write_text_atomic
    from .machine import hardware, processor
    from .progress import Callback, Console, ProgressEvent
    from .pytrees import batch_size, call, map_tensors, tensors, to_double
    from .timing import in_turns, measure, quiet_clock

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "Callback": "progress",
        "Console": "progress",
        "ProgressEvent": "progress",
        "batch_size": "pytrees",
        "call": "pytrees",
        "hardware": "machine",
        "in_turns": "timing",
        "map_tensors": "pytrees",
        "measure": "timing",
        "processor": "machine",
        "quiet_clock": "timing",
        "read_json": "files",
        "tensors": "pytrees",
        "to_double": "pytrees",
        "write_json_atomic": "files",
        "write_text_atomic": "files",
    },
)

__all__ = [
    "Callback",
    "Console",
    "ProgressEvent",
    "batch_size",
    "call",
    "hardware",
    "in_turns",
    "map_tensors",
    "measure",
    "processor",
    "quiet_clock",
    "read_json",
    "tensors",
    "to_double",
    "write_json_atomic",
    "write_text_atomic",
]
