"""From a plan to a built, recovered and scored candidate, and who is charged for it.

The names of :data:`__all__` load when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .evaluator import Evaluator

_NAMES = {
    "Evaluator": "evaluator",
}

__all__ = [
    "Evaluator",
]


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_NAMES[name]}", __name__), name)
