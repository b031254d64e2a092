"""Methods compared through one fair door.

The names of :data:`__all__` load when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..utils.lazy import lazy_names

if TYPE_CHECKING:
    from .benchmark import run
    from .cells import Cell, cell_key
    from .outcome import page
    from .statistics import bootstrap, difference, spread, summarise

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "Cell": "cells",
        "bootstrap": "statistics",
        "cell_key": "cells",
        "difference": "statistics",
        "page": "outcome",
        "run": "benchmark",
        "spread": "statistics",
        "summarise": "statistics",
    },
)

__all__ = [
    "Cell",
    "bootstrap",
    "cell_key",
    "difference",
    "page",
    "run",
    "spread",
    "summarise",
]
