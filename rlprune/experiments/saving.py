"""Saving a pruned model in the number format of its checkpoint, and saying how large both are."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from ..pruning.plan import Plan
from ..workloads.base import Workload


def save_model(workload: Workload, model: nn.Module, plan: Plan, folder: Path, wanted: str) -> list[str]:
    """Write a pruned model by ``finish.dtype`` (`ModelAdapter.saved_dtype`); returns lines on its size and format.

    The model itself is then in that format. ``wanted`` is ``finish.dtype``.
    """
    dtype = workload.adapter.saved_dtype(workload, model, wanted)
    workload.save(model if dtype is None else model.to(dtype), plan, folder)
    return workload.adapter.size_lines(workload, folder)


def round_weights(workload: Workload, model: nn.Module, wanted: str) -> None:
    """Give a model the weights that will be saved, so that what is measured of it is true of its folder."""
    dtype = workload.adapter.saved_dtype(workload, model, wanted)
    if dtype is None:
        return
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.is_floating_point() and tensor.dtype != dtype:
                tensor.copy_(tensor.to(dtype))
