"""Cut each group alone, measure, and let every group cost the same loss."""

from __future__ import annotations

import numpy as np

from ..pruning.space import PruningSpace
from ..utils.arrays import Floats, Ints
from .context import Context, rule
from .threshold import scaled_distribution

RATIOS = (0.25, 0.5)
"""Shares of a group that are cut in its probes: two candidates a group, and one for the dense model."""


def _ratios(space: PruningSpace) -> tuple[float, ...]:
    """The shares that are probed: the first only where groups come in blocks, two in each: that makes many."""
    return RATIOS[:1] if any(g.block >= 0 for g in space.groups) else RATIOS


def _probe_count(space: PruningSpace) -> int:
    """At most one candidate a group and share, and the dense model."""
    return 1 + len(_ratios(space)) * sum(g.exact for g in space.groups)


@rule(
    "equal loss: every group is cut until it alone would cost the same loss",
    needs_workload=True,
    probes=_probe_count,
)
def sensitivity(context: Context) -> Floats:
    """Equal-loss pruning from single-group probes, in the manner of NetAdapt (Yang et al. 2018, arXiv
    1804.03230) and of NVIDIA ModelOpt's FastNAS.

    Every group is cut alone at the shares RATIOS (in a model of blocks at the first of them); the loss that
    this adds, made monotone, is a line through the probes that goes on beyond the last one in proportion to
    share / (1 - share), which has no end before the group is empty. One threshold on the added loss, found
    by bisection, gives every group its share. Groups are the coupled ones, so a residual stream is cut in
    all its layers at once.
    """
    probe = context.loss_probe("sensitivity")
    space = context.space
    full = space.widths.astype(np.float64)
    ratios = _ratios(space)
    added = np.zeros((len(space.groups), len(ratios)))
    shares = np.zeros_like(added)
    probes: dict[tuple[int, int], Ints] = {}
    for g in np.flatnonzero(context.active):
        for i, ratio in enumerate(ratios):
            widths = space.widths.copy()
            widths[g] = space.limits.floor(full * (1.0 - ratio))[g]
            shares[g, i] = 1.0 - widths[g] / space.widths[g]
            if shares[g, i] > 0:
                probes[int(g), i] = widths
    if context.expect is not None:
        context.expect([space.widths, *probes.values()])
    dense = probe(space.widths)
    for place, widths in probes.items():
        added[place] = probe(widths) - dense
    added = np.nan_to_num(added, nan=np.inf, posinf=np.inf)
    worst = added[np.isfinite(added)].max(initial=0.0)
    added = np.minimum(added, 100.0 * max(worst, 1e-6))  # a collapsed probe is very bad, but comparable
    # Groups whose probes cost nothing, or less, are told apart by a small slope.
    added = np.maximum(np.maximum.accumulate(added, axis=1), 1e-3 * max(worst, 1e-6) * shares)
    return scaled_distribution(context, lambda t: 1.0 - _shares(t, added, shares))


def _shares(t: float, added: Floats, shares: Floats) -> Floats:
    """The share (G,) at which each group adds the loss threshold; t = 1 is none, t = 0 any loss."""
    if t >= 1.0:
        return np.zeros(len(added))
    threshold = added.max() * (1.0 - t) / max(t, 1e-12)
    cut = np.empty(len(added))
    for g, (losses, points) in enumerate(zip(added, shares, strict=True)):
        if threshold <= losses[-1]:
            cut[g] = np.interp(threshold, [0.0, *losses], [0.0, *points])
        elif points[-1] in (0.0, 1.0):  # nothing of this group can be cut, or the last probe took all of it
            cut[g] = points[-1]
        else:
            odds = points[-1] / (1.0 - points[-1]) * threshold / max(losses[-1], 1e-300)
            cut[g] = odds / (1.0 + odds)
    return cut
