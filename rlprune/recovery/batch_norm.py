"""Batch-norm statistics of a cut model, from the calibration data.

A few hundred images give statistics that are off by as much as a cut changes them. The dense model's own ones, over
all that it was trained on, are far better known. What the cut has changed is therefore measured as a difference: both
models are given statistics of the same images, and the dense model's own ones are changed by what lies between the two
(control variates; Owen 2013, Monte Carlo theory, methods and examples, section 8.9). Where nothing is cut, nothing
changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from ..importance.unit_scores import Batches
from ..pruning.plan import Plan
from ..pruning.surgery import axis_indices, cut_tensor, cuts_by_tensor
from ..utils.modes import evaluating
from ..utils.pytrees import call
from ..utils.torch_internals import BATCH_NORM

Norm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm


@dataclass(frozen=True)
class Statistics:
    """Mean and variance (C,) of a batch norm's channels."""

    mean: Tensor
    variance: Tensor

    @classmethod
    def of(cls, norm: Norm) -> Statistics:
        assert norm.running_mean is not None and norm.running_var is not None
        return cls(norm.running_mean.clone(), norm.running_var.clone())

    def give(self, norm: Norm) -> None:
        """Put them into a batch norm."""
        assert norm.running_mean is not None and norm.running_var is not None
        norm.running_mean.copy_(self.mean)
        norm.running_var.copy_(self.variance)

    def changed(self, before: Statistics, after: Statistics, epsilon: float) -> Statistics:
        """These, changed as ``before`` has become ``after``: means by the difference, variances by the ratio.

        ``epsilon`` is the batch norm's own: a variance far below it is one of a channel that is switched off.
        """
        ratio = (after.variance + epsilon) / (before.variance + epsilon)
        variance = ((self.variance + epsilon) * ratio - epsilon).clamp_min(0.0)
        return Statistics(self.mean + after.mean - before.mean, variance)


def recalibrate(model: nn.Module, batches: Batches) -> None:
    """Recompute all batch-norm statistics as the average over ``batches``, in place (EagleEye, arXiv 2007.02491).

    Everything but the batch norms stays in eval mode; modes and momenta are restored.
    """
    norms = list(_norms(model).values())
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    try:
        with torch.no_grad(), evaluating(model):
            for norm in norms:
                norm.reset_running_stats()
                norm.train()
            for number, (inputs, _) in enumerate(batches, start=1):
                for norm in norms:
                    # The plain average over all batches. torch's own (None) reads a counter from the device in every
                    # layer.
                    norm.momentum = 1.0 / number
                call(model, inputs)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def measured_statistics(model: nn.Module, batches: Batches) -> dict[str, Statistics]:
    """What `recalibrate` gives a model's batch norms, by name; the model keeps its own."""
    norms = _norms(model)
    own = {name: {k: v.clone() for k, v in norm.named_buffers()} for name, norm in norms.items()}
    try:
        recalibrate(model, batches)
        return {name: Statistics.of(norm) for name, norm in norms.items()}
    finally:
        for name, norm in norms.items():
            for key, value in own[name].items():
                getattr(norm, key).copy_(value)


def correct_statistics(
    slim: nn.Module, plan: Plan, batches: Batches, dense: Mapping[str, Statistics]
) -> None:
    """Change the statistics of ``slim``, which are those that ``plan`` has left of the dense model's own, in place.

    Args:
        dense: what the same batches give the dense model (`measured_statistics`).
    """
    norms = _norms(slim)
    own = {name: Statistics.of(norm) for name, norm in norms.items()}
    recalibrate(slim, batches)
    cuts = cuts_by_tensor(plan.space, axis_indices(plan.space, plan.kept))
    for name, norm in norms.items():
        kept = cuts.get(f"{name}.running_mean", [])
        before = Statistics(cut_tensor(dense[name].mean, kept), cut_tensor(dense[name].variance, kept))
        own[name].changed(before, Statistics.of(norm), norm.eps).give(norm)


def _norms(model: nn.Module) -> dict[str, Norm]:
    """The batch norms that keep statistics, by name."""
    found = {n: m for n, m in model.named_modules() if isinstance(m, BATCH_NORM) and m.track_running_stats}
    return cast("dict[str, Norm]", found)
