"""Our own allocation in nats: the least sum of the divergences that the cuts are expected to cost."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np

from ..pruning.knapsack import least_sum
from ..utils.arrays import Floats
from .context import Context, rule
from .threshold import widths_distribution


@rule(
    "least sum of expected KL divergences: closed-form errors weighted by the Fisher information",
    needs_workload=True,
    costly=True,
)
def fisher(context: Context) -> Floats:
    """Equal marginal divergence: what every cut is expected to cost, by K-FAC, without a single evaluation.

    Each group has a curve of expected KL(dense || pruned) over its width (`CalibrationCache.divergence_curves`:
    closed-form errors of the consumers' outputs, weighted by the second moments of the log-likelihood's gradients after
    K-FAC, arXiv 1503.05671 and, for convolutions, 1602.01407). Costs of groups are taken to add up. Under a budget that
    is linear in the widths the least sum of their convex hulls is found by taking the hulls' segments in the order
    of divergence a saved cost (Everett 1963, generalized Lagrange multipliers) until the budget is met; under a
    quadratic one (the MACs of convolutions) `pruning.knapsack` counts what is saved at the widths that are left, and
    exchanges improve the plan until no change of one or two groups does. One backward pass over the calibration split;
    the importance `obs_fisher` has measured the curves already. This rule is ours.
    """
    space, own = context.space, active_curves(context)
    if _linear(context):
        return widths_distribution(space, _hulls(context, own))
    target = space.target(context.budget, context.metric)
    return widths_distribution(space, least_sum(space, own, target, context.metric))


def active_curves(context: Context) -> dict[int, Floats]:
    """The expected divergence (width + 1,) of each group that the pruning is spread over."""
    assert context.calibration is not None
    curves = context.calibration.divergence_curves(context.importance)
    return {g: np.asarray(curve) for g, curve in curves.items() if context.active[g]}


def _linear(context: Context) -> bool:
    """Whether what a unit costs is the same at all widths."""
    space = context.space
    dense, least = (space.unit_costs(widths, context.metric) for widths in (space.widths, space.minimums + 1))
    return bool(np.allclose(dense, least, rtol=1e-12))


def _hulls(context: Context, curves: Mapping[int, Floats]) -> Floats:
    """Widths (G,), not whole, that meet the budget at the least sum of the hulls of ``curves``."""
    space = context.space
    saved = space.unit_costs(space.widths, context.metric)
    segments: list[tuple[float, int, int]] = []
    for g, curve in curves.items():
        if saved[g] > 0:
            cuts, slopes = hull(curve[: space.widths[g] - space.minimums[g] + 1])
            segments += [(s / saved[g], int(g), int(c)) for s, c in zip(slopes, cuts, strict=True)]
    left = space.dense_cost(context.metric) - space.target(context.budget, context.metric)
    cut = np.zeros(len(space.groups))
    for _, group, units in sorted(segments):
        taken = min(float(units), left / saved[group])
        cut[group] += taken
        left -= taken * saved[group]
        if left <= 0:
            break
    return space.widths - cut


def hull(curve: Floats) -> tuple[list[int], list[float]]:
    """Lower convex hull of a curve over 0, 1, 2, ...: the segments' lengths and slopes, slopes rising."""
    corners = [0]
    for c in range(1, len(curve)):
        while len(corners) > 1 and _slope(curve, corners[-2], corners[-1]) >= _slope(curve, corners[-1], c):
            corners.pop()
        corners.append(c)
    pairs = list(itertools.pairwise(corners))
    return [b - a for a, b in pairs], [_slope(curve, a, b) for a, b in pairs]


def _slope(curve: Floats, a: int, b: int) -> float:
    return float(curve[b] - curve[a]) / (b - a)
