"""Forward-pass statistics of a language model that importances and rules read, all from one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import ConfigError, DataError
from ...pruning.space import PruningSpace
from ...utils.arrays import Floats
from ..families import Block, UnsupportedModel, blocks_of
from .grams import token_rows, unit_consumers
from .routing import watch_experts
from .walk import Focus, run_blocks, stream_of

# Largest relative difference at which a block counts as x + attention(x) + ffn(...).
_ADDITIVE = 1e-2


@dataclass(frozen=True)
class Moments:
    """Mean, mean square and variance, each (I,), of a layer's input columns over ``count`` tokens."""

    mean: Floats = field(repr=False)
    second: Floats = field(repr=False)
    variance: Floats = field(repr=False)
    count: int


@dataclass(frozen=True)
class Statistics:
    """What one pass over the calibration data tells about a language model.

    ``inputs`` holds the :class:`Moments` of each consumer (o_proj, down_proj, an expert's) by `Consumer.name`; those of
    an expert are of z, zero for tokens that are sent elsewhere (`routing`). The cosines,
    each (B,) for B blocks, are means over tokens of cos(x_in, x_out) of the residual stream: around the
    whole block (ShortGPT, arXiv 2403.03853, calls 1 - this the block's influence), from the block's input
    to the stream without the feed-forward part, and from there to the block's output.
    """

    inputs: Mapping[str, Moments]
    block_cosine: Floats
    attention_cosine: Floats
    ffn_cosine: Floats


def collect(model: nn.Module, space: PruningSpace, batches: Iterable[tuple[Tensor, object]]) -> Statistics:
    """Statistics over ``batches`` of (input ids, targets); modes of the model are left as they were.

    Which tokens count where targets leave some out is said by `Focus`.

    Raises:
        ConfigError: the space has no attention or feed-forward group.
        DataError: there are no batches.
    """
    consumers = unit_consumers(space)
    if not consumers:
        raise ConfigError(
            "statistics: the model has no attention or feed-forward group; they are for language models"
        )
    inputs = {c.name: _Sums(len(c.columns) * c.columns.shape[1]) for c in consumers}
    focus = Focus()
    try:
        blocks = [_BlockProbe(model, b, focus) for b in blocks_of(model)]
    except (UnsupportedModel, AttributeError):  # a module of the user's own: moments only
        blocks = []
    handles: list[Any] = []
    for module in dict.fromkeys(c.module for c in consumers):
        own = [inputs[c.name] for c in consumers if c.module == module]
        mixed = any(c.module == module and c.lane >= 0 for c in consumers)
        note = _noting_experts if mixed else _noting
        handles += note(model.get_submodule(module), own, blocks, focus)
    for probe in blocks:
        handles += probe.handles()
    try:
        run_blocks(model, batches, focus)
    finally:
        for handle in handles:
            handle.remove()
    if not all(sums.count for sums in inputs.values()):
        raise DataError("calibration: the split is empty")
    means = np.array([p.sums.double().cpu().numpy() / p.count for p in blocks]).reshape(-1, 3)
    return Statistics({n: s.moments() for n, s in inputs.items()}, means[:, 0], means[:, 1], means[:, 2])


class _Sums:
    """Running sums of a layer's input and of its square, in float64."""

    def __init__(self, inputs: int) -> None:
        self.count = 0
        self._first: Any = 0.0
        self._second: Any = 0.0
        self._inputs = inputs

    def add(self, x: Tensor, count: bool = True) -> None:
        """Rows x (n, I); ``count``: they are tokens that have not been counted yet."""
        self._first = self._first + x.sum(dim=0, dtype=torch.float64)
        self._second = self._second + x.square().sum(dim=0, dtype=torch.float64)
        self.count += len(x) if count else 0

    def moments(self) -> Moments:
        nothing = torch.zeros(self._inputs, dtype=torch.float64)  # of an expert that no token is sent to
        mean, second = (
            (s / self.count).cpu().numpy() if isinstance(s, Tensor) else nothing.numpy()
            for s in (self._first, self._second)
        )
        return Moments(mean, second, np.maximum(second - mean**2, 0.0), self.count)


