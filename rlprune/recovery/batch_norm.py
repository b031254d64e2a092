"""Batch-norm statistics of a cut model, measured anew on the calibration data."""

from __future__ import annotations

import torch
from torch import nn

from ..importance.unit_scores import Batches
from ..utils.modes import evaluating
from ..utils.pytrees import call
from ..utils.torch_internals import BATCH_NORM


def recalibrate(model: nn.Module, batches: Batches) -> None:
    """Recompute all batch-norm statistics as the average over ``batches``, in place (EagleEye, arXiv 2007.02491).

    Everything but the batch norms stays in eval mode; modes and momenta are restored.
    """
    norms = [m for m in model.modules() if isinstance(m, BATCH_NORM) and m.track_running_stats]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    with torch.no_grad(), evaluating(model):
        for norm in norms:
            norm.reset_running_stats()
            norm.train()
        for number, (inputs, _) in enumerate(batches, start=1):
            for norm in norms:
                # The plain average over all batches. torch's own (None) reads a counter from the device in every layer.
                norm.momentum = 1.0 / number
            call(model, inputs)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
