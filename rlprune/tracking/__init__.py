"""Runs in trackers that people already use, by one protocol; and the evaluation log as an Optuna study.

The names of :data:`__all__` load when they are first used, and a tracker's package when one is made.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..utils.lazy import lazy_names

if TYPE_CHECKING:
    from .base import Together, Tracker, TrackingCallback
    from .studies import to_optuna
    from .trackers import TRACKERS, MLflowTracker, TrackioTracker, WandbTracker, make_tracker

__all__ = [
    "TRACKERS",
    "MLflowTracker",
    "Together",
    "Tracker",
    "TrackingCallback",
    "TrackioTracker",
    "WandbTracker",
    "make_tracker",
    "to_optuna",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "TRACKERS": "trackers",
        "MLflowTracker": "trackers",
        "Together": "base",
        "Tracker": "base",
        "TrackingCallback": "base",
        "TrackioTracker": "trackers",
        "WandbTracker": "trackers",
        "make_tracker": "trackers",
        "to_optuna": "studies",
    },
)
