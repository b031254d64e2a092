"""ShortGPT: whole blocks go, those that change the residual stream least first."""

from __future__ import annotations

import numpy as np

from ..utils.arrays import Bools, Floats, Ints
from .blocks import block_cosines, block_indices, of_kind
from .context import Context, rule
from .threshold import widths_distribution


@rule("ShortGPT: drop the blocks whose input and output are most alike", needs_workload=True, wing="language")
def shortgpt(context: Context) -> Floats:
    """Depth pruning by block influence (Men et al. 2024, arXiv 2403.03853, equation 1).

    Block influence is 1 - the mean over tokens of cos(x_in, x_out); the blocks with the least are removed, until
    the budget is met. The last one goes in part, attention before neurons are given back, so that the budget is
    met exactly (derived). Where parts may not be dropped (``prune.drop`` off) the blocks are cut to their minimum.
    """
    influence = 1.0 - block_cosines(context)
    index = block_indices(context.space)
    order = [b for b in np.argsort(influence, kind="stable") if (context.active & (index == b)).any()]
    widths = drop_in_order(context, [context.active & (index == b) for b in order])
    return widths_distribution(context.space, widths)


def drop_in_order(context: Context, parts: list[Bools]) -> Ints:
    """Widths (G,) when parts, masks (G,) each, go one after the other until the budget is met, the last in part."""
    space = context.space
    target = space.target(context.budget, context.metric)
    widths = space.widths.copy()
    for part in parts:
        if space.cost(widths, context.metric) <= target:
            break
        before = widths
        widths = np.where(part, space.minimums, widths)
        if space.cost(widths, context.metric) <= target:
            return _given_back(context, before, widths, part, target)
    return widths


def _given_back(
    context: Context,
    before: Ints,
    widths: Ints,
    part: Bools,
    target: float,
) -> Ints:
    """``widths`` with as much of the last part restored as fits: equal shares, then single steps, neurons last."""
    space = context.space
    low, high = 0.0, 1.0  # share of the part that comes back
    for _ in range(60):
        middle = (low + high) / 2
        if space.cost(widths + middle * (before - widths), context.metric) <= target:
            low = middle
        else:
            high = middle
    found = np.where(part, space.limits.floor(widths + low * (before - widths)), widths)
    for kind in ("attention", "ffn"):
        for g in np.flatnonzero(part & of_kind(space, kind)):
            while found[g] < before[g]:
                more = found.copy()
                more[g] = space.limits.above(found)[g]
                if space.cost(more, context.metric) > target:
                    break
                found = more
    return found
