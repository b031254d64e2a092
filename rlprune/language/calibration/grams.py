"""Second moments of what the consumers of attention and feed-forward units read, for closed forms over them.

In a language model every unit (a neuron, or a KV head with its query heads) reaches the residual stream
through the input columns of one layer, the output projection of its part. The Gram matrix of that layer's
input decides what a unit is worth (:mod:`.elimination`) and how the others stand in for it
(:mod:`.nested`), so it is collected once and shared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ...errors import ConfigError, DataError
from ...pruning.space import PruningSpace
from ...utils.arrays import Ints
from .walk import Focus, parts

LANGUAGE_KINDS = ("attention", "ffn")

# Rows of a Gram matrix that are summed at once: blocks above the diagonal are mirrored, not computed.
_BLOCK = 512


@dataclass(frozen=True)
class Consumer:
    """The layer that reads all units of one group: its weight, and which input columns each unit has.

    ``dim`` is the weight's input dimension (1 of a Linear, 0 of GPT-2's Conv1D), ``rows`` the axis of its
    output dimension where that is cut as well. ``columns`` has shape (units, columns of a unit).
    """

    module: str
    tensor: str
    dim: int
    axis: int
    group: int
    rows: int | None
    columns: Ints = field(repr=False)

    def matrix(self, model: nn.Module) -> Tensor:
        """The weight as (inputs, outputs), a view of the model's."""
        weight = model.get_parameter(self.tensor).detach()
        return weight if self.dim == 0 else weight.T

    def has_bias(self, model: nn.Module) -> bool:
        return getattr(model.get_submodule(self.module), "bias", None) is not None


def unit_consumers(space: PruningSpace) -> list[Consumer]:
    """The consumers of the attention and feed-forward groups, in the order of the groups.

    Groups of other kinds (channels of a convolution, the hidden size) have none: their units reach many
    layers at once.
    """
    owner = np.append(np.repeat(np.arange(len(space.groups)), space.widths), -1)
    found = []
    for cut in space.cuts:
        slots = space.axes[cut.axis].slots
        groups = np.unique(owner[slots])
        if not cut.consumer or not cut.tensor.endswith(".weight") or len(groups) != 1 or groups[0] < 0:
            continue
        group = int(groups[0])
        units = slots - space.offsets[group]
        counts = np.bincount(units, minlength=space.groups[group].width)
        if space.groups[group].kind not in LANGUAGE_KINDS or len(set(counts.tolist())) != 1:
            continue
        columns = np.argsort(units, kind="stable").reshape(len(counts), -1)
        others = [c.axis for c in space.cuts if c.tensor == cut.tensor and c.dim != cut.dim]
        module = cut.tensor.removesuffix(".weight")
        rows = others[0] if others else None
        found.append(Consumer(module, cut.tensor, cut.dim, cut.axis, group, rows, columns))
    return sorted(found, key=lambda c: c.group)


def group_consumers(space: PruningSpace, purpose: str) -> list[Consumer]:
    """The consumers of a language model's groups; only the hidden size, which many layers read, has none.

    Raises:
        ConfigError: a group is not of a language model; ``purpose`` is the setting that asked.
    """
    consumers = unit_consumers(space)
    known = {c.group for c in consumers}
    for g, group in enumerate(space.groups):
        if g not in known and group.kind != "hidden":
            raise ConfigError(
                f"{purpose} works on attention and feed-forward groups of language models; "
                f"group {group.name!r} is of kind {group.kind!r}"
            )
    return consumers


@dataclass(frozen=True)
class InputGram:
    """Moments of a layer's input x over ``count`` tokens: ``product`` (I, I) the mean of x x', ``mean`` (I,) of x."""

    product: Tensor = field(repr=False)
    mean: Tensor = field(repr=False)
    count: int

    def centred(self) -> Tensor:
        """The covariance of the input, (I, I): what a regression with an intercept works on."""
        return self.product - torch.outer(self.mean, self.mean)


class GramSource(Protocol):
    """Where Gram matrices come from: a store of all of them, or a walk that makes one block's at a time."""

    def each(self, consumers: Sequence[Consumer]) -> Iterator[tuple[Consumer, InputGram]]:
        """The matrix of each consumer, in their order; one may be used up before the next is asked for."""
        ...


