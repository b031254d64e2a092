"""Causal language models of transformers: their adapter, texts, files and training.

The names of :data:`__all__` load when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..utils.lazy import lazy_names

if TYPE_CHECKING:
    from . import families, zeroshot
    from .calibration.cache import STATISTICS, LanguageCalibration
    from .calibration.grams import Grams
    from .footprints import footprint
    from .proof import counted, random_plan

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "Grams": "calibration.grams",
        "LanguageCalibration": "calibration.cache",
        "STATISTICS": "calibration.cache",
        "counted": "proof",
        "footprint": "footprints",
        "random_plan": "proof",
    },
    modules=("families", "zeroshot"),
)

__all__ = [
    "STATISTICS",
    "Grams",
    "LanguageCalibration",
    "counted",
    "families",
    "footprint",
    "random_plan",
    "zeroshot",
]
