"""Are a dense model and its workload usable: finite weights, a forward pass that runs, outputs that fit the data."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from ..errors import ArtifactError, DataError, GraphError, described
from ..utils.finite import all_finite
from ..utils.modes import evaluating
from ..utils.pytrees import batch_size, call, shapes
from ..utils.values import NO_DOUBLES
from .base import SPLITS, Workload


def check_finite(model: nn.Module, name: str) -> None:
    """ArtifactError naming the first tensor that holds NaN or infinite values."""
    for key, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not all_finite(tensor):
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


def check_workload(workload: object) -> Workload:
    """Return ``workload`` when it is usable, else raise DataError naming what is missing.

    Checks: it is a Workload with a model and example inputs, the train, calibration and validation splits are not
    empty, its forward runs, and outputs and targets are those of its task.
    """
    if not isinstance(workload, Workload):
        raise DataError(f"expected a rlprune.Workload, got {type(workload).__name__}")
    if not isinstance(getattr(workload, "model", None), nn.Module):
        raise DataError(f"workload {workload.name!r} must set .model to a Module")
    if (kind := workload.device.type) in NO_DOUBLES:
        raise DataError(
            f"workload {workload.name!r}: its model is on {kind}, where models cannot be pruned "
            f"({NO_DOUBLES[kind]}); move it to the CPU"
        )
    if not hasattr(workload, "example_inputs"):
        raise DataError(
            f"workload {workload.name!r} must set .example_inputs to a tensor, a tuple of arguments or a dict of them"
        )
    batch_size(workload.example_inputs, f"workload {workload.name!r}: example_inputs")
    for split in SPLITS[:3]:
        first = next(iter(workload.batches(split, 1)), None)
        if first is None or workload.samples_in(*first) == 0:
            raise DataError(f"workload {workload.name!r}: the split {split!r} is empty")
    _check_task(workload)
    quality = workload.evaluate(workload.model, "validation", 1)
    if math.isnan(quality.loss):
        raise DataError(f"workload {workload.name!r}: the dense model's loss is not a number")
    return workload


_LOOKED_AT = 32
"""Samples by which outputs and targets are known."""


def _check_task(workload: Workload) -> None:
    """Refuse outputs and targets that are not the task's: its softmax over one number would be the same for all."""
    given = {
        "metric_fn": workload.metric_fn is not None,
        "split_metric": workload.split_metric is not None,
        "metric": workload.has_own_metric,
    }
    metrics = [name for name, there in given.items() if there]
    if len(metrics) > 1:
        raise DataError(
            f"workload {workload.name!r}: {' and '.join(metrics)} are given; only one can be the metric"
        )
    task = workload.task_type
    inputs, targets = next(iter(workload.batches("validation", _LOOKED_AT)))
    with torch.no_grad(), evaluating(workload.model):
        try:
            outputs = task.forward(workload.model, inputs)
        except Exception as error:
            raise DataError(
                f"workload {workload.name!r}: the model's forward raises on a validation batch: {described(error)}"
            ) from error
    try:
        misfit = task.misfit(task.read(outputs, workload.output), targets, workload.has_own_loss)
    except DataError as error:
        raise DataError(f"workload {workload.name!r}: {error}") from None
    if misfit is not None:
        raise DataError(f"workload {workload.name!r}: {misfit}")