class Grams:
    """The :class:`InputGram` of each consumer by module name; whoever is the last to need one takes it out."""

    def __init__(self, entries: Mapping[str, InputGram]) -> None:
        self._entries = dict(entries)

    def __getitem__(self, name: str) -> InputGram:
        if name not in self._entries:
            raise DataError(f"Gram matrices: none of {name!r}; collected are {sorted(self._entries)}")
        return self._entries[name]

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def names(self) -> list[str]:
        return sorted(self._entries)

    def each(self, consumers: Sequence[Consumer]) -> Iterator[tuple[Consumer, InputGram]]:
        for consumer in consumers:
            yield consumer, self[consumer.module]

    def pop(self, name: str) -> InputGram:
        """The entry, whose memory is free once the caller lets go of it."""
        entry = self[name]
        del self._entries[name]
        return entry

    @property
    def nbytes(self) -> int:
        return sum(e.product.nbytes + e.mean.nbytes for e in self._entries.values())


class UsedUp:
    """Gram matrices of a store that are taken out of it as they are asked for."""

    def __init__(self, grams: Grams) -> None:
        self._grams = grams

    def each(self, consumers: Sequence[Consumer]) -> Iterator[tuple[Consumer, InputGram]]:
        for consumer in consumers:
            yield consumer, self._grams.pop(consumer.module)


class GramWalk:
    """Gram matrices made one block at a time, in a pass over the calibration data that is run as they are asked for.

    Args:
        batches: gives the data anew at every call.
    """

    def __init__(self, model: nn.Module, batches: Callable[[], Iterable[tuple[Tensor, object]]]) -> None:
        self._model, self._batches = model, batches

    def each(self, consumers: Sequence[Consumer]) -> Iterator[tuple[Consumer, InputGram]]:
        """As `GramSource.each`, where consumers of one block stand together and blocks are in order.

        Raises:
            DataError: there are no batches, a layer is never called, or activations are not finite.
        """
        left = list(consumers)
        focus = Focus()
        for part in parts(self._model, self._batches(), focus):
            here = [c for c in left if part.holds(c.module)]
            found = _collected(self._model, [c.module for c in here], part.run, focus)
            for consumer in here:
                yield consumer, found.pop(consumer.module)
            left = [c for c in left if not part.holds(c.module)]
            if not left:
                return
        if left:
            raise DataError(f"calibration: the split is empty, or {left[0].module!r} is never called")


def collect(model: nn.Module, space: PruningSpace, batches: Iterable[tuple[Tensor, object]]) -> Grams:
    """Gram matrices of the attention and feed-forward groups' consumers, all of them, in one pass over ``batches``.

    Products are formed and summed in float32 (float64 for a float64 model): over B batches of positive
    sums the relative error stays near sqrt(B) * 6e-8, far below the ridge.

    Raises:
        DataError: there are no batches, or activations are not finite.
    """
    walk = GramWalk(model, lambda: batches)
    return Grams({consumer.module: gram for consumer, gram in walk.each(unit_consumers(space))})


def _collected(
    model: nn.Module, names: Sequence[str], run: Callable[[], None], focus: Focus
) -> dict[str, InputGram]:
    """The Gram matrices of some modules' inputs over a pass."""
    sums: dict[str, tuple[Tensor, Tensor]] = {}
    counts: dict[str, int] = {}

    def note(name: str) -> Any:
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = focus.rows(token_rows(inputs[0]))
            if name not in sums:
                sums[name] = x.new_zeros(x.shape[1], x.shape[1]), x.new_zeros(x.shape[1])
            product, total = sums[name]
            for start in range(0, len(product), _BLOCK):  # the lower triangle, by blocks of rows
                stop = start + _BLOCK
                product[start:stop, :stop].addmm_(x[:, start:stop].T, x[:, :stop])
            total += x.sum(dim=0)
            counts[name] = counts.get(name, 0) + len(x)

        return hook

    handles = [model.get_submodule(n).register_forward_pre_hook(note(n)) for n in names]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    missing = [name for name in names if name not in sums]
    if missing:
        raise DataError(f"calibration: the split is empty, or {missing[0]!r} is never called")
    for name, (product, total) in sums.items():
        product /= counts[name]
        total /= counts[name]
        for start in range(_BLOCK, len(product), _BLOCK):
            product[:start, start : start + _BLOCK] = product[start : start + _BLOCK, :start].T
        if not math.isfinite(float(product.diagonal().sum())):
            raise DataError(f"calibration: the input of {name!r} is not finite")
    return {name: InputGram(*sums.pop(name), counts[name]) for name in names}


def token_rows(x: Tensor) -> Tensor:
    """Activations as samples: (..., I) -> (tokens, I), in float32 or better."""
    flat = x.detach().reshape(-1, x.shape[-1])
    return flat if flat.dtype == torch.float64 else flat.float()
