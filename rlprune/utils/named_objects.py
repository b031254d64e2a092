"""Functions that settings name as ``module:function``."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import ConfigError, described, near_miss


def named_object(name: str, field: str) -> Any:
    """What ``module:name`` stands for; the current folder is searched too. ``field`` names the setting in errors."""
    module_name, _, attribute = name.partition(":")
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(f"{field} {name!r}: cannot import {module_name!r} ({error})") from error
    except Exception as error:
        raise ConfigError(
            f"{field} {name!r}: importing {module_name!r} failed: {described(error)}"
        ) from error
    finally:
        sys.path.remove(here)
    if not hasattr(module, attribute):
        hint = near_miss(attribute, [n for n in vars(module) if not n.startswith("_")])
        raise ConfigError(f"{field} {name!r}: {module_name!r} has no {attribute!r}{hint}")
    return getattr(module, attribute)


def model_function(name: str, field: str) -> Callable[..., Any]:
    """The function that ``module:function`` stands for; ConfigError where it is none."""
    function = named_object(name, field)
    if not callable(function):
        raise ConfigError(f"{field} {name!r}: is no function")
    found: Callable[..., Any] = function
    return found
