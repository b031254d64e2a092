"""Further recovery steps: in addition to `bias`, `reconstruct`, `bn` and `finetune`, registered one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..config.names import RECOVERY_STEPS, StepName
from ..config.training import RecoveryConfig
from ..errors import ConfigError, near_miss
from ..importance.calibration_cache import CalibrationCache
from ..importance.unit_scores import Scores
from ..pruning.plan import Plan
from ..pruning.space import PruningSpace
from ..utils.registry import named_errors

Repair = Callable[[nn.Module, Plan], None]
"""Repairs a cut model in place: ``repair(slim, plan)``."""
PLACES = ("reconstruct", "bn", "finetune")


@dataclass(frozen=True)
class RecoveryContext:
    """What a recovery step may look at when it is prepared, once for each model that candidates are cut from.

    ``calibration`` gives the data (``batches``) and keeps what is slow to measure (``cached``); ``importance`` holds
    one array of unit scores a group, None where no plan is made by them; ``settings`` are those of section `recovery`.
    """

    calibration: CalibrationCache
    settings: RecoveryConfig
    importance: Scores | None

    @property
    def model(self) -> nn.Module:
        """The model that candidates are cut from; not to be changed."""
        return self.calibration.model

    @property
    def space(self) -> PruningSpace:
        return self.calibration.space

    def batches(self) -> Iterator[tuple[Any, Any]]:
        """Batches (inputs, targets) of the calibration split, ``recovery.samples`` of them."""
        return self.calibration.batches(self.settings.samples)


Prepare = Callable[[RecoveryContext], Repair]


def recovery_step(
    summary: str, *, after: str | None = "bn", wing: str | None = None, name: str | None = None
) -> Callable[[Prepare], Prepare]:
    """Register a recovery step (a name for ``recovery.steps``) under the name of the function below.

    The function takes a :class:`RecoveryContext`, prepares what all candidates share, and returns
    ``repair(slim, plan)``, which repairs a cut model in place; the same plan has to give the same weights.

    Args:
        summary: one line for ``rlprune list recoveries``.
        after: the step that it runs after, "reconstruct" (after both closed forms), "bn" or "finetune"; None for
            before all others. Several in one place run in the order in which they were registered.
        wing: the only wing whose models have the step ("language": causal language models); None for all.
        name: instead of the function's own.

    Raises (when applied):
        ConfigError: the name is taken, the summary is missing, or ``after`` is no such step.
    """
    if after is not None and after not in PLACES:
        hint = near_miss(after, PLACES)
        raise ConfigError(
            f"recovery_step: after={after!r} is no place{hint}; allowed: {', '.join(PLACES)}, None"
        )
    return RECOVERY_STEPS.decorator(
        "recovery_step", summary, lambda own, function: StepName(own, summary, function, wing, after), name
    )


def further_steps(settings: RecoveryConfig) -> list[str]:
    """The steps of the settings that were registered, in their order."""
    return [step for step in settings.steps if RECOVERY_STEPS.source(step) is not None]


def prepared(name: str, context: RecoveryContext) -> Repair:
    """The repair that a registered step makes for a model; ConfigError naming the step where it makes none."""
    with named_errors("recovery_step", name):
        repair = RECOVERY_STEPS.source(name)(context)
    if not callable(repair):
        raise ConfigError(
            f"recovery_step {name!r}: must return a function repair(slim, plan), got {type(repair).__name__}"
        )

    def checked(slim: nn.Module, plan: Plan) -> None:
        with named_errors("recovery_step", name):
            repair(slim, plan)

    return checked
