"""Our own allocation in nats: the least sum of the divergences that the cuts are expected to cost."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np

from ..importance.calibration_cache import CURVES, Curves
from ..language.calibration import fisher as information
from ..language.calibration.grams import GramWalk
from ..utils.arrays import Floats
from .context import Context, rule
from .threshold import widths_distribution

RIDGE = 1e-3


@rule(
    "least sum of expected KL divergences: closed-form errors weighted by the Fisher information",
    needs_workload=True,
    wing="language",
    costly=True,
)
def fisher(context: Context) -> Floats:
    """Equal marginal divergence: what every cut is expected to cost, by K-FAC, without a single evaluation.

    Each group has a curve of expected KL(dense || pruned) over its width (``language.calibration.fisher``: greedy
    elimination with the output's error weighted by the second moments of the log-likelihood's gradients,
    after K-FAC, arXiv 1503.05671). Costs of groups are taken to add up. Under a budget that is linear in the
    widths the least sum of the curves' convex hulls is found by taking the hulls' segments in the order of
    divergence a saved cost (Everett 1963, generalized Lagrange multipliers) until the budget is met. One
    backward pass over the calibration split; the importance `obs_fisher` has measured the curves already.
    This rule is ours.
    """
    return least_sum(context, context.cached(CURVES, lambda: divergences(context)))


def divergences(context: Context) -> Curves:
    """Expected divergence of each attention and feed-forward group when 0, 1, ..., all units are gone: (width + 1,)."""
    workload, model, space = context.data("fisher"), context.model, context.space
    moments = information.output_moments(model, space, workload.batches("calibration"), context.seed)
    grams = GramWalk(model, lambda: workload.batches("calibration"))
    return information.divergence_curves(information.fisher_eliminations(model, space, grams, moments, RIDGE))


def least_sum(context: Context, curves: Mapping[int, Floats]) -> Floats:
    """The distribution whose widths meet the budget at the least sum of ``curves``, {group: cost (width + 1,)}."""
    space = context.space
    saved = space.unit_costs(space.widths, context.metric)
    segments: list[tuple[float, int, int]] = []
    for g in np.flatnonzero(context.active).tolist():
        if g in curves and saved[g] > 0:
            cuts, slopes = hull(curves[g][: space.widths[g] - space.minimums[g] + 1])
            segments += [(s / saved[g], int(g), int(c)) for s, c in zip(slopes, cuts, strict=True)]
    left = space.dense_cost(context.metric) - space.target(context.budget, context.metric)
    cut = np.zeros(len(space.groups))
    for _, group, units in sorted(segments):
        taken = min(float(units), left / saved[group])
        cut[group] += taken
        left -= taken * saved[group]
        if left <= 0:
            break
    return widths_distribution(space, space.widths - cut)


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
