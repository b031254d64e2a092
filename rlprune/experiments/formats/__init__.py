"""Export formats, one file each: what a saved pruned model can be written as.

A new format is one new file here with a function under ``@export_format("what it is")``; it is found by itself.
"""

from __future__ import annotations

import importlib
import pkgutil

from .base import FORMATS, Export, Format, Written, export_format

_HELPERS = ("base", "single", "compare")

for _module in sorted(m.name for m in pkgutil.iter_modules(__path__)):
    if _module not in _HELPERS:
        importlib.import_module(f".{_module}", __name__)

__all__ = ["FORMATS", "Export", "Format", "Written", "export_format"]
