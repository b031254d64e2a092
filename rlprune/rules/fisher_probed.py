"""The least sum of expected divergences again, with the curves put right by single-group probes where the plan is."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from ..importance.calibration_cache import CURVES
from ..pruning.knapsack import least_sum
from ..pruning.space import PruningSpace
from ..utils.arrays import Floats, Ints
from .context import Context, rule
from .fisher import active_curves
from .threshold import widths_distribution

POWERS = (1.0, 1.5, 2.0)
"""Exponents of the costs that are summed: how cuts of several groups compound is not known, so a plan of each is
tried."""
# A group's factor is at most so many times that of the middle group, or as many times less.
_FARTHEST = 30.0


def _rounds(space: PruningSpace) -> int:
    """A single round where groups come in blocks, two in each: that makes many probes."""
    return 1 if any(g.block >= 0 for g in space.groups) else 2


def _probe_count(space: PruningSpace) -> int:
    """At most: the dense model, the first plan, and in each round one candidate a group and a plan for each power."""
    return 2 + _rounds(space) * (sum(g.exact for g in space.groups) + len(POWERS))


@rule(
    "fisher, with its curves scaled by probes of single groups at the plan's own widths",
    needs_workload=True,
    probes=_probe_count,
    costly=True,
    measures=CURVES,
)
def fisher_probed(context: Context) -> Floats:
    """Successive knapsacks: the curves of the rule `fisher`, corrected where its plan lies.

    The expected divergence of a cut (by K-FAC, arXiv 1503.05671) has about the right shape, and may be wrong by a
    factor: errors of neighbouring places, and of layers that read the same channels, are taken as independent. So every
    group is cut alone to the width that the plan gives it, and its curve is multiplied by measured over expected
    divergence; between two probed widths the logarithm of the factor is a line, beyond them it is constant. The
    knapsack over the corrected curves gives the next plans, one for each of POWERS, and the best of them is where the
    next round probes (two rounds, one in a model of blocks). What is returned is the best of all plans that were
    measured. This is surrogate optimisation with a multiplicative correction (space mapping, Bandler et al. 2004,
    10.1109/TMTT.2003.820904), in a rule that is ours.
    """
    space, curves = context.space, active_curves(context)
    target = space.target(context.budget, context.metric)
    measured = _Measured(context)
    plan = best = least_sum(space, curves, target, context.metric)
    factors: dict[int, dict[int, float]] = {g: {} for g in curves}
    for _ in range(_rounds(space)):
        _probe(space, curves, plan, measured, factors)
        corrected = _corrected(curves, factors)
        found = [
            least_sum(space, {g: c**p for g, c in corrected.items()}, target, context.metric) for p in POWERS
        ]
        measured.expect([best, *found])
        plan = min(found, key=measured)
        best = min(best, plan, key=measured)
    return widths_distribution(space, best)


def _probe(
    space: PruningSpace,
    curves: Mapping[int, Floats],
    plan: Ints,
    measured: _Measured,
    factors: dict[int, dict[int, float]],
) -> None:
    """Cut every group alone as the plan cuts it, and note measured over expected divergence by the units cut."""
    cuts = {g: int(space.widths[g] - plan[g]) for g in curves}
    probes = {}
    for g, cut in cuts.items():
        if cut and cut not in factors[g]:
            probes[g] = space.widths.copy()
            probes[g][g] = plan[g]
    measured.expect([*probes.values()])
    for g, widths in probes.items():
        factors[g][cuts[g]] = measured(widths) / max(float(curves[g][cuts[g]]), 1e-12)


def _corrected(curves: Mapping[int, Floats], factors: Mapping[int, Mapping[int, float]]) -> dict[int, Floats]:
    """The curves times their factors; a group without a probe has the middle one of all factors."""
    known = [f for each in factors.values() for f in each.values() if np.isfinite(f) and f > 0]
    middle = float(np.median(known)) if known else 1.0
    low, high = middle / _FARTHEST, middle * _FARTHEST
    found = {}
    for g, curve in curves.items():
        cuts = sorted(factors[g])
        values = [np.log(np.clip(factors[g][c], low, high)) for c in cuts]
        places = np.arange(len(curve))
        found[g] = curve * np.exp(np.interp(places, cuts, values) if cuts else np.log(middle))
    return found


class _Measured:
    """The divergence of a candidate, each once: a context that nobody charges may build it anew at every call."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._measure = context.divergence or _added_loss(context)
        self._known: dict[bytes, float] = {}

    def expect(self, plans: list[Ints]) -> None:
        new = {p.tobytes(): p for p in plans if p.tobytes() not in self._known}
        if self._context.expect is not None and new:
            self._context.expect([*new.values()])

    def __call__(self, widths: Ints) -> float:
        key = widths.tobytes()
        if key not in self._known:
            found = self._measure(widths)
            self._known[key] = np.inf if np.isnan(found) else found  # a candidate that has collapsed
        return self._known[key]


def _added_loss(context: Context) -> Callable[[Ints], float]:
    """How much higher than the dense model's a candidate's loss is, where nothing measures a divergence."""
    probe = context.loss_probe("fisher_probed")
    dense = probe(context.space.widths)
    return lambda widths: probe(widths) - dense
