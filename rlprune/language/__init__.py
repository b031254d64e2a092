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
    from .files.llama_cpp import greedy_tokens, run_llama_cpp
    from .footprints import footprint
    from .proof import counted, generates_alike, random_plan
    from .runtimes import Restriction, read_by

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "Grams": "calibration.grams",
        "LanguageCalibration": "calibration.cache",
        "Restriction": "runtimes",
        "STATISTICS": "calibration.cache",
        "counted": "proof",
        "footprint": "footprints",
        "greedy_tokens": "files.llama_cpp",
        "generates_alike": "proof",
        "random_plan": "proof",
        "read_by": "runtimes",
        "run_llama_cpp": "files.llama_cpp",
    },
    modules=("families", "zeroshot"),
)

__all__ = [
    "STATISTICS",
    "Grams",
    "LanguageCalibration",
    "Restriction",
    "counted",
    "families",
    "footprint",
    "generates_alike",
    "greedy_tokens",
    "random_plan",
    "read_by",
    "run_llama_cpp",
    "zeroshot",
]
