"""The Gymnasium environments; importing this package registers them (their code loads on first use)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import gymnasium

from ..utils.lazy import lazy_names

if TYPE_CHECKING:
    from .distribution import DistributionEnv
    from .observation import BOUND, FEATURE_VERSIONS, KINDS
    from .sequential import SequentialEnv
    from .task import KNOTS, Task, deviate

DISTRIBUTION = "rlprune/Distribution-v0"
SEQUENTIAL = "rlprune/Sequential-v0"


def register() -> None:
    """Register both environments with Gymnasium by string entry points; safe to call again."""
    for name, entry in (
        (DISTRIBUTION, "distribution:DistributionEnv"),
        (SEQUENTIAL, "sequential:SequentialEnv"),
    ):
        if name not in gymnasium.registry:
            gymnasium.register(name, entry_point=f"rlprune.envs.{entry}")


register()

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "BOUND": "observation",
        "DistributionEnv": "distribution",
        "FEATURE_VERSIONS": "observation",
        "KINDS": "observation",
        "KNOTS": "task",
        "SequentialEnv": "sequential",
        "Task": "task",
        "deviate": "task",
    },
)

__all__ = [
    "BOUND",
    "DISTRIBUTION",
    "FEATURE_VERSIONS",
    "KINDS",
    "KNOTS",
    "SEQUENTIAL",
    "DistributionEnv",
    "SequentialEnv",
    "Task",
    "deviate",
    "register",
]
