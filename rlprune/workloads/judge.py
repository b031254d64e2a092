"""How a candidate is judged on the validation split: a score for each sample, with its loss and metric."""

from __future__ import annotations

import abc
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import DataError
from ..utils.modes import evaluating
from ..utils.pytrees import Inputs, take
from .metrics import Meter, Read, SumMeter, Targets, value_of
from .tasks.base import Outputs, Scale

if TYPE_CHECKING:
    from .base import Workload


@dataclass(frozen=True)
class Judgement:
    """What a pass over some validation samples says of a model.

    ``scores`` (n,) float64, one a sample (image, sequence), higher is better; ``loss`` and ``metric`` are
    means over ``count`` things (images, or tokens of a text); ``outputs`` are the model's, where the judge keeps them:
    one row (C,) an image, or a token. ``meter`` has gathered the metric, where it is no mean.
    """

    scores: Tensor
    loss: float
    metric: float
    count: int
    outputs: Any = None
    meter: Meter | None = None


class Judge(abc.ABC):
    """Scores models on the first ``limit`` samples of the validation split, all of it or a part of it.

    The dense model's answers are kept from the first call on. A sample's score does not depend on the
    part that it is asked for with, so that a candidate may be scored on a prefix first.
    """

    scale: Scale = None
    """What the task's divergences are measured in, where it has a scale and the dense model has answered."""

    @abc.abstractmethod
    def __call__(self, model: nn.Module, start: int = 0, stop: int | None = None) -> Judgement:
        """Judge ``model`` on the samples from ``start`` to ``stop``; DataError when there is none."""

    def ask_dense(self, start: int, stop: int | None) -> None:  # noqa: B027  (most judges ask it as they go)
        """Make the dense model's answers on the samples from ``start`` to ``stop`` before a candidate is in memory."""

    def merge(self, parts: Sequence[Judgement]) -> Judgement:
        """One judgement from those of consecutive parts."""
        if len(parts) == 1:
            return parts[0]
        count = sum(part.count for part in parts)
        meter = self._merged([part.meter for part in parts if part.meter is not None])
        mean = sum(part.metric * part.count for part in parts) / count
        return Judgement(
            torch.cat([part.scores for part in parts]),
            sum(part.loss * part.count for part in parts) / count,
            mean if meter is None else meter.value(),
            count,
            None if parts[0].outputs is None else torch.cat([part.outputs for part in parts]),
            meter,
        )

    def _merged(self, meters: Sequence[Meter]) -> Meter | None:
        if not meters:
            return None
        whole = self.new_meter()
        assert whole is not None
        for meter in meters:
            whole.add(meter)
        return whole

    def new_meter(self) -> Meter | None:
        """An empty meter, where judgements have one."""
        return None


