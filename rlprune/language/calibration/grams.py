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
from ...pruning.space import Cut, PruningSpace
from ...utils.arrays import Ints
from ..expert_groups import EXPERTS
from .routing import watch_experts
from .walk import Focus, parts

LANGUAGE_KINDS = ("attention", "ffn")

# Rows of a Gram matrix that are summed at once: blocks above the diagonal are mirrored, not computed.
_BLOCK = 512


@dataclass(frozen=True)
class Consumer:
    """The layer that reads all units of one group: its weight, and which input columns each unit has.

    ``dim`` is the weight's input dimension (1 of a Linear, 0 of GPT-2's Conv1D), ``rows`` the axis of its
    output dimension where that is cut as well. ``columns`` has shape (units, columns of a unit).

    The experts of a mixture lie in one tensor, (E, H, F) or (E, F, H): ``lane`` is the expert, -1 for other layers, and
    ``module`` holds all of them. What it reads is weighted by the router (`routing`).
    """

    module: str
    tensor: str
    dim: int
    axis: int
    group: int
    rows: int | None
    columns: Ints = field(repr=False)
    lane: int = -1

    @property
    def name(self) -> str:
        """What its measurements are kept under: the module's name, and the expert's number."""
        return self.module if self.lane < 0 else f"{self.module}.{self.lane}"

    @property
    def place(self) -> slice:
        """Where its units stand among those of its group."""
        return slice(None) if self.lane < 0 else slice(*(len(self.columns) * (self.lane + i) for i in (0, 1)))

    def matrix(self, model: nn.Module) -> Tensor:
        """The weight as (inputs, outputs), a view of the model's."""
        weight = model.get_parameter(self.tensor).detach()
        if self.lane >= 0:
            return weight[self.lane] if self.dim == 1 else weight[self.lane].T
        return weight if self.dim == 0 else weight.T

    def has_bias(self, model: nn.Module) -> bool:
        name = "bias" if self.lane < 0 else f"{self.tensor.rpartition('.')[2]}_bias"
        return getattr(model.get_submodule(self.module), name, None) is not None


def unit_consumers(space: PruningSpace) -> list[Consumer]:
    """The consumers of the attention and feed-forward groups, in the order of the groups; one for each expert.

    Groups of other kinds (channels of a convolution, the hidden size) have none: their units reach many
    layers at once.
    """
    owner = np.append(np.repeat(np.arange(len(space.groups)), space.unit_counts), -1)
    found = []
    for cut in space.cuts:
        axis = space.axes[cut.axis]
        slots = axis.slots
        if cut.consumer and (axis.lanes > 1 or axis.lane_axis >= 0):
            found += _lane_consumers(space, cut, int(owner[slots[0]]))
            continue
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


def _lane_consumers(space: PruningSpace, cut: Cut, group: int) -> list[Consumer]:
    """The consumers of a group with lanes, one a lane."""
    width, lanes = space.groups[group].width, space.groups[group].lanes
    module, columns = cut.tensor.rpartition(".")[0], np.arange(width)[:, None]
    return [
        Consumer(module, cut.tensor, cut.dim, cut.axis, group, None, columns, lane) for lane in range(lanes)
    ]


def group_consumers(space: PruningSpace, purpose: str) -> list[Consumer]:
    """The consumers of a language model's groups; the hidden size, which many layers read, and whole experts have none.

    Raises:
        ConfigError: a group is not of a language model; ``purpose`` is the setting that asked.
    """
    consumers = unit_consumers(space)
    known = {c.group for c in consumers}
    for g, group in enumerate(space.groups):
        if g not in known and group.kind not in ("hidden", EXPERTS):
            raise ConfigError(
                f"{purpose} works on attention and feed-forward groups of language models; "
                f"group {group.name!r} is of kind {group.kind!r}"
            )
    return consumers


@dataclass(frozen=True)
class InputGram:
    """Moments of a layer's input x over ``count`` tokens: ``product`` (I, I) the mean of x x', ``mean`` (I,) of x.

    Of an expert (`routing`) the tokens are those that are sent to it with weights w: ``product`` is the sum of w^2 x x'
    and ``mass`` that of w^2, both over the number of all tokens, and ``mean`` the mean of x weighted by w^2.
    """

    product: Tensor = field(repr=False)
    mean: Tensor = field(repr=False)
    count: int
    mass: float = 1.0
    routed: bool = False

    def centred(self) -> Tensor:
        """The covariance of the input, (I, I): what a regression with an intercept works on."""
        return self.product - self.mass * torch.outer(self.mean, self.mean)

    def ridge(self, ridge: float) -> float:
        """The penalty of a regression: of an expert that gets fewer tokens than it has neurons, by so much larger."""
        return ridge * max(1.0, len(self.mean) / max(self.count, 1)) if self.routed else ridge


