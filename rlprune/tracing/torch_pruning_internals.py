"""Everything that rlprune takes from the inside of Torch-Pruning; nothing else in the package does.

Relied on in 1.6:

- ``torch_pruning._helpers._HybridIndex(idx, root_idx)``: a channel of a layer, and where it comes from; the mappings
  of an edge take and give lists of them.
- ``torch_pruning.dependency.node.Node`` with ``.module`` and ``.inputs``: a node of the dependency graph.
- ``torch_pruning.ops._OutputOp``: the module of the node that stands for an output of the model.

``tests/test_internals.py`` fails where one of them is gone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

import torch_pruning as tp
from torch import nn
from torch_pruning._helpers import _HybridIndex
from torch_pruning.dependency.node import Node

PruningFunction = Callable[[nn.Module, Sequence[int]], nn.Module]
"""Cuts channels of a layer; here it only says which side of the layer an edge belongs to."""


class GraphEdge(Protocol):
    """An edge of the dependency graph: what a cut of its source by a function does to its target."""

    target: GraphNode
    handler: PruningFunction
    index_mapping: Sequence[Callable[[list[_HybridIndex]], list[_HybridIndex]] | None]

    def is_triggered_by(self, function: PruningFunction) -> bool: ...


class GraphNode(Protocol):
    """A node of the dependency graph: a layer, a parameter outside of layers, or an operation."""

    module: nn.Module | nn.Parameter
    dependencies: Sequence[GraphEdge]
    pruning_dim: int


class LayerPruner(Protocol):
    """How the channels of a kind of layer are cut."""

    prune_in_channels: PruningFunction
    prune_out_channels: PruningFunction


class DependencyGraph(Protocol):
    """The part of Torch-Pruning's graph that is read."""

    module2node: Mapping[nn.Module | nn.Parameter, GraphNode]

    def get_pruner_of_module(self, module: nn.Module | nn.Parameter) -> LayerPruner: ...
    def get_in_channels(self, node: GraphNode) -> int: ...
    def get_out_channels(self, node: GraphNode) -> int | None: ...


def moved(channels: Iterable[int], edge: GraphEdge) -> list[tuple[int, int]]:
    """Where an edge of the dependency graph takes channels: (channel of its target, channel it comes from)."""
    indices = [_HybridIndex(idx=c, root_idx=c) for c in channels]
    for mapping in edge.index_mapping:
        if mapping is not None:
            indices = mapping(indices)
    return [(index.idx, index.root_idx) for index in indices]


def is_output(layer: object) -> bool:
    """Whether the module of a node stands for an output of the model."""
    return isinstance(layer, tp.ops._OutputOp)


def is_node(value: object) -> bool:
    """Whether a value is a node of a dependency graph."""
    return isinstance(value, Node)
