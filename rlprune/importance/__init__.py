"""Unit importances: which units of a group go first.

The names of :data:`__all__` load when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .gradient import (
        saap,
        taylor,
        taylor_param_first,
        taylor_param_mix,
        taylor_param_second,
        taylor_vector,
    )
    from .importance import IMPORTANCES, bn_scale, l1, l2, magnitude, random, register

_NAMES = {
    "IMPORTANCES": "importance",
    "bn_scale": "importance",
    "l1": "importance",
    "l2": "importance",
    "magnitude": "importance",
    "random": "importance",
    "register": "importance",
    "saap": "gradient",
    "taylor": "gradient",
    "taylor_param_first": "gradient",
    "taylor_param_mix": "gradient",
    "taylor_param_second": "gradient",
    "taylor_vector": "gradient",
}

__all__ = [
    "IMPORTANCES",
    "bn_scale",
    "l1",
    "l2",
    "magnitude",
    "random",
    "register",
    "saap",
    "taylor",
    "taylor_param_first",
    "taylor_param_mix",
    "taylor_param_second",
    "taylor_vector",
]


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_NAMES[name]}", __name__), name)
