"""Numbers as they are: squared differences."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..metrics import Meter, Read, Targets
from .base import Scale, TaskType, shape_of, task_type

# A column of outputs that hardly varies counts as if it varied by this share of the others.
_LEAST = 1e-6


@task_type("numbers: outputs and targets of one shape", name="regression")
class Regression(TaskType):
    """Outputs and targets of one shape, (N,), (N, D) or maps.

    The divergence is the mean squared difference to the dense outputs, over the variance of these on the validation
    split (of each column, where outputs are (N, D)), so that it has no unit: 0 for the dense model, about 1 for a
    model that always answers their mean. The loss is the mean squared error, the metric R2, which is 1 at best.
    Distillation is the mean squared difference to the teacher.
    """

    metric_name = "R2"

    def misfit(self, read: Read, targets: Targets, own_loss: bool = False) -> str | None:
        if not read.is_floating_point():
            return f"the task 'regression' needs floating-point outputs, got {read.dtype}"
        if own_loss:
            return None
        if not isinstance(targets, Tensor) or targets.numel() != read.numel():
            shapes = f"{shape_of(read)}, got {shape_of(targets)}"
            return f"the task 'regression' needs targets of the outputs' shape {shapes}"
        return None

    def loss(self, read: Read, targets: Targets) -> Tensor:
        return F.mse_loss(read, _shaped(targets, read))

    def metric(self, read: Read, targets: Targets) -> Tensor:
        meter = _R2()
        meter.update(read, targets, len(targets))
        return torch.tensor(meter.value() * len(targets))

    def meter(self) -> Meter:
        return _R2()

    def for_metric(self, read: Read, targets: Targets) -> tuple[object, object]:
        return read.float(), _shaped(targets, read.float())

    def scale(self, kept: Sequence[Read]) -> Scale:
        parts = [part.detach().double() for part in kept]
        every = torch.cat([part if part.ndim == 2 else part.flatten() for part in parts])
        if every.ndim != 2:
            return float(every.var(unbiased=False)) or 1.0
        columns = every.var(dim=0, unbiased=False)
        least = max(_LEAST * float(columns.mean()), 0.0) or 1.0
        return columns.clamp_min(least)

    def divergence(self, dense: Read, read: Read, scale: Scale = None) -> Tensor:
        each = (read.double() - dense.double()) ** 2 / (1.0 if scale is None else scale)
        return each.flatten(1).mean(dim=1) if each.ndim > 1 else each

    def drawn_loss(self, read: Read, generator: torch.Generator) -> Tensor | None:
        """Of normal noise, whose variance makes the divergence (over the batch's variance) the log-likelihood."""
        noise = torch.randn(read.shape, generator=generator).to(read)
        weight = 2.0 / (read[0].numel() * torch.as_tensor(self.scale([read])).to(read))
        return (read * noise * weight.sqrt()).sum()

    def distillation(self, read: Read, teacher: Read, temperature: float) -> Tensor:
        return F.mse_loss(read, teacher)

    def equal_scores(self, read: Read) -> str:
        return "the outputs are the same whatever is cut"


class _R2:
    """The coefficient of determination over all numbers that are gathered, those of each column about its mean."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None  # (4, columns): count, sum, sum of squares, squared errors

    def update(self, read: Read, targets: Targets, count: int) -> None:
        wanted = _shaped(targets, read).detach().double()
        error = (read.detach().double() - wanted) ** 2
        columns = wanted.shape[1] if wanted.ndim == 2 else 1
        parts = [torch.ones_like(wanted), wanted, wanted**2, error]
        found = torch.stack([part.reshape(-1, columns).sum(dim=0) for part in parts]).cpu()
        self._sums = found if self._sums is None else self._sums + found

    def add(self, other: _R2) -> None:
        if other._sums is not None:
            self._sums = other._sums if self._sums is None else self._sums + other._sums

    def value(self) -> float:
        assert self._sums is not None
        n, total, squares, error = self._sums
        spread = (squares - total**2 / n).clamp_min(1e-12)
        return float((1 - error / spread).mean())


def _shaped(targets: Tensor, read: Tensor) -> Tensor:
    """Targets in the outputs' shape: (N,) and (N, 1) would give (N, N) otherwise."""
    return targets.reshape(read.shape).to(read.dtype)
