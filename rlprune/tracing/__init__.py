"""From a network to the groups of units that are cut together.

The names of :data:`__all__` load when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..utils.lazy import lazy_names

if TYPE_CHECKING:
    from .counting import macs_of_layers, wrong_layer
    from .trace import BranchWarning, TraceOptions, UnusedModuleWarning, count_macs

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "BranchWarning": "trace",
        "TraceOptions": "trace",
        "UnusedModuleWarning": "trace",
        "count_macs": "trace",
        "macs_of_layers": "counting",
        "wrong_layer": "counting",
    },
)

__all__ = [
    "BranchWarning",
    "TraceOptions",
    "UnusedModuleWarning",
    "count_macs",
    "macs_of_layers",
    "wrong_layer",
]
