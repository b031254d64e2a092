"""FLAP's bias compensation: what the removed units gave on average moves into the consumer's bias."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from ...pruning.plan import Plan
from ...pruning.space import PruningSpace
from ...pruning.surgery import axis_indices
from ..linear import tensor_of
from .grams import unit_consumers


class BiasCompensation:
    """``b += W_r mean(x_r)`` for the removed input columns r of every attention and feed-forward consumer.

    An et al. 2023, FLAP, arXiv 2312.11983, section 3.3. A layer without a bias gets one where units of its
    group are cut; a part that is dropped whole leaves its mean output behind. The experts of a mixture stay as they
    are.

    Args:
        means: mean of each consumer's input, (I,), by module name.
    """

    def __init__(self, model: nn.Module, space: PruningSpace, means: Mapping[str, Tensor]) -> None:
        self._model = model
        self._space = space
        self._means = [(c, means[c.module]) for c in unit_consumers(space) if c.lane < 0]

    def __call__(self, slim: nn.Module, plan: Plan) -> None:
        """Change the biases of ``slim``, which was cut by ``plan``, in place."""
        indices = axis_indices(self._space, plan.kept)
        modules = dict(slim.named_modules())
        with torch.no_grad():
            for consumer, mean in self._means:
                kept = indices[consumer.axis]
                if kept is None or consumer.module not in modules:
                    continue
                weights = consumer.matrix(self._model)
                gone = torch.from_numpy(np.setdiff1d(np.arange(len(mean)), kept)).to(weights.device)
                change = mean.to(weights.device)[gone].double() @ weights[gone].double()
                rows = None if consumer.rows is None else indices[consumer.rows]
                if rows is not None:
                    change = change[torch.from_numpy(rows).to(change.device)]
                shift_bias(modules[consumer.module], change, slim)


def shift_bias(
    layer: nn.Module, change: Tensor, model: nn.Module, name: str = "bias", row: int | None = None
) -> None:
    """Add ``change`` (O,) to the bias of a layer of ``model``, which is made where there is none.

    The parameter is replaced, not written into: candidates may share uncut tensors with each other.

    Args:
        name: of the parameter.
        row: the one that is changed, where the biases of all experts lie in one tensor.
    """
    old = None if getattr(layer, name) is None else tensor_of(layer, name)
    value = change if old is None else old.detach().double().clone()
    if old is not None:
        value[slice(None) if row is None else row] += change
    # The output layer of a dropped part has no weight, and need not have a bias.
    like = next((t for t in (old, getattr(layer, "weight", None)) if t is not None), None)
    device = value.device if like is None else like.device
    like = next(model.parameters()) if like is None else like
    new = nn.Parameter(value.to(device, like.dtype), requires_grad=like.requires_grad)
    setattr(layer, name, new)
