"""LLM-Pruner's allocation: the first and the last blocks stay whole."""

from __future__ import annotations

import numpy as np

from ..utils.arrays import Bools, Floats
from .blocks import block_count, block_indices
from .context import Context, rule


def inside(context: Context) -> Bools:
    """The active groups, (G,), between the protected ends; all active ones where the model is too short."""
    count = block_count(context.space)
    first, last = round(count * 4 / 32), count - round(count * 2 / 32)
    index = block_indices(context.space)
    found: Bools = (index >= first) & (index < last) & context.active
    return found if found.any() else context.active


@rule(
    "LLM-Pruner: uniform, the first eighth and the last sixteenth of the blocks stay whole", wing="language"
)
def llm_pruner(context: Context) -> Floats:
    """Uniform pruning of the blocks between protected ends (Ma et al. 2023, arXiv 2305.11627, section 4.1).

    The paper prunes blocks 4 to 29 of 32 (25% of them make 20% of the model). Carried over to other depths
    (derived): the first round(4/32 N) and the last round(2/32 N) blocks of N stay whole, attention and
    feed-forward parts of the others lose the same share, whatever the budget asks.
    """
    return inside(context).astype(np.float64)
