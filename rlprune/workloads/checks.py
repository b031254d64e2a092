"""Is a dense model usable: finite weights, a forward pass that runs, outputs that fit the data."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..errors import ArtifactError, GraphError, described
from ..utils.pytrees import call, shapes
from .base import Workload


def check_finite(model: nn.Module, name: str) -> None:
    """ArtifactError naming the first tensor that holds NaN or infinite values."""
    for key, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ArtifactError(f"model {name!r}: tensor {key!r} holds NaN or infinite values")


def run_forward(workload: Workload, name: str) -> Any:
    """What the dense model returns for the example inputs; GraphError where its forward raises."""
    try:
        with torch.no_grad():
            return call(workload.model, workload.example_inputs)
    except Exception as error:
        raise GraphError(
            f"model {name!r}: its forward raises on an input of shape "
            f"{shapes(workload.example_inputs)}: {described(error)}"
        ) from error
