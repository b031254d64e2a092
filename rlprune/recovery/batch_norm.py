"""Batch-norm statistics of a cut model, from the calibration data.

A few hundred images give statistics that are off by as much as a cut changes them. The dense model's own ones, over
all that it was trained on, are far better known. What the cut has changed is therefore measured as a difference: what
comes to each batch norm of both models from the same images, and the dense model's own statistics are changed by what
lies between the two (control variates; Owen 2013, Monte Carlo theory, methods and examples, section 8.9). Where nothing
is cut, nothing changes.

While the images pass, batch norms normalise with the images' own statistics, as in training: then no layer sees what
the sample is off by in the layers before. Some models are no longer themselves then: where a layer lives on inputs that
hardly vary, small changes of each channel's scale are blown up, and what the closed form was solved for is gone. Such
models run with their own statistics instead, the dense one with those it has and the cut one with the corrected ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..importance.unit_scores import Batches
from ..pruning.plan import Plan
from ..pruning.surgery import Kept, axis_indices, cut_tensor, cuts_by_tensor
from ..utils.modes import evaluating
from ..utils.pytrees import call
from ..utils.torch_internals import BATCH_NORM

# Mean square of how far means may move, in standard deviations, when a model's batch norms normalise with the images'
# own statistics: 0.08 at most on ten models, 2.0 on the one that was no longer itself.
STEADY = 0.25

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

    @classmethod
    def arriving(cls, x: Tensor) -> Statistics:
        """Those of the channels of an input (N, C, ...)."""
        x = x.detach().to(torch.promote_types(x.dtype, torch.float32))
        mean, variance = x.new_zeros(x.shape[1]), x.new_zeros(x.shape[1])
        count = x.numel() // max(1, x.shape[1])
        if count == 1:
            return cls(x.reshape(-1), variance)
        # In one pass over the input; torch.var_mean takes two to ten times as long.
        F.batch_norm(x, mean, variance, training=True, momentum=1.0)
        return cls(mean, variance * ((count - 1) / count))

    @classmethod
    def pooled(cls, batches: Sequence[Statistics]) -> Statistics:
        """Those of several batches of one size together."""
        means = torch.stack([one.mean for one in batches])
        within = torch.stack([one.variance for one in batches]).mean(dim=0)
        return cls(means.mean(dim=0), within + means.var(dim=0, correction=0))

    def cut(self, kept: Sequence[tuple[int, Kept]]) -> Statistics:
        """What a plan leaves of them."""
        return Statistics(cut_tensor(self.mean, kept), cut_tensor(self.variance, kept))

    def give(self, norm: Norm) -> None:
        """Put them into a batch norm."""
        assert norm.running_mean is not None and norm.running_var is not None
        norm.running_mean.copy_(self.mean)
        norm.running_var.copy_(self.variance)

    def changed(self, before: Statistics, after: Statistics, epsilon: float) -> Statistics:
        """These, changed as ``before`` has become ``after``: variances by the ratio, and means so that what the sample
        is off by shrinks or grows with the standard deviation.

        ``epsilon`` is the batch norm's own: a variance far below it is one of a channel that is switched off.
        """
        ratio = (after.variance + epsilon) / (before.variance + epsilon)
        variance = ((self.variance + epsilon) * ratio - epsilon).clamp_min(0.0)
        return Statistics(after.mean + (self.mean - before.mean) * ratio.sqrt(), variance)

    def distance(self, other: Statistics, epsilon: float) -> float:
        """Mean square over the channels of how far the other means are, in standard deviations."""
        return float(((other.mean - self.mean).square() / (self.variance + epsilon)).mean())


@dataclass(frozen=True)
class Arrivals:
    """What comes to the batch norms of the dense model: by name, batch by batch.

    ``steady``: whether the model stays itself when its batch norms normalise with the images' own statistics; what
    comes to them was measured that way then.
    """

    statistics: Mapping[str, Sequence[Statistics]]
    steady: bool


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


def arrivals(model: nn.Module, batches: Callable[[], Batches]) -> Arrivals:
    """What ``batches()`` bring the batch norms of the dense model, which keeps its statistics."""
    norms = _norms(model)
    own = {name: Statistics.of(norm) for name, norm in norms.items()}
    as_is: dict[str, list[Statistics]] = {name: [] for name in norms}
    normalised: dict[str, list[Statistics]] = {name: [] for name in norms}

    def normalise(name: str, norm: Norm, arriving: Statistics) -> None:
        normalised[name].append(arriving)
        arriving.give(norm)

    _pass(model, batches(), lambda name, _, arriving: as_is[name].append(arriving))
    try:
        _pass(model, batches(), normalise)
    finally:
        for name, norm in norms.items():
            own[name].give(norm)
    apart = [
        Statistics.pooled(as_is[name]).distance(Statistics.pooled(normalised[name]), norm.eps)
        for name, norm in norms.items()
        if as_is[name]
    ]
    steady = all(distance < STEADY for distance in apart)
    return Arrivals(normalised if steady else as_is, steady)


def correct_statistics(slim: nn.Module, plan: Plan, batches: Batches, dense: Arrivals) -> None:
    """Change the statistics of ``slim``, which are those that ``plan`` has left of the dense model's own, in place.

    Args:
        dense: what the same batches bring the dense model (`arrivals`).
    """
    norms = _norms(slim)
    own = {name: Statistics.of(norm) for name, norm in norms.items()}
    cuts = cuts_by_tensor(plan.space, axis_indices(plan.space, plan.kept))
    before = {
        name: [one.cut(cuts.get(f"{name}.running_mean", [])) for one in dense.statistics[name]]
        for name in norms
    }
    after: dict[str, list[Statistics]] = {name: [] for name in norms}

    def correct(name: str, norm: Norm, arriving: Statistics) -> None:
        known = before[name][len(after[name])]
        after[name].append(arriving)
        (arriving if dense.steady else own[name].changed(known, arriving, norm.eps)).give(norm)

    _pass(slim, batches, correct)
    for name, norm in norms.items():
        if after[name]:
            pooled = Statistics.pooled(before[name]), Statistics.pooled(after[name])
            own[name].changed(*pooled, norm.eps).give(norm)


def _pass(model: nn.Module, batches: Batches, watch: Callable[[str, Norm, Statistics], None]) -> None:
    """Run a model in eval mode; ``watch`` is told what comes to a batch norm before that uses its statistics."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda norm, inputs: watch(name, cast("Norm", norm), Statistics.arriving(inputs[0]))

    handles = [norm.register_forward_pre_hook(hook(name)) for name, norm in _norms(model).items()]
    try:
        with torch.no_grad(), evaluating(model):
            for inputs, _ in batches:
                call(model, inputs)
    finally:
        for handle in handles:
            handle.remove()


def _norms(model: nn.Module) -> dict[str, Norm]:
    """The batch norms that keep statistics, by name."""
    found = {n: m for n, m in model.named_modules() if isinstance(m, BATCH_NORM) and m.track_running_stats}
    return cast("dict[str, Norm]", found)
