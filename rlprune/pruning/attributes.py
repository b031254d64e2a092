"""Sizes that a module keeps in Python attributes, named by a path: ``splits[1]``, ``feature_info[3].num_chs``.

A path starts with an attribute of the module itself; ``[i]`` takes an item of a list or tuple, ``.key`` an entry of a
dict or an attribute of a plain object. What it ends at is a whole number of 0 and more, or a tuple of one.
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn

_PATH = re.compile(r"[A-Za-z]\w*(\[\d+\]|\.[A-Za-z]\w*)*", re.ASCII)
_STEP = re.compile(r"\[(\d+)\]|\.?([A-Za-z]\w*)", re.ASCII)


def get_size(module: nn.Module, path: str) -> int:
    """The whole number at a path of a module; LookupError where there is none."""
    value: Any = module
    for step in size_path(path):
        value = _step(value, step, path)
    if _is_size(value):
        return int(value)
    if isinstance(value, tuple) and len(value) == 1 and _is_size(value[0]):
        return int(value[0])
    raise LookupError(f"{path!r} is no whole number of 0 and more")


def set_size(module: nn.Module, path: str, value: int) -> None:
    """Put another whole number in the place of the one at a path; tuples on the way are made anew.

    LookupError where there is no such number: nothing else is ever set.
    """
    get_size(module, path)
    _put(module, size_path(path), value, path)


def size_path(path: str) -> list[str | int]:
    """The steps of a path: names and indices; LookupError where it is none. Names with a leading _ are not taken."""
    if not _PATH.fullmatch(path):
        raise LookupError(f"{path!r} is no path such as name, name[1] or name[1].key")
    return [int(index) if index else name for index, name in _STEP.findall(path)]


def _put(owner: Any, steps: list[str | int], value: int, path: str) -> None:
    """Set what the steps lead to; a tuple is replaced in its own owner."""
    *way, last = steps
    inner = owner
    for step in way:
        inner = _step(inner, step, path)
    if not isinstance(inner, tuple):
        old = _step(inner, last, path)
        _assign(inner, last, type(old)((value,)) if isinstance(old, tuple) and _is_size(value) else value)
        return
    assert isinstance(last, int)
    items = [*inner[:last], value, *inner[last + 1 :]]
    _put(owner, way, _like(inner, items), path)


def _like(old: tuple[Any, ...], items: list[Any]) -> Any:
    """A tuple of the same class; a named one is made from its fields."""
    return type(old)(*items) if hasattr(old, "_fields") else type(old)(items)


def _assign(owner: Any, step: str | int, value: Any) -> None:
    if isinstance(step, str) and not isinstance(owner, dict):
        setattr(owner, step, value)
    else:
        owner[step] = value


def _step(value: Any, step: str | int, path: str) -> Any:
    try:
        if isinstance(step, int):
            if isinstance(value, (list, tuple)):
                return value[step]
        elif isinstance(value, dict):
            return value[step]
        else:
            return vars(value)[step]
    except (IndexError, KeyError, TypeError):
        pass
    raise LookupError(f"{path!r}: there is no {step!r}")


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
