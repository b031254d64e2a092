"""Settings: their schema, their documentation, and the YAML files they are read from.

The names of :data:`__all__` load when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import Config, load_config

_NAMES = {
    "Config": "config",
    "load_config": "config",
}

__all__ = [
    "Config",
    "load_config",
]


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_NAMES[name]}", __name__), name)
