"""The Gymnasium environments; importing this package registers them (their code loads on first use)."""

from __future__ import annotations

import gymnasium

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
