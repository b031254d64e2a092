"""The scripts of the documentation as modules."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

from .pages import DOCS


def load_script(name: str) -> ModuleType:
    """``docs/scripts/NAME.py``; its siblings are importable, as Python lets a script import them."""
    folder = DOCS / "scripts"
    spec = importlib.util.spec_from_file_location(f"docs_{name}", folder / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    sys.path.insert(0, str(folder))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(folder))
    return module
