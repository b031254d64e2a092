"""Shared by the rules of language models: blocks, and what belongs to them."""

from __future__ import annotations

import re

import numpy as np
import torch
from numpy.typing import ArrayLike

from ..errors import ConfigError
from ..language.calibration.grams import Consumer
from ..pruning.space import PruningSpace
from ..utils.arrays import Bools, Floats, Ints
from .context import Context

_BLOCK = re.compile(r"^(.*?\.\d+)\.")


def weights(context: Context, consumer: Consumer) -> Floats:
    """A consumer's weights as (inputs, outputs)."""
    return array(consumer.matrix(context.model))


def array(values: torch.Tensor | ArrayLike) -> Floats:
    """A tensor or an array as float64 numbers on the CPU."""
    if isinstance(values, torch.Tensor):
        values = values.detach().double().cpu().numpy()
    return np.asarray(values, dtype=np.float64)


def block_indices(space: PruningSpace) -> Ints:
    """The block of each group, (G,); -1 for the hidden size."""
    return np.array([g.block for g in space.groups], dtype=np.int64)


def block_count(space: PruningSpace) -> int:
    """Number of blocks of the model: the last one that has a group, and all before it."""
    return int(block_indices(space).max(initial=-1)) + 1


def of_kind(space: PruningSpace, kind: str) -> Bools:
    """Which groups are of a kind, (G,)."""
    return np.array([g.kind == kind for g in space.groups], dtype=bool)


def per_group(space: PruningSpace, of_block: Floats) -> Floats:
    """Values of the blocks (B,) given to their groups (G,); 0 for the hidden size."""
    index = block_indices(space)
    return np.where(index >= 0, np.asarray(of_block, dtype=np.float64)[np.maximum(index, 0)], 0.0)


def block_cosines(context: Context) -> Floats:
    """Mean over tokens of cos(x_in, x_out) of each block, (B,).

    Raises:
        ConfigError: the blocks of the model are not known (a module of an unknown family).
    """
    found = np.asarray(context.statistics().block_cosine)
    if len(found) < block_count(context.space):
        raise ConfigError("rule: needs the blocks' inputs and outputs, which are not known for this model")
    return found


def block_prefixes(space: PruningSpace) -> dict[int, str]:
    """Module path of each block that has a group, "model.layers.3": up to the first number in the path."""
    prefixes: dict[int, str] = {}
    for group in space.groups:
        for member in group.members:
            match = _BLOCK.match(member.module + ".")
            if group.block >= 0 and match:
                prefixes.setdefault(group.block, match.group(1))
    return prefixes
