"""What a model does on each sample of the test split, so that two models can be compared on the same samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ..errors import DataError
from ..utils.pytrees import take
from .metrics import Meter, SumMeter, Targets
from .tasks.base import Outputs

if TYPE_CHECKING:
    from .base import Workload

_TOLERANCE = 1e-3
"""Relative difference that the mean of the samples may have from the figure of the whole split (float32 sums)."""


@dataclass(frozen=True)
class Outcomes:
    """The quality of each sample of a split, in the split's order.

    ``values`` (n,) float64 are sums over what a sample holds, ``weights`` (n,) how many things that is: 1 for an image,
    the scored tokens for a sequence. ``kind`` says whether a value is the workload's metric or its loss.
    """

    kind: Literal["metric", "loss"]
    values: Tensor
    weights: Tensor

    @property
    def mean(self) -> float:
        """The quality of the split."""
        return float(self.values.sum() / self.weights.sum())

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return {"kind": self.kind, "values": self.values.tolist(), "weights": self.weights.tolist()}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Outcomes:
        """The outcomes that `to_dict` wrote."""
        parts = [torch.tensor(content[name], dtype=torch.float64) for name in ("values", "weights")]
        return cls(content["kind"], parts[0], parts[1])


class SampleMeter:
    """Gathers the quality of each sample batch by batch.

    A sample's quality is the metric where the split's metric is the mean of its samples', and the loss elsewhere
    (R2, mIoU and mAP are no means). There is none where the model has to be asked again for its loss, where a
    function of the user's does not take a single sample, or where the samples' mean is not the split's figure.
    """

    def __init__(self, workload: Workload, meter: Meter | None) -> None:
        self._workload = workload
        self._kind: Literal["metric", "loss"] = "metric" if isinstance(meter, SumMeter) else "loss"
        self._values: list[Tensor] | None = []
        if self._kind == "loss" and workload.task_type.own_pass:
            self._values = None

    def update(self, outputs: Outputs, targets: Targets, count: int) -> None:
        """Take in what the task's `forward` gave for a batch of ``count`` samples."""
        if self._values is None:
            return
        try:
            self._values.append(self._batch(outputs, targets, count))
        except Exception:
            # Functions of the user's are promised whole batches; one that needs them leaves no interval.
            self._values = None

    def outcomes(self, loss: float, metric: float) -> Outcomes | None:
        """What has been gathered; None where it does not add up to the split's figures."""
        if not self._values:
            return None
        values = torch.cat(self._values)
        found = Outcomes(self._kind, values, torch.ones_like(values))
        whole = metric if self._kind == "metric" else loss
        return found if abs(found.mean - whole) <= _TOLERANCE * max(abs(whole), 1e-6) else None

    def _batch(self, outputs: Outputs, targets: Targets, count: int) -> Tensor:
        workload, task = self._workload, self._workload.task_type
        if self._kind == "metric" and not workload.has_own_metric:
            quick = task.sample_metrics(task.read(outputs, workload.output), targets)
            if quick is not None:
                return quick.detach().cpu().double()
        values = []
        for i in range(count):
            one = slice(i, i + 1)
            values.append(self._sample(take(outputs, one), take(targets, one)))
        return torch.tensor(values, dtype=torch.float64)

    def _sample(self, outputs: Outputs, targets: Targets) -> float:
        workload = self._workload
        if self._kind == "loss":
            return float(workload.loss(workload.task_type.plain(outputs), targets))
        meter = workload.new_meter()
        if meter is None:
            raise DataError("the metric is measured on a whole split")
        workload.feed_meter(meter, outputs, targets, 1)
        return meter.value()


def token_outcomes(parts: Sequence[tuple[Tensor, Tensor]]) -> Outcomes:
    """Outcomes of sequences from pairs of their tokens' losses and which of them count, each (B, L - 1)."""
    values = torch.cat([nll.double().sum(dim=1) for nll, _ in parts])
    weights = torch.cat([kept.double().sum(dim=1) for _, kept in parts])
    asked = weights > 0
    return Outcomes("loss", values[asked], weights[asked])
