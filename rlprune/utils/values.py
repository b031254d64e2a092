"""Questions about the values of files that anybody may have written."""

from __future__ import annotations

import math
import reprlib
from typing import TypeGuard

_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxdict, _SHORT.maxstring, _SHORT.maxother = 2, 4, 3, 60, 60

LARGEST = 2**63 - 1
"""The largest whole number that numpy's and torch's integers hold."""
NO_DOUBLES = {"mps": "it has no float64, in which unit scores, closed forms and divergences are computed"}
"""Kinds of devices that models cannot be pruned on, with the reason."""


def is_whole(value: object, most: int = LARGEST) -> TypeGuard[int]:
    """Whether a value is a whole number from 0 to ``most``."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value is a number, NaN and infinities included, that a float can hold."""
    return isinstance(value, float) or (
        isinstance(value, int) and not isinstance(value, bool) and abs(value) <= LARGEST
    )


def is_finite(value: object) -> TypeGuard[float]:
    """Whether a value is a finite number."""
    return is_number(value) and math.isfinite(value)


def are_whole(value: object, most: int = LARGEST) -> TypeGuard[list[int]]:
    """Whether a value is a list of whole numbers from 0 to ``most``."""
    return isinstance(value, list) and all(is_whole(item, most) for item in value)


def are_texts(value: object) -> TypeGuard[list[str]]:
    """Whether a value is a list of texts."""
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def show_value(value: object) -> str:
    """A short picture of any value in one line; of a long or deep one only its beginning."""
    return " ".join(_SHORT.repr(value).split())
