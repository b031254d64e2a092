"""Everything that rlprune takes from the inside of Torch-Pruning; nothing else in the package does.

Relied on in 1.6:

- ``torch_pruning._helpers._HybridIndex(idx, root_idx)``: a channel of a layer, and where it comes from; the mappings
  of an edge take and give lists of them.
- ``torch_pruning.dependency.node.Node`` with ``.module`` and ``.inputs``: a node of the dependency graph.
- ``torch_pruning.ops._OutputOp``: the module of the node that stands for an output of the model.

``tests/test_internals.py`` fails where one of them is gone.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch_pruning as tp
from torch_pruning._helpers import _HybridIndex
from torch_pruning.dependency.node import Node


def moved(channels: Iterable[int], edge: Any) -> list[tuple[int, int]]:
    """Where an edge of the dependency graph takes channels: (channel of its target, channel it comes from)."""
    indices = [_HybridIndex(idx=c, root_idx=c) for c in channels]
    for mapping in edge.index_mapping:
        if mapping is not None:
            indices = mapping(indices)
    return [(index.idx, index.root_idx) for index in indices]


def is_output(layer: Any) -> bool:
    """Whether the module of a node stands for an output of the model."""
    return isinstance(layer, tp.ops._OutputOp)


def is_node(value: Any) -> bool:
    """Whether a value is a node of a dependency graph."""
    return isinstance(value, Node)
