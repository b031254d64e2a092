"""Models and images without labels: what plans are compared on before any is evaluated."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..utils.modes import evaluating
from ..workloads.base import Workload

SAMPLES = {"calibration": 256, "train": 768}
"""Images of each split that plans are compared on without labels."""


class Rows(nn.Module):
    """A model that returns its rows of logits."""

    def __init__(self, model: nn.Module, workload: Workload) -> None:
        super().__init__()
        self._model, self._workload = model, workload

    def forward(self, inputs: Tensor) -> Tensor:
        found = self._workload.logit_rows(self._model, inputs)
        assert found is not None
        return found


def unlabelled(workload: Workload) -> Tensor | None:
    """Inputs of the calibration and the train split in one tensor; None where they are no tensors of one shape, or
    the outputs no rows of logits."""
    every = [x for split, n in SAMPLES.items() for x, _ in workload.batches(split, n)]
    inputs = [x for x in every if isinstance(x, Tensor)]
    if len(inputs) < len(every) or len({x.shape[1:] for x in inputs}) > 1:
        return None
    with torch.no_grad(), evaluating(workload.model):
        rows = workload.logit_rows(workload.model, inputs[0][:1])
    return None if rows is None else torch.cat(inputs)
