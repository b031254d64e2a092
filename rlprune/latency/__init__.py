"""Timing, and the latency tables that budgets in milliseconds are met by.

The names of :data:`__all__` load when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..utils.lazy import lazy_names

if TYPE_CHECKING:
    from .profile import with_latency

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "with_latency": "profile",
    },
)

__all__ = [
    "with_latency",
]
