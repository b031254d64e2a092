"""Methods compared through one fair door.

The names of :data:`__all__` load when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .benchmark import run
    from .cells import Cell, cell_key
    from .outcome import page
    from .statistics import bootstrap, summarise

_NAMES = {
    "Cell": "cells",
    "bootstrap": "statistics",
    "cell_key": "cells",
    "page": "outcome",
    "run": "benchmark",
    "summarise": "statistics",
}

__all__ = [
    "Cell",
    "bootstrap",
    "cell_key",
    "page",
    "run",
    "summarise",
]


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_NAMES[name]}", __name__), name)
