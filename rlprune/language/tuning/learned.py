"""Weights that were learned together with the units of a language model, put into the models that are cut from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ...pruning.plan import Plan
from ...pruning.space import PruningSpace
from ...pruning.surgery import axis_indices, cut_tensor, cuts_by_tensor
from ..calibration.grams import unit_consumers
from ..calibration.masks import NormScales
from .peft import LowRank


class LearnedWeights:
    """Merges low-rank adapters and the gates of the units that stay into a model that was cut from the dense one.

    A gate multiplies the columns in which the next layer reads its unit; hidden channels that stay count fully, and
    RMS norms go on counting the dense width (`NormScales`). Nothing but the adapters' factors and the gates is held.

    Args:
        model: the dense model; not changed.
        adapters: what `low_rank` took from it.
        values: the gate of every unit, (units,), by group.
    """

    def __init__(
        self,
        model: nn.Module,
        space: PruningSpace,
        adapters: Sequence[LowRank],
        values: Mapping[int, Tensor],
    ) -> None:
        self._space, self._adapters = space, tuple(adapters)
        self._consumers = [c for c in unit_consumers(space) if c.group in values]
        self._values = {group: value.detach().double().cpu() for group, value in values.items()}
        hidden = [g for g, group in enumerate(space.groups) if group.kind == "hidden" and g in values]
        self._norms = [NormScales(model, space, g) for g in hidden]

    def __call__(self, slim: nn.Module, plan: Plan) -> None:
        """Change ``slim``, which was cut by ``plan``, in place."""
        indices = axis_indices(self._space, plan.kept)
        cuts = cuts_by_tensor(self._space, indices)
        parameters = {name: p for name, p in slim.named_parameters() if p.numel()}  # dropped parts have none
        with torch.no_grad():
            for adapter in self._adapters:
                weight = parameters.get(f"{adapter.layer}.weight")
                if weight is not None:
                    delta = cut_tensor(adapter.delta(), cuts.get(f"{adapter.layer}.weight", []))
                    _put(weight, _wide(weight) + delta.to(weight.device))
            for consumer in self._consumers:
                weight = parameters.get(consumer.tensor)
                if weight is None:
                    continue
                factors = torch.ones(self._space.axes[consumer.axis].length, dtype=torch.float64)
                each = self._values[consumer.group]
                factors[torch.from_numpy(consumer.columns)] = each.unsqueeze(1)
                index = indices[consumer.axis]
                factors = factors if index is None else factors[torch.from_numpy(index)]
                shape = (-1, 1) if consumer.dim == 0 else (1, -1)
                _put(weight, _wide(weight) * factors.to(weight.device, _wide(weight).dtype).view(shape))
        for scale in self._norms:
            scale(slim, plan)


def _wide(weight: Tensor) -> Tensor:
    """A weight in 32 bits at least: small changes are lost in 16."""
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


def _put(weight: Tensor, new: Tensor) -> None:
    weight.copy_(new.to(weight.dtype))
