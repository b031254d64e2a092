"""Short recovery of a cut model before it is scored: bias, reconstruct, bn, finetune, always in this order.

Steps of others (`rlprune.recovery_step`) stand between them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from torch import nn

from ..config.training import RecoveryConfig
from ..importance.calibration_cache import CalibrationCache
from ..pruning.plan import Plan
from ..pruning.space import PruningSpace
from ..recovery.batch_norm import arrivals, correct_statistics, recalibrate
from ..recovery.steps import RecoveryContext, further_steps, prepared
from ..workloads.base import Workload


class Recovery:
    """The configured steps for one dense model; Gram matrices and dense logits are computed once.

    The closed forms and the gradient steps are those of the model's adapter.

    Args:
        model: the model that candidates are cut from (the workload's, or an earlier stage of it).
        importance: G arrays of unit scores that plans are made with: closed forms factorise their ranking.
        calibration: what has been measured of this model; made here when not given. Its Gram matrices are used up.
    """

    def __init__(
        self,
        workload: Workload,
        space: PruningSpace,
        settings: RecoveryConfig,
        model: nn.Module | None = None,
        importance: Sequence[ArrayLike] | None = None,
        calibration: CalibrationCache | None = None,
    ) -> None:
        adapter = workload.adapter
        if calibration is None:
            subject = workload.model if model is None else model
            calibration = adapter.calibration(workload, space, subject, recovery_limit=settings.samples)
        scores = None if importance is None else [np.asarray(s, dtype=np.float64) for s in importance]
        self._calibration, self._settings = calibration, settings
        self._closed_form = adapter.closed_form(calibration, settings, scores)
        self._gradient_steps = adapter.gradient_steps(workload, calibration, settings)
        context = RecoveryContext(calibration, settings, scores)
        self._further = {name: prepared(name, context) for name in further_steps(settings)}

    def __call__(self, slim: nn.Module, plan: Plan, limit: int | None = None) -> None:
        """Recover ``slim`` in place; the same plan always gives the same weights (CPU, fixed threads).

        ``limit``: at most so many calibration samples for batch-norm statistics, where a rough candidate will do.
        """
        samples = min((n for n in (self._settings.samples, limit) if n is not None), default=None)
        closed_form = self._closed_form
        for step in self._settings.steps:
            if step in self._further:
                self._further[step](slim, plan)
            elif step in ("bias", "reconstruct") and closed_form is not None:
                closed_form(slim, plan)  # both in one
                closed_form = None
            elif step == "bn":
                self._statistics(slim, plan, samples)
            elif step == "finetune":
                self._gradient_steps(slim)

    def _statistics(self, slim: nn.Module, plan: Plan, samples: int | None) -> None:
        calibration = self._calibration
        if self._settings.statistics == "measured":
            recalibrate(slim, calibration.batches(samples))
            return
        dense = calibration.cached(
            f"batch norm, {samples} samples",
            lambda: arrivals(calibration.model, lambda: calibration.batches(samples)),
        )
        correct_statistics(slim, plan, calibration.batches(samples), dense)

    @property
    def changes_all(self) -> bool:
        """Whether a step may change tensors that no plan cuts."""
        return "finetune" in self._settings.steps or bool(self._further)

    @property
    def nbytes(self) -> int:
        """Bytes that the closed form holds between candidates, where it says so."""
        return getattr(self._closed_form, "nbytes", 0)
