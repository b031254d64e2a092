"""Imports all task types that come with rlprune: every file of this package, and those of the wings."""

import pkgutil
from importlib import import_module
from pathlib import Path

from ..adapter import adapters

for _file in pkgutil.iter_modules([str(Path(__file__).parent)]):
    if _file.name != "shipped":
        import_module(f"..{_file.name}", __name__)
adapters()
