"""Tracing: from a model and its Torch-Pruning dependency graph to a :class:`PruningSpace`.

Its graph says which layers follow each other and how channel
indices move along every edge; here the indices of all layers that must go together are joined, channel
by channel, so that shifted, concatenated, split and flattened channels all come out of one mechanism.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch_pruning as tp
from torch import Tensor, nn

from ..errors import GraphError, first_line
from ..utils.torch_internals import BATCH_NORM, CONVOLUTION, INSTANCE_NORM
from .disjoint_sets import DisjointSets
from .layers import ChannelPad
from .torch_pruning_internals import (
    DependencyGraph,
    GraphEdge,
    GraphNode,
    PruningFunction,
    is_node,
    is_output,
    moved,
)
from .watchdog import limited

MIXERS = (CONVOLUTION, nn.Linear)
# Their statistics run over the channels, so no cut of them equals a masked dense model (DESIGN: contract 2).
_CROSSING = (
    nn.LayerNorm,
    nn.GroupNorm,
    nn.LocalResponseNorm,
    nn.RMSNorm,
    INSTANCE_NORM,
)

ExampleInputs = Tensor | Sequence[object] | Mapping[str, object]
"""What a model is called with: a tensor, a tuple of arguments, or a dict of keyword arguments."""
_Channels = tuple[GraphNode, str, list[int]]
"""A node, a side of it, channels of that side."""


@dataclass(frozen=True)
class Side:
    """The channels on one side of a layer: ``classes[i]`` is the number of the set that channel i belongs to."""

    module: nn.Module | nn.Parameter
    name: str
    role: str
    classes: np.ndarray
    dim: int = 0


@dataclass(frozen=True)
class ChannelGraph:
    """All sides of all traced layers, and why some sets of channels may not be cut."""

    sides: tuple[Side, ...]
    fixed: dict[int, str]
    count: int


def is_depthwise(module: object) -> bool:
    """A convolution with one filter per channel: channels pass through it, it does not mix them."""
    return isinstance(module, CONVOLUTION) and module.groups == module.out_channels == module.in_channels > 1


class _Passive(tp.BasePruningFunc):
    """Tells Torch-Pruning that the input and output channels of a ChannelPad are not the same ones."""

    def __init__(self, channels: dict[nn.Module, tuple[int, int]]) -> None:
        super().__init__()
        self._channels = channels

    def prune_out_channels(self, layer: nn.Module, idxs: Sequence[int]) -> nn.Module:
        return layer

    def prune_in_channels(self, layer: nn.Module, idxs: Sequence[int]) -> nn.Module:
        return layer

    def get_out_channels(self, layer: nn.Module) -> int:
        return self._channels[layer][1]

    def get_in_channels(self, layer: nn.Module) -> int:
        return self._channels[layer][0]


def passive_pads(model: nn.Module, example_inputs: ExampleInputs) -> dict[type, tp.BasePruningFunc]:
    """What to give Torch-Pruning as ``customized_pruners`` for a model whose shortcuts pad channels."""
    return {ChannelPad: _Passive(_pad_channels(model, example_inputs))}


def run(model: nn.Module, example_inputs: ExampleInputs) -> Any:
    """Call a model with a tensor, a tuple of arguments or a dict of keyword arguments."""
    if isinstance(example_inputs, dict):
        return model(**example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return model(*example_inputs)
    return model(example_inputs)


def trainable_copy(model: nn.Module) -> nn.Module:
    """A copy in eval mode in which every float parameter records gradients (the tracer follows autograd)."""
    twin = copy.deepcopy(model).eval()
    for parameter in twin.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
    return twin


def channel_graph(
    model: nn.Module, example_inputs: ExampleInputs, *, max_seconds: float, max_memory_gb: float
) -> ChannelGraph:
    """Trace ``model`` (already a copy of our own, see :func:`trainable_copy`) and join its channels.

    Raises:
        GraphError: Torch-Pruning cannot follow the model, or not within the limits.
    """
    pads = _pad_channels(model, example_inputs)
    what = f"tracing {type(model).__name__} with Torch-Pruning"
    with limited(what, max_seconds, max_memory_gb):
        try:
            graph = _dependency_graph(model, example_inputs, pads)
            return _Joiner(model, graph, pads).joined()
        except GraphError:
            raise
        except Exception as error:
            where = _culprit(error, {id(m): name for name, m in model.named_modules() if name})
            raise GraphError(
                f"{what} failed{where}: it cannot follow what the model does there "
                f"({type(error).__name__}: {first_line(error)})"
            ) from error


def _pad_channels(model: nn.Module, example_inputs: ExampleInputs) -> dict[nn.Module, tuple[int, int]]:
    seen: dict[nn.Module, tuple[int, int]] = {}

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen[module] = (inputs[0].shape[1], output.shape[1])

    handles = [m.register_forward_hook(note) for m in model.modules() if isinstance(m, ChannelPad)]
    if handles:
        with torch.no_grad():
            run(model, example_inputs)
    for handle in handles:
        handle.remove()
    return seen


def _dependency_graph(
    model: nn.Module, example_inputs: ExampleInputs, pads: dict[nn.Module, tuple[int, int]]
) -> DependencyGraph:
    with warnings.catch_warnings(), torch.enable_grad():
        # Torch-Pruning warns about parameters outside of layers; trace() reports what matters itself.
        warnings.simplefilter("ignore")
        graph: DependencyGraph = tp.DependencyGraph().build_dependency(
            model,
            example_inputs,
            forward_fn=run,
            customized_pruners={ChannelPad: _Passive(pads)},
            verbose=False,
        )
    return graph


class _Joiner:
    """Walks every edge of the dependency graph once and joins the channels that it links."""

    def __init__(
        self, model: nn.Module, graph: DependencyGraph, pads: dict[nn.Module, tuple[int, int]]
    ) -> None:
        self.graph = graph
        self.pads = pads
        self.names = {id(m): name for name, m in model.named_modules()}
        self.names |= {id(p): name for name, p in model.named_parameters()}
        self.sets = DisjointSets()
        self.slots: dict[tuple[int, str], dict[int, int]] = {}  # (node, side) -> channel -> element
        self.nodes = {id(node): node for node in graph.module2node.values()}

    def joined(self) -> ChannelGraph:
        self._walk(self._seeds())
        self._join_grouped()
        self._join_pads()
        return self._collect()

    def _functions(self, node: GraphNode) -> tuple[PruningFunction, PruningFunction]:
        pruner = self.graph.get_pruner_of_module(node.module)
        return pruner.prune_in_channels, pruner.prune_out_channels

    def _side(self, node: GraphNode, function: PruningFunction) -> str:
        inward, outward = self._functions(node)
        if inward == outward:
            return "io"
        return "in" if function == inward else "out"

    def _slot(self, node: GraphNode, side: str, channel: int) -> tuple[int, bool]:
        slots = self.slots.setdefault((id(node), side), {})
        if channel in slots:
            return slots[channel], False
        slots[channel] = self.sets.new()
        return slots[channel], True

    def _sides(self, node: GraphNode) -> Iterator[tuple[str, int]]:
        """(side, number of channels) of a node that has channels of its own."""
        inward, outward = self._functions(node)
        if inward == outward:
            channels = self.graph.get_out_channels(node)
            if channels is not None:
                yield "io", int(channels)
            return
        yield "in", int(self.graph.get_in_channels(node))
        outputs = self.graph.get_out_channels(node)
        assert outputs is not None
        yield "out", int(outputs)

    def _seeds(self) -> list[_Channels]:
        seeds = []
        for node in self.nodes.values():
            for side, channels in self._sides(node):
                for channel in range(channels):
                    self._slot(node, side, channel)
                seeds.append((node, side, list(range(channels))))
        return seeds

    def _walk(self, work: list[_Channels]) -> None:
        while work:
            node, side, channels = work.pop()
            inward, outward = self._functions(node)
            function = outward if side in ("out", "io") else inward
            for edge in node.dependencies:
                if not edge.is_triggered_by(function):
                    continue
                target_side = self._side(edge.target, edge.handler)
                fresh = self._follow(node, side, channels, edge, target_side)
                if fresh:
                    work.append((edge.target, target_side, fresh))

    def _follow(
        self, node: GraphNode, side: str, channels: list[int], edge: GraphEdge, target_side: str
    ) -> list[int]:
        source = self.slots[(id(node), side)]
        fresh = []
        for channel, origin in moved(channels, edge):
            element, new = self._slot(edge.target, target_side, channel)
            if new:
                fresh.append(channel)
            self.sets.join(source[origin], element)
        return fresh

    def _join_grouped(self) -> None:
        """A unit of a grouped convolution is one channel of every group, so that the groups stay even."""
        for node in self.nodes.values():
            layer = node.module
            if not isinstance(layer, CONVOLUTION) or layer.groups == 1 or is_depthwise(layer):
                continue
            for side, channels in self._sides(node):
                slots, size = self.slots[(id(node), side)], channels // layer.groups
                for channel in range(size, channels):
                    self.sets.join(slots[channel % size], slots[channel])

    def _join_pads(self) -> None:
        for node in self.nodes.values():
            if isinstance(node.module, ChannelPad):
                inside, outside = self.slots[(id(node), "in")], self.slots[(id(node), "out")]
                for channel in range(self.pads[node.module][0]):
                    self.sets.join(inside[channel], outside[node.module.before + channel])

    def _collect(self) -> ChannelGraph:
        numbers: dict[int, int] = {}

        def number(element: int) -> int:
            return numbers.setdefault(self.sets.find(element), len(numbers))

        sides: list[Side] = []
        fixed: dict[int, str] = {}
        for node in self.nodes.values():
            layer = node.module
            reason = self._reason(layer)
            known = dict(self._sides(node))
            for side in ("in", "out", "io"):
                slots = self.slots.get((id(node), side), {})
                if reason:
                    fixed |= {number(element): reason for element in slots.values()}
                if side not in known or id(layer) not in self.names:
                    continue
                # An index past the layer's end means that the graph misread the model there.
                beyond = [c for c in slots if c >= known[side]]
                text = f"the dependency graph does not fit {self.names[id(layer)]!r}"
                fixed |= {number(slots[c]): text for c in beyond}
                classes = np.array([number(slots[c]) for c in range(known[side])], dtype=np.int64)
                sides.append(
                    Side(layer, self.names[id(layer)], _role(layer, side), classes, max(node.pruning_dim, 0))
                )
        return ChannelGraph(tuple(sides), fixed, len(numbers))

    def _reason(self, layer: object) -> str:
        """Why the channels of this node may not be cut, or "" when they may."""
        name = self.names.get(id(layer), type(layer).__name__)
        if isinstance(layer, _CROSSING):
            return f"{name!r} ({type(layer).__name__}) normalises over its channels"
        if isinstance(layer, (nn.MultiheadAttention, nn.LSTM, nn.Embedding)):
            return f"{name!r} ({type(layer).__name__}) is not cut"
        if (
            isinstance(layer, CONVOLUTION)
            and layer.groups == layer.out_channels > 1
            and not is_depthwise(layer)
        ):
            return f"{name!r} is a grouped convolution with several inputs for each of its filters"
        if is_output(layer):
            return "output of the model"
        return ""


def _role(layer: object, side: str) -> str:
    if isinstance(layer, nn.Parameter):
        return "parameter"
    if isinstance(layer, ChannelPad):
        return f"pad-{side}"
    if is_depthwise(layer):
        return "depthwise"
    if isinstance(layer, BATCH_NORM):
        return "norm"
    if isinstance(layer, nn.PReLU):
        return "activation"
    if side == "io" and isinstance(layer, CONVOLUTION):
        return "depthwise"
    return side if side != "io" else "norm"


def unused_modules(
    model: nn.Module, called: Iterable[nn.Module], example_inputs: ExampleInputs
) -> tuple[str, ...]:
    """Names of the outermost modules whose parameters the forward pass in eval mode does not use."""
    used = set(called)
    idle: dict[str, list[nn.Parameter]] = {}
    for name, module in model.named_modules():
        if any(name.startswith(outer + ".") for outer in idle):
            continue
        parameters = [p for p in module.parameters() if p.requires_grad]
        if parameters and not any(m in used for m in module.modules()):
            idle[name] = parameters
    if not idle:
        return ()
    # A module that is never called may still lend its parameters (the output layer of an attention does).
    with torch.enable_grad():
        total = sum(
            (t.float().sum() for t in tensors(run(model, example_inputs)) if t.requires_grad), torch.zeros(())
        )
    flat = [p for parameters in idle.values() for p in parameters]
    gradients = dict(zip(map(id, flat), torch.autograd.grad(total, flat, allow_unused=True), strict=True))
    return tuple(n for n, parameters in idle.items() if all(gradients[id(p)] is None for p in parameters))


def tensors(value: object) -> Iterator[Tensor]:
    """All tensors in a nest of tuples, lists, mappings and transformers' model outputs."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors(item)


def _culprit(error: BaseException, names: dict[int, str]) -> str:
    """The nearest named layer before the operation at which Torch-Pruning failed, read off its frames."""
    trail = error.__traceback__
    node = None
    while trail is not None:
        found = [v for v in trail.tb_frame.f_locals.values() if is_node(v)]
        node = found[0] if found else node
        trail = trail.tb_next
    queue, seen = [node] if node is not None else [], set()
    while queue:
        current = queue.pop(0)
        if id(current.module) in names:
            return f" after layer {names[id(current.module)]!r}"
        seen.add(id(current))
        queue += [n for n in current.inputs if id(n) not in seen]
    return ""
