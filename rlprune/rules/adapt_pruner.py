"""Adapt-Pruner's allocation: blocks that change the residual stream little lose more, a little at a time."""

from __future__ import annotations

import numpy as np

from ..utils.arrays import Floats
from .blocks import block_cosines, per_group
from .context import Context, rule
from .threshold import as_distribution

AMPLITUDE = 0.02
STEP = 1 / 50
LIMIT = 0.99


@rule(
    "Adapt-Pruner: sparsity grows faster where a block's input and output are alike",
    needs_workload=True,
    wing="language",
)
def adapt_pruner(context: Context) -> Floats:
    """Adapt-Pruner's layer-wise sparsity (Pan et al. 2025, arXiv 2502.03460, section 3.2).

    The importance of a block is the mean over tokens of -cos(x_in, x_out), less its mean over the blocks,
    divided by the largest absolute value; every step sets S <- clip(S + D - A I, 0, 0.99) with D = 1/50
    and A = 0.02, and attention and feed-forward part of a block share S. The cosines are those of the dense
    model in every step, and the last step is shortened so that the budget is met (both derived).
    """
    space = context.space
    target = space.target(context.budget, context.metric)
    importance = block_importance(block_cosines(context))
    least = space.minimums / np.maximum(space.widths, 1)

    def cost(shares: Floats) -> float:
        kept = np.where(context.active, np.maximum(1.0 - per_group(space, shares), least), 1.0)
        return float(space.cost(kept * space.widths, context.metric))

    before = np.zeros_like(importance)
    while True:
        after = np.clip(before + STEP - AMPLITUDE * importance, 0.0, LIMIT)
        if cost(after) <= target or np.array_equal(after, before):
            break
        before = after
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if cost(before + middle * (after - before)) <= target else (middle, high)
    return as_distribution(per_group(space, before + high * (after - before)))


def block_importance(cosine: Floats) -> Floats:
    """Importances of the blocks, (B,), in [-1, 1]: high where a block changes its input much."""
    centred = -cosine - (-cosine).mean()
    largest = np.abs(centred).max(initial=0.0)
    return centred / largest if largest > 0 else centred