class TaskJudge(Judge):
    """Judges by whole outputs: minus the task's divergence to the dense model, -loss, or the metric."""

    def __init__(self, workload: Workload, kind: str, limit: int | None) -> None:
        self._workload, self._kind, self._limit = workload, kind, limit
        self._task = workload.task_type
        self._dense: list[Read] | None = None
        self.scale: Scale = None
        if kind == "kl" and not self._task.compares:
            raise self._task.refusal()

    def __call__(self, model: nn.Module, start: int = 0, stop: int | None = None) -> Judgement:
        workload = self._workload
        scores: list[Tensor] = []
        rows: list[Tensor | None] = []
        losses: list[tuple[Tensor, int]] = []
        meter = self.new_meter()
        dense = self._dense_outputs() if self._compares else []
        with torch.no_grad(), evaluating(model):
            for i, part, inputs, targets, size in self._parts(start, stop):
                like = self._task.part(dense[i], part) if dense else None
                outputs = self._task.forward(model, inputs, like)
                read = self._task.read(outputs, workload.output)
                rows.append(self._task.rows(read))
                batch_loss = workload.batch_loss(model, inputs, targets, outputs)
                mean = self._gather(meter, outputs, targets, size)
                own = -batch_loss if self._kind == "loss" else torch.tensor(mean)
                scores.append(self._scores(read, targets, like, own, size))
                losses.append((torch.as_tensor(batch_loss).detach().reshape(()), size))
            count = sum(size for _, size in losses)
            if not count:
                raise DataError(f"workload {workload.name!r}: the split 'validation' is empty")
            whole = workload.whole_metric(model, "validation")
        metric = whole if meter is None else meter.value()
        assert metric is not None
        found = torch.cat(scores).cpu().double()
        if self._kind == "accuracy" and not isinstance(meter, SumMeter):
            found = torch.full_like(found, metric)
        logits = [row for row in rows if row is not None]
        answers = torch.cat(logits) if len(logits) == len(rows) else None
        # The numbers leave the device at the end: waiting for them in every batch would let a GPU idle.
        means = torch.stack([mean for mean, _ in losses]).cpu().tolist()
        loss = sum(mean * size for mean, (_, size) in zip(means, losses, strict=True))
        return Judgement(found, loss / count, metric, count, answers, meter)

    def new_meter(self) -> Meter | None:
        return self._workload.new_meter()

    def _gather(self, meter: Meter | None, outputs: Outputs, targets: Targets, size: int) -> float:
        """Let the meter take in a batch; returns the batch's own mean where that is the score, else NaN."""
        if meter is None:
            return math.nan
        if not isinstance(meter, SumMeter) or self._kind != "accuracy":
            self._workload.feed_meter(meter, outputs, targets, size)
            return math.nan
        one = self.new_meter()
        assert isinstance(one, SumMeter)
        self._workload.feed_meter(one, outputs, targets, size)
        meter.add(one)
        return one.value()

    def _parts(self, start: int, stop: int | None) -> Iterator[tuple[int, slice, Inputs, Targets, int]]:
        """What of each batch lies between two samples: its number, the part, inputs, targets, samples."""
        seen = 0
        for i, (inputs, targets) in enumerate(self._workload.batches("validation", self._limit)):
            size = self._workload.samples_in(inputs, targets)
            first = max(start - seen, 0)
            last = size if stop is None else min(stop - seen, size)
            seen += size
            if last <= 0:
                return
            if first < last:
                part = slice(first, last)
                if last - first < size:
                    inputs, targets = take(inputs, part), take(targets, part)
                yield i, part, inputs, targets, last - first

    @property
    def _compares(self) -> bool:
        """Whether a score needs what the dense model says of the same samples."""
        return self._kind == "kl"

    def _scores(self, read: Read, targets: Targets, dense: Read, own: Tensor, size: int) -> Tensor:
        """A score for each sample of a batch, (B,); ``own`` is what a batch has for each of its samples."""
        if dense is not None:
            return -self._task.divergence(dense, read, self.scale)
        return own.detach().reshape(1).expand(size)

    def _kept(self, read: Read) -> Read:
        """What is kept of the dense model's outputs."""
        return self._task.kept(read)

    def _dense_outputs(self) -> list[Read]:
        if self._dense is None:
            workload, model = self._workload, self._workload.model
            with torch.no_grad(), evaluating(model):
                self._dense = [
                    self._kept(self._task.read(self._task.forward(model, inputs), workload.output))
                    for inputs, _ in workload.batches("validation", self._limit)
                ]
            self.scale = self._task.scale(self._dense)
        return self._dense


class WholeJudge(Judge):
    """Judges by a function of the user's, ``score_fn(model)``, which reads what it wants."""

    def __init__(self, workload: Workload) -> None:
        self._workload = workload

    def __call__(self, model: nn.Module, start: int = 0, stop: int | None = None) -> Judgement:
        workload = self._workload
        assert workload.score_fn is not None
        if start or stop is not None:
            raise DataError("score_fn: judges a model as a whole, so that there is no score of some samples")
        with torch.no_grad(), evaluating(model):
            found = value_of("score_fn", workload.score_fn, model)
        quality = workload.evaluate(model, "validation")
        scores = torch.full((quality.count,), found, dtype=torch.float64)
        return Judgement(scores, quality.loss, quality.metric, quality.count)