class GramSource(Protocol):
    """Where Gram matrices come from: a store of all of them, or a walk that makes one block's at a time."""

    def each(self, consumers: Sequence[Consumer]) -> Iterator[tuple[Consumer, InputGram]]:
        """The matrix of each consumer, in their order; one may be used up before the next is asked for."""
        ...


class Grams:
    """The :class:`InputGram` of each consumer by module name; the last user of one removes it."""

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
            yield consumer, self[consumer.name]

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
            yield consumer, self._grams.pop(consumer.name)


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
            found = _collected(self._model, here, part.run, focus)
            for consumer in here:
                yield consumer, found.pop(consumer.name)
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
    return Grams({consumer.name: gram for consumer, gram in walk.each(unit_consumers(space))})


class _Sum:
    """Running sums of a layer's input: of x x' (the lower triangle, by blocks of rows), of x, and of weights."""

    def __init__(self, like: Tensor, inputs: int) -> None:
        self.product, self.total = like.new_zeros(inputs, inputs), like.new_zeros(inputs)
        self.count, self.mass, self.routed = 0, 0.0, False

    def add(self, x: Tensor, weights: Tensor | None = None) -> None:
        """Rows x (n, I) that count by the squares of their weights (n,)."""
        z = x if weights is None else x * weights[:, None]
        for start in range(0, len(self.product), _BLOCK):
            stop = start + _BLOCK
            self.product[start:stop, :stop].addmm_(z[:, start:stop].T, z[:, :stop])
        self.total += z.sum(dim=0) if weights is None else weights @ z
        self.mass += len(x) if weights is None else float(weights.square().sum())
        self.count += len(x)

    def gram(self, name: str, tokens: int) -> InputGram:
        """Their means over ``tokens``; DataError where they are not finite."""
        self.product /= tokens
        self.total /= max(self.mass, 1e-30)
        for start in range(_BLOCK, len(self.product), _BLOCK):
            above = self.product[start : start + _BLOCK, :start]
            self.product[:start, start : start + _BLOCK] = above.T
        if not math.isfinite(float(self.product.diagonal().sum())):
            raise DataError(f"calibration: the input of {name!r} is not finite")
        return InputGram(self.product, self.total, self.count, self.mass / tokens, self.routed)


def _collected(
    model: nn.Module, consumers: Sequence[Consumer], run: Callable[[], None], focus: Focus
) -> dict[str, InputGram]:
    """The Gram matrices of some consumers' inputs over a pass, by their names."""
    sums: dict[str, _Sum] = {}
    tokens: dict[str, int] = {}

    def start(name: str, like: Tensor, inputs: int) -> _Sum:
        if name not in sums:
            sums[name] = _Sum(like, inputs)
        return sums[name]

    def note(name: str) -> Any:
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = focus.rows(token_rows(inputs[0]))
            start(name, x, x.shape[1]).add(x)
            tokens[name] = tokens.get(name, 0) + len(x)

        return hook

    def note_experts(own: Sequence[Consumer]) -> list[Any]:
        module = model.get_submodule(own[0].module)

        def count(hidden: Tensor) -> None:
            for consumer in own:  # also those that no token is sent to
                start(consumer.name, token_rows(hidden), len(consumer.columns)).routed = True
                tokens[consumer.name] = tokens.get(consumer.name, 0) + len(hidden)

        def add(expert: int, x: Tensor, w: Tensor) -> None:
            sums[own[expert].name].add(x, w)

        return [watch_experts(module, add, count, focus)]

    plain = [c for c in consumers if c.lane < 0]
    mixtures = dict.fromkeys(c.module for c in consumers if c.lane >= 0)
    handles = [model.get_submodule(c.module).register_forward_pre_hook(note(c.name)) for c in plain]
    for module in mixtures:
        handles += note_experts([c for c in consumers if c.module == module])
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    missing = [c.name for c in consumers if c.name not in sums]
    if missing:
        raise DataError(f"calibration: the split is empty, or {missing[0]!r} is never called")
    return {c.name: sums.pop(c.name).gram(c.name, tokens[c.name]) for c in consumers}


def token_rows(x: Tensor) -> Tensor:
    """Activations as samples: (..., I) -> (tokens, I), in float32 or better."""
    flat = x.detach().reshape(-1, x.shape[-1])
    return flat if flat.dtype == torch.float64 else flat.float()
