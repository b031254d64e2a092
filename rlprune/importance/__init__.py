"""Unit importances: which units of a group go first.

The names of :data:`__all__` load when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..utils.lazy import lazy_names

if TYPE_CHECKING:
    from .calibration_cache import CURVES, CalibrationCache
    from .gradient import (
        saap,
        taylor,
        taylor_param_first,
        taylor_param_mix,
        taylor_param_second,
        taylor_vector,
    )
    from .importance import IMPORTANCES, bn_scale, l1, l2, magnitude, random, register

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "CURVES": "calibration_cache",
        "CalibrationCache": "calibration_cache",
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
    },
)

__all__ = [
    "CURVES",
    "IMPORTANCES",
    "CalibrationCache",
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
