"""Public names of a package that load when they are first used, so that importing the package stays quick."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any


def lazy_names(
    package: str, names: Mapping[str, str], modules: Collection[str] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` of a package, for its ``__init__``.

    Type checkers see the names by imports of their own under ``TYPE_CHECKING``. No name may be that of a module of the
    package: Python would put the module in its place.

    Args:
        package: the package's ``__name__``.
        names: public name -> the module below the package that defines it.
        modules: modules below the package that are public as a whole.
    """

    def load(name: str) -> Any:
        if name in modules:
            return importlib.import_module(f".{name}", package)
        if name not in names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f".{names[name]}", package), name)
        setattr(sys.modules[package], name, value)
        return value

    def public() -> list[str]:
        return sorted({*vars(sys.modules[package]), *names, *modules})

    return load, public
