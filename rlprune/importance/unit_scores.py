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
    """Sum ``element(cut, tensor)`` (same shape as the tensor, or None to leave it out) over each unit's slots."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    total = np.zeros(int(space.widths.sum()) + 1)
    for cut in space.cuts:
        values = element(cut, tensors[cut.tensor])
        if values is None:
            continue
        others = [d for d in range(values.ndim) if d != cut.dim]
        sums = (values.double().sum(dim=others) if others else values.double()).cpu().numpy()
        np.add.at(total, space.axes[cut.axis].slots, sums)
    return np.split(total[:-1], space.offsets[1:])
