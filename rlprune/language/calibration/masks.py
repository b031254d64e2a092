"""Units of a language model switched off in place: by zeroing the input columns of their consumers."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from ...errors import ConfigError
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
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

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
