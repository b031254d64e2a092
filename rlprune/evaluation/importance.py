"""Unit scores by name for a workload's model."""

from __future__ import annotations

from torch import nn

from ..importance.calibration_cache import CalibrationCache
from ..importance.importance import find_importance
from ..importance.unit_scores import Scores
from ..pruning.space import PruningSpace
from ..workloads.base import Workload


def compute(
    name: str,
    workload: Workload,
    space: PruningSpace,
    seed: int = 0,
    model: nn.Module | None = None,
    *,
    limit: int | None = None,
    ridge: float = 1e-3,
    calibration: CalibrationCache | None = None,
) -> Scores:
    """G arrays of unit scores of a workload's dense model (or of ``model``), on its calibration split.

    Args:
        limit: calibration samples that are read (LLM-Pruner's published setting is 10); None for all.
        ridge: penalty of importances that solve regressions.
        calibration: what has been measured of the model already; made here when not given.

    Raises:
        ConfigError: unknown name, or one that this kind of model cannot use.
    """
    found = find_importance(name)
    if calibration is None:
        subject = workload.model if model is None else model
        calibration = workload.adapter.calibration(
            workload, space, subject, seed=seed, limit=limit, ridge=ridge
        )
    return found.function(calibration)