def _noting(layer: nn.Module, sums: Sequence[_Sums], blocks: list[_BlockProbe], focus: Focus) -> list[Any]:
    """Hooks of a layer whose input is added to the sums."""

    def hook(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if not any(b.repeating for b in blocks):
            sums[0].add(focus.rows(token_rows(inputs[0])))

    return [layer.register_forward_pre_hook(hook)]


def _noting_experts(
    experts: nn.Module, sums: Sequence[_Sums], blocks: list[_BlockProbe], focus: Focus
) -> list[Any]:
    """Hooks of a module of experts, each of which has sums of its own."""

    def count(hidden: Tensor) -> None:
        if not any(b.repeating for b in blocks):
            for own in sums:
                own.count += len(hidden)

    def note(expert: int, x: Tensor, w: Tensor) -> None:
        if not any(b.repeating for b in blocks):
            sums[expert].add(x * w[:, None], count=False)

    return [watch_experts(experts, note, count, focus)]


class _BlockProbe:
    """Cosines of one block, summed over tokens.

    The stream between the two parts is x_in + the attention's output where the block adds its parts
    as they are, which is checked on every batch. Blocks that norm or scale what they add (Gemma,
    Granite) are run a second time without their feed-forward part's output.
    """

    def __init__(self, model: nn.Module, block: Block, focus: Focus) -> None:
        self._focus = focus
        self._block = model.get_submodule(block.path)
        names = {"out": block.out, "down": block.ffn_output}
        self._parts = {key: model.get_submodule(name) for key, name in names.items() if name}
        self._given: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
        self._added: dict[str, Tensor] = {}
        self.repeating = False
        self.sums = torch.zeros(3, dtype=torch.float64)
        self.count = 0

    def handles(self) -> list[Any]:
        parts = [m.register_forward_hook(self._part(name)) for name, m in self._parts.items()]
        before = self._block.register_forward_pre_hook(self._before, with_kwargs=True)
        return [*parts, before, self._block.register_forward_hook(self._after)]

    def _part(self, name: str) -> Callable[..., Tensor | None]:
        def hook(layer: nn.Module, inputs: object, output: Any) -> Any:
            if not self.repeating:
                self._added[name] = stream_of(output)
                return None
            if name != "down":
                return None
            nothing = torch.zeros_like(stream_of(output))
            return (nothing, *output[1:]) if isinstance(output, tuple) else nothing

        return hook

    def _before(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._given = args, kwargs
        self._added = {}

    def _after(self, layer: nn.Module, inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
        args, kwargs = self._given
        x_in = args[0] if args else kwargs["hidden_states"]
        x_out = stream_of(output)
        x_mid = self._between(x_in, x_out)
        pairs = ((x_in, x_out), (x_in, x_mid), (x_mid, x_out))
        for i, (a, b) in enumerate(pairs):
            cosines = F.cosine_similarity(token_rows(a), token_rows(b), dim=-1)
            self.sums[i] += self._focus.rows(cosines).sum().double().cpu()
        self.count += len(self._focus.rows(token_rows(x_in)))
        self._given, self._added = ((), {}), {}

    def _between(self, x_in: Tensor, x_out: Tensor) -> Tensor:
        # A dropped part's output layer is never called: its stub adds the bias alone.
        attention, ffn = (self._added.get(name) for name in ("out", "down"))
        if attention is not None and ffn is not None:
            x_mid = x_in + attention.reshape(x_in.shape)
            change = (x_out - x_in).float()
            rest = (x_out - x_mid - ffn.reshape(x_in.shape)).float()
            if float(rest.norm()) <= _ADDITIVE * float(change.norm()):
                return x_mid
        args, kwargs = self._given
        self.repeating = True
        try:
            return stream_of(self._block.forward(*args, **kwargs))
        finally:
            self.repeating = False
