"""Scores of units as sums over everything that is cut with a unit, and the types that importances share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from torch import Tensor, nn

from ..pruning.space import Cut, PruningSpace
from ..utils.arrays import Floats
from ..utils.pytrees import Inputs, call

Scores = list[Floats]
Batch = tuple[Any, Any]
"""(inputs, targets), both nests (see `rlprune.utils.pytrees`)."""
Batches = Iterable[Batch]
Forward = Callable[[nn.Module, Any, Any], Any]
"""``forward(model, inputs, targets)``: the outputs that a loss reads."""
Loss = Callable[[Any, Any], Tensor]


def plain_forward(model: nn.Module, inputs: Inputs, targets: object) -> Any:
    """Call a model on its inputs."""
    return call(model, inputs)


def per_unit(
    model: nn.Module, space: PruningSpace, element: Callable[[Cut, Tensor], Tensor | None]
) -> Scores:
    """Sum ``element(cut, tensor)`` (same shape as the tensor, or None to leave it out) over each unit's slots.

    Of a group with lanes every unit of every lane has a score.
    """
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    total = np.zeros(int(space.unit_counts.sum()) + 1)
    for cut in space.cuts:
        values = element(cut, tensors[cut.tensor])
        if values is None:
            continue
        others = summed_dims(space, cut, values.ndim)
        sums = (values.double().sum(dim=others) if others else values.double()).cpu().numpy()
        np.add.at(total, space.axes[cut.axis].slots, sums.reshape(-1))
    return np.split(total[:-1], space.offsets[1:])


def summed_dims(space: PruningSpace, cut: Cut, dims: int) -> list[int]:
    """The dimensions of a tensor of ``dims`` that are neither the cut one nor that of its lanes."""
    lanes = {0} if space.axes[cut.axis].lanes > 1 else set()
    return [d for d in range(dims) if d != cut.dim and d not in lanes]
