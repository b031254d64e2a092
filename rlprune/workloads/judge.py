"""How a candidate is judged on the validation split: a score for each sample, and loss and metric beside it."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import DataError
from ..utils.modes import evaluating

if TYPE_CHECKING:
    from .base import Workload


@dataclass(frozen=True)
class Judgement:
    """What a pass over some validation samples says of a model.

    ``scores`` (n,) float64, one a sample (image, sequence), higher is better; ``loss`` and ``metric`` are
    means over ``count`` things (images, or tokens of a text); ``outputs`` are the model's, where the judge keeps them:
    one row (C,) an image, or a token.
    """

    scores: Tensor
    loss: float
    metric: float
    count: int
    outputs: Any = None


class Judge(abc.ABC):
    """Scores models on the first ``limit`` samples of the validation split, all of it or a part of it.

    The dense model's answers are kept from the first call on. A sample's score does not depend on the
    part that it is asked for with, so that a candidate may be scored on a prefix first.
    """

    @abc.abstractmethod
    def __call__(self, model: nn.Module, start: int = 0, stop: int | None = None) -> Judgement:
        """Judge ``model`` on the samples from ``start`` to ``stop``; DataError when there is none."""

    def merge(self, parts: Sequence[Judgement]) -> Judgement:
        """One judgement from those of consecutive parts."""
        if len(parts) == 1:
            return parts[0]
        count = sum(part.count for part in parts)
        return Judgement(
            torch.cat([part.scores for part in parts]),
            sum(part.loss * part.count for part in parts) / count,
            sum(part.metric * part.count for part in parts) / count,
            count,
            None if parts[0].outputs is None else torch.cat([part.outputs for part in parts]),
        )


class ClassJudge(Judge):
    """Judges by whole outputs: -KL to the dense model's class probabilities, -loss, or the metric."""

    def __init__(self, workload: Workload, kind: str, limit: int | None) -> None:
        self._workload, self._kind, self._limit = workload, kind, limit
        self._dense: list[Tensor] | None = None

    def __call__(self, model: nn.Module, start: int = 0, stop: int | None = None) -> Judgement:
        scores: list[Tensor] = []
        answers: list[Tensor] = []
        loss, metric, count, seen = 0.0, 0.0, 0, 0
        dense = self._dense_outputs() if self._compares else []
        with torch.no_grad(), evaluating(model):
            for i, (inputs, targets) in enumerate(self._workload.batches("validation", self._limit)):
                first, last = max(start - seen, 0), len(targets)
                if stop is not None:
                    last = min(stop - seen, last)
                seen += len(targets)
                if first >= last:
                    if last <= 0:
                        break
                    continue
                part = slice(first, last)
                inputs, targets = inputs[part], targets[part]
                outputs = model(inputs)
                logits = self._workload.adapter.logits(outputs)
                if logits.ndim == 2:
                    answers.append(logits.float().cpu())
                batch_loss = self._workload.loss(outputs, targets)
                batch_metric = self._workload.metric(outputs, targets)
                means = batch_loss, batch_metric / len(targets)
                scores.append(self._scores(logits, targets, dense[i][part] if dense else None, means))
                loss += float(batch_loss) * len(targets)
                metric += float(batch_metric)
                count += len(targets)
        if not count:
            raise DataError(f"workload {self._workload.name!r}: the split 'validation' is empty")
        return Judgement(
            torch.cat(scores).double(),
            loss / count,
            metric / count,
            count,
            torch.cat(answers) if answers else None,
        )

    @property
    def _compares(self) -> bool:
        """Whether a score needs what the dense model says of the same samples."""
        return self._kind == "kl"

    def _scores(
        self, logits: Tensor, targets: Tensor, dense: Tensor | None, means: tuple[Tensor, Tensor]
    ) -> Tensor:
        """A score for each sample of a batch, (B,); ``means`` are its mean loss and metric."""
        if dense is not None:
            return -divergence(dense, logits)
        value = -means[0] if self._kind == "loss" else means[1]
        return value.reshape(1).expand(len(targets))

    def _kept(self, logits: Tensor) -> Tensor:
        """What is kept of the dense model's logits."""
        return F.log_softmax(logits.float(), dim=-1)

    def _dense_outputs(self) -> list[Tensor]:
        if self._dense is None:
            model = self._workload.model
            with torch.no_grad(), evaluating(model):
                batches: Any = self._workload.batches("validation", self._limit)
                logits = self._workload.adapter.logits
                self._dense = [self._kept(logits(model(x))) for x, _ in batches]
        return self._dense


def divergence(dense_log: Tensor, outputs: Tensor) -> Tensor:
    """KL(dense || pruned) of each sample, (N,); further dimensions (the pixels of a map) are averaged."""
    each = (dense_log.exp() * (dense_log - F.log_softmax(outputs.float(), dim=-1))).sum(dim=-1)
    return each.flatten(1).mean(dim=1) if each.ndim > 1 else each
