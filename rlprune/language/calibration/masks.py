"""Units of a language model switched off in place: what they give to the layers that read them is zeroed."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from ...errors import ConfigError
from ...pruning.plan import Plan
from ...pruning.space import PruningSpace
from .grams import Consumer, unit_consumers


class MaskedUnits:
    """While active, every unit's output is multiplied by an entry of ``mask``: the model as if 0s were cut.

    That is the masked dense model which surgery is exact to (see the design's contracts), so a mask of zeros and ones
    costs no surgery. ``mask`` holds a tensor (units,) for each group that has a consumer, by the group's number; it may
    need gradients. Nothing of the model changes.

    Raises:
        ConfigError: the model has no attention or feed-forward group, or its experts have units of their own.
    """

    def __init__(self, model: nn.Module, space: PruningSpace, what: str) -> None:
        consumers = unit_consumers(space)
        if not consumers or any(c.lane >= 0 for c in consumers):
            raise ConfigError(
                f"{what}: needs a language model with attention or feed-forward groups, no mixture"
            )
        device = next(model.parameters()).device
        self.groups = [c.group for c in consumers]
        self.mask: dict[int, Tensor] = {c.group: torch.ones(len(c.columns), device=device) for c in consumers}
        self._model, self._consumers = model, consumers
        self._handles: list[Any] = []

    def __enter__(self) -> Self:
        for consumer in self._consumers:
            layer = self._model.get_submodule(consumer.module)
            self._handles.append(layer.register_forward_pre_hook(self._hook(consumer)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _remove(self._handles)

    def _hook(self, consumer: Consumer) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
        columns = torch.from_numpy(consumer.columns)
        # The unit of each input column: columns that are no unit's are kept.
        unit = torch.full((int(columns.max()) + 1,), -1, dtype=torch.int64)
        unit[columns.flatten()] = torch.arange(len(columns)).repeat_interleave(columns.shape[1])

        def hook(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            mask = self.mask[consumer.group]
            factors = mask[unit.to(mask.device)].to(inputs[0].dtype)
            return (inputs[0] * factors, *inputs[1:])

        return hook


class MaskedHidden:
    """While active, channels of the residual stream are multiplied by entries of ``mask`` wherever they are written.

    Those are the outputs of embeddings and of the layers that attention and feed-forward parts end in. Norms count the
    whole width: a model without the channels of zeros is the same where its RMS norms are scaled for that
    (`NormScales`). ``mask`` (H,) may need gradients; ``group`` is the number of the hidden size's group.
    """

    def __init__(self, model: nn.Module, space: PruningSpace, group: int) -> None:
        self.group = group
        self.mask = torch.ones(space.groups[group].units, device=next(model.parameters()).device)
        self._model = model
        axes = hidden_axes(space, group)
        self._writers = [
            cut.tensor.removesuffix(".weight")
            for cut in space.cuts
            if cut.axis in axes and not cut.consumer and model.get_parameter(cut.tensor).ndim > 1
        ]
        self._handles: list[Any] = []

    def __enter__(self) -> Self:
        for name in self._writers:
            layer = self._model.get_submodule(name)
            self._handles.append(layer.register_forward_hook(self._written))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _remove(self._handles)

    def _written(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output * self.mask.to(output.device, output.dtype)


class NormScales:
    """Puts the factor into the RMS norms of a cut model that makes them count the width of the dense one.

    An RMS norm over the k kept of H channels divides by a root that is sqrt(H / k) times that over H of which the
    others are zero; its weight takes that factor up. Other norms (LayerNorm, which takes a mean off) stay as they are.
    """

    def __init__(self, model: nn.Module, space: PruningSpace, group: int) -> None:
        self._group, self._width = group, space.groups[group].units
        axes = hidden_axes(space, group)
        cuts = [c for c in space.cuts if c.axis in axes and c.tensor.endswith(".weight")]
        flat = [c.tensor for c in cuts if model.get_parameter(c.tensor).ndim == 1]
        offsets = {name: _rms_offset(model, name) for name in flat}
        self._offsets = {name: offset for name, offset in offsets.items() if offset is not None}

    def __call__(self, slim: nn.Module, plan: Plan) -> None:
        kept = int(plan.widths[self._group])
        if kept == self._width:
            return
        factor = math.sqrt(self._width / kept)
        with torch.no_grad():
            for name, offset in self._offsets.items():
                weight = slim.get_parameter(name)
                wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
                weight.copy_((wide + offset) * factor - offset)


def hidden_axes(space: PruningSpace, group: int) -> set[int]:
    """The axes that a group's units are all of, in order."""
    units = np.arange(space.groups[group].units) + space.offsets[group]
    return {number for number, axis in enumerate(space.axes) if np.array_equal(axis.slots, units)}


def _rms_offset(model: nn.Module, name: str) -> float | None:
    """0 where a norm is an RMS norm that multiplies by its weight, 1 where by one more (Gemma), else None."""
    module, weight = model.get_submodule(name.removesuffix(".weight")), model.get_parameter(name)
    with torch.no_grad():
        found = (
            module(torch.ones(1, 1, len(weight), dtype=weight.dtype, device=weight.device)).flatten().float()
        )
    for offset in (0.0, 1.0):
        if torch.allclose(found, weight.detach().float() + offset, rtol=1e-2, atol=1e-3):
            return offset
    return None


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()
    handles.clear()
