"""Unit scores by name for a workload's model."""

from __future__ import annotations

from torch import nn

from ..config.config import AUTO
from ..importance.calibration_cache import CalibrationCache
from ..importance.importance import find_importance
from ..importance.unit_scores import Scores
from ..pruning.space import PruningSpace
from ..workloads.adapter import DefaultImportance, ModelAdapter
from ..workloads.base import Workload


def resolved(name: str, adapter: ModelAdapter, calibration: CalibrationCache) -> DefaultImportance:
    """The importance that a setting asks for: the one it names, or the adapter's for `auto`."""
    return adapter.default_importance(calibration) if name == AUTO else DefaultImportance(name)


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
        name: as in ``rlprune list importances``, or "auto" (see `ModelAdapter.default_importance`).
        limit: calibration samples that are read (LLM-Pruner's published setting is 10); None for all.
        ridge: penalty of importances that solve regressions.
        calibration: what has been measured of the model already; made here when not given.

    Raises:
        ConfigError: unknown name, or one that this kind of model cannot use.
    """
    if name != AUTO:
        find_importance(name)  # an unknown name is refused before anything is measured
    if calibration is None:
        subject = workload.model if model is None else model
        calibration = workload.adapter.calibration(
            workload, space, subject, seed=seed, limit=limit, ridge=ridge
        )
    return find_importance(resolved(name, workload.adapter, calibration).name).function(calibration)
