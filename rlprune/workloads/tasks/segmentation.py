"""A class for every place: pixels of a map (classes on axis 1), steps of a sequence (classes on the last axis)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ...recovery.finetune import softmax_distillation
from ..metrics import Meter, Read, Targets
from .base import Scale, TaskType, is_labels, shape_of, softmax_divergence, softmax_noise, task_type

IGNORED = (255, -100)
"""Targets that are not judged."""
# Places of a sample whose logits models of the search read.
_MOST_ROWS = 64


@task_type(
    "a class a pixel: logits (N, classes, H, W), targets (N, H, W); 255 and -100 are left out",
    name="segmentation",
)
class Segmentation(TaskType):
    """Logits (N, C, ...) and class numbers (N, ...), 255 and -100 where nothing is asked.

    The divergence is KL(dense || pruned) of the class probabilities in nats, the mean over all places; the loss
    cross-entropy, the mean over the places that are asked; the metric mIoU over the split: of every class that
    occurs, the intersection of what is said and what is so over their union. Logits of a smaller map are brought to
    the targets' size bilinearly, as transformers' models want it. Distillation is that of classification, place by
    place.
    """

    metric_name = "mIoU"
    axis: ClassVar[int] = 1

    def misfit(self, read: Read, targets: Targets, own_loss: bool = False) -> str | None:
        if read.ndim < 3:
            return (
                f"the task {self.name!r} needs outputs with classes and places, got {shape_of(read)}; state task: "
                "classification"
            )
        if read.shape[self.axis] == 1:
            return (
                f"the task {self.name!r} takes a softmax over 1 class (axis {self.axis} of {shape_of(read)}), which is "
                "1 for every model; state task: multilabel"
            )
        if own_loss:
            return None
        places = self._places(read)
        fits = is_labels(targets) and targets.ndim == places.ndim
        # Only maps are brought to the targets' size.
        if not fits or (read.ndim != 4 and targets.shape != places.shape):
            return f"the task {self.name!r} needs class numbers {shape_of(places)} as targets, got {shape_of(targets)}"
        asked = targets[_asked(targets)]
        if len(asked) and (int(asked.min()) < 0 or int(asked.max()) >= read.shape[self.axis]):
            return (
                f"the task {self.name!r} needs targets from 0 to {read.shape[self.axis] - 1}, 255 or -100, "
                f"got {int(asked.min())} to {int(asked.max())}"
            )
        return None

    def loss(self, read: Read, targets: Targets) -> Tensor:
        logits = self._fitted(read, targets)
        wanted = targets.masked_fill(~_asked(targets), -100).long()
        return F.cross_entropy(logits, wanted, ignore_index=-100)

    def metric(self, read: Read, targets: Targets) -> Tensor:
        meter = self.meter()
        meter.update(read, targets, len(targets))
        return torch.tensor(meter.value() * len(targets))

    def meter(self) -> Meter:
        return _Overlap(self)

    def metric_arguments(self, read: Read) -> Mapping[str, object]:
        return {"task": "multiclass", "num_classes": read.shape[self.axis], "average": "macro"}

    def for_metric(self, read: Read, targets: Targets) -> tuple[object, object]:
        logits, asked = self._fitted(read, targets).float(), _asked(targets)
        return logits.softmax(dim=1).movedim(1, -1)[asked], targets[asked].long()

    def kept(self, read: Read) -> Read:
        return F.log_softmax(read.float(), dim=self.axis)

    def divergence(self, dense: Read, read: Read, scale: Scale = None) -> Tensor:
        return softmax_divergence(dense, read, self.axis)

    def distillation(self, read: Read, teacher: Read, temperature: float) -> Tensor:
        return softmax_distillation(read.movedim(self.axis, -1), teacher.movedim(self.axis, -1), temperature)

    def drawn_loss(self, read: Read, generator: torch.Generator) -> Tensor | None:
        places = read.movedim(self.axis, -1).flatten(1, -2).float()
        rows = places.flatten(0, 1)
        # The divergence is a mean over the places, and each of them is drawn by itself.
        return (rows * softmax_noise(rows, generator)).sum() / places.shape[1] ** 0.5

    def rows(self, read: Read) -> Tensor | None:
        places = read.movedim(self.axis, -1).flatten(1, -2)
        step = max(1, -(-places.shape[1] // _MOST_ROWS))
        return places[:, ::step].flatten(0, 1).float().cpu()

    def equal_scores(self, read: Read) -> str:
        return self.misfit(read, None, own_loss=True) or super().equal_scores(read)

    def answers(self, read: Read, targets: Targets) -> tuple[Tensor, Tensor]:
        """Classes that the model says and classes that are so, at the places that are asked, (M,) each."""
        asked = _asked(targets)
        return self._fitted(read, targets).argmax(dim=1)[asked], targets[asked].long()

    def _places(self, read: Tensor) -> Tensor:
        return read.select(self.axis, 0)

    def _fitted(self, read: Tensor, targets: Tensor) -> Tensor:
        """Logits with the classes on axis 1, at as many places as there are targets."""
        logits = read.movedim(self.axis, 1)
        if logits.shape[2:] != targets.shape[1:] and logits.ndim == 4:
            return F.interpolate(logits, size=tuple(targets.shape[1:]), mode="bilinear", align_corners=False)
        return logits


@task_type(
    "a class a step: logits (N, steps, classes), targets (N, steps); 255 and -100 are left out",
    name="sequence",
)
class SequenceLabels(Segmentation):
    """Like `Segmentation`, with the classes on the last axis, as in recurrent models; the metric is the share of steps
    that are right."""

    metric_name = "step accuracy"
    axis: ClassVar[int] = -1

    def metric(self, read: Read, targets: Targets) -> Tensor:
        said, wanted = self.answers(read, targets)
        return (said == wanted).float().mean() * len(targets)

    def meter(self) -> Meter:
        return _Right(self)


class _Overlap:
    """Mean intersection over union of the classes that are said or so: a table of both, (C, C)."""

    def __init__(self, task: Segmentation) -> None:
        self._task = task
        self.table: Tensor | None = None

    def update(self, read: Read, targets: Targets, count: int) -> None:
        said, wanted = self._task.answers(read, targets)
        classes = read.shape[self._task.axis]
        table = torch.bincount(wanted * classes + said, minlength=classes * classes)
        self._take(table.reshape(classes, classes).cpu())

    def add(self, other: _Overlap) -> None:
        if other.table is not None:
            self._take(other.table)

    def value(self) -> float:
        assert self.table is not None
        table = self.table.double()
        right = table.diagonal()
        union = table.sum(dim=0) + table.sum(dim=1) - right
        seen = union > 0
        return float((right[seen] / union[seen]).mean()) if bool(seen.any()) else 0.0

    def _take(self, table: Tensor) -> None:
        self.table = table if self.table is None else self.table + table


class _Right(_Overlap):
    """The share of places whose class is right."""

    def value(self) -> float:
        assert self.table is not None
        return float(self.table.diagonal().sum() / self.table.sum().clamp_min(1))


def _asked(targets: Tensor) -> Tensor:
    asked = torch.ones_like(targets, dtype=torch.bool)
    for value in IGNORED:
        asked &= targets != value
    return asked
