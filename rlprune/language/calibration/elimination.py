"""The eliminations (`rlprune.recovery.elimination`) of a language model's groups, from its consumers' Gram matrices."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from ...pruning.space import PruningSpace
from ...recovery.elimination import Elimination, eliminate
from ...utils.arrays import Floats
from .grams import Consumer, GramSource, InputGram, group_consumers

Ranked = Callable[[Consumer, InputGram, Floats], None]
"""Is told of every consumer, its Gram matrix and its units' scores, while the matrix is there."""


def eliminations(
    model: nn.Module, space: PruningSpace, grams: GramSource, ridge: float = 1e-3, then: Ranked | None = None
) -> dict[int, Elimination]:
    """The :class:`Elimination` of each group (by index) of a language model, from its consumers' Gram matrices.

    A layer with a bias is judged with the intercept that its reconstruction will get. The hidden size has
    no single consumer and is left out.
    """
    found: dict[int, Elimination] = {}
    with torch.no_grad():
        for consumer, gram in grams.each(group_consumers(space, "prune.importance: 'obs'")):
            product = gram.centred() if consumer.has_bias(model) else gram.product
            one = eliminate(product, consumer.matrix(model), consumer.columns, gram.ridge(ridge))
            note_elimination(found, consumer, one)
            if then is not None:
                then(consumer, gram, one.ranks)
            del gram, product  # before the next block's are made
    return found


def note_elimination(found: dict[int, Elimination], consumer: Consumer, one: Elimination) -> None:
    """Add a consumer's elimination to those of the groups."""
    before = found.get(consumer.group)
    found[consumer.group] = one if before is None else before.beside(one)
