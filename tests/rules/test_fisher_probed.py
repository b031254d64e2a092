"""The rule `fisher_probed` against divergences whose true shape is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from helpers.workloads import Noise
from rlprune import Evaluator, rules
from rlprune.api import trace
from rlprune.importance.calibration_cache import CalibrationCache, Curves
from rlprune.pruning.knapsack import least_sum
from rlprune.pruning.space import PruningSpace
from rlprune.rules import RULES, Context
from rlprune.rules.context import rule_widths
from rlprune.rules.fisher import active_curves
from rlprune.utils.arrays import Floats, Ints
from rlprune.vision.zoo import build_model

BUDGET = 0.5
WIDTH = 6


@pytest.fixture(scope="module")
def evaluator() -> Evaluator:
    model = build_model("cifar_resnet20", channels=1, arguments={"width": WIDTH})
    workload = Noise(model)
    return Evaluator(workload, trace(model, workload.example_inputs), importance="obs_fisher")


@pytest.fixture(scope="module")
def context(evaluator: Evaluator) -> Context:
    return evaluator.context(BUDGET)


class Sum:
    """A divergence that is the sum of true curves, and what was asked of it."""

    def __init__(self, context: Context, curves: Mapping[int, Floats]) -> None:
        self.dense, self.curves = context.space.widths, curves
        self.asked: list[Ints] = []

    def __call__(self, widths: Ints) -> float:
        self.asked.append(widths.copy())
        return self.of(widths)

    def of(self, widths: Ints) -> float:
        return float(sum(curve[self.dense[g] - widths[g]] for g, curve in self.curves.items()))


class Fixed(CalibrationCache):
    """Expected curves that are given."""

    def __init__(self, space: PruningSpace, curves: Mapping[int, Floats]) -> None:
        super().__init__(None, space, nn.Identity())
        self.given = dict(curves)

    def divergence_curves(self, importance: Sequence[Floats]) -> Curves:
        return self.given


def least(context: Context, curves: Mapping[int, Floats]) -> Ints:
    return least_sum(context.space, curves, context.space.target(BUDGET), "macs")


def probed(context: Context, divergence: object) -> Ints:
    return rule_widths(RULES["fisher_probed"], replace(context, divergence=divergence))


def test_curves_that_are_right_keep_the_plan_of_fisher(context: Context) -> None:
    true = Sum(context, active_curves(context))
    widths = probed(context, true)
    assert true.of(widths) == pytest.approx(true.of(rule_widths(RULES["fisher"], context)))


@settings(max_examples=10, deadline=None)
@given(factors=st.lists(st.floats(0.1, 10.0), min_size=12, max_size=12))
def test_it_is_never_behind_fisher_by_what_it_measures(context: Context, factors: list[float]) -> None:
    expected = active_curves(context)
    true = Sum(context, {g: curve * factors[g] for g, curve in expected.items()})
    assert true.of(probed(context, true)) <= true.of(least(context, expected)) * (1 + 1e-9)


def test_factors_are_found_where_the_first_plan_cuts_every_group(context: Context) -> None:
    space = context.space
    each = space.unit_costs(space.widths, "macs") * space.widths  # what cuts save is their price: all are cut
    flat = {g: each[g] * np.linspace(0.0, 1.0, space.widths[g] + 1) ** 2 for g in active_curves(context)}
    calibration = Fixed(space, flat)
    here = replace(context, calibration=calibration)
    assert (least(context, flat) < space.widths).all()
    true = Sum(context, {g: curve * (1.0 + g % 4) for g, curve in flat.items()})
    best = true.of(least(context, true.curves))
    assert best < 0.95 * true.of(least(context, flat))
    assert true.of(probed(here, true)) == pytest.approx(best)


def test_each_probe_cuts_one_group_as_the_plan_does_and_every_plan_meets_the_budget(context: Context) -> None:
    space, true = context.space, Sum(context, active_curves(context))
    true.curves = {g: curve * (1.0 + g) for g, curve in true.curves.items()}
    probed(context, true)
    assert len(true.asked) <= RULES["fisher_probed"].probe_count(space)
    assert len({w.tobytes() for w in true.asked}) == len(true.asked)
    first = least(context, active_curves(context))
    groups = int((first < space.widths).sum())
    for widths in true.asked[:groups]:
        (group,) = np.flatnonzero(widths != space.widths)
        assert widths[group] == first[group]
    plans = [w for w in true.asked if (w != space.widths).sum() > 1]
    assert plans
    assert all(space.cost(w) <= space.target(BUDGET) for w in plans)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, 0.0])
def test_probes_that_have_collapsed_or_cost_nothing(context: Context, value: float) -> None:
    """Cuts of one group as deep as the first plan's: where they collapse, the group is left wider."""
    true, dense = Sum(context, active_curves(context)), context.space.widths
    first = least(context, active_curves(context))
    group = int((dense - first).argmax())

    def divergence(widths: Ints) -> float:
        return value if widths[group] <= first[group] else true(widths)

    widths = probed(context, divergence)
    assert context.space.cost(widths) <= context.space.target(BUDGET)
    if not np.isfinite(value):
        assert widths[group] > first[group]


def test_without_a_divergence_the_added_loss_is_measured(context: Context) -> None:
    expected = active_curves(context)
    true = Sum(context, {g: curve * (1.0 + g % 3) for g, curve in expected.items()})
    by_loss = replace(context, divergence=None, probe=lambda widths: 2.5 + true(widths))
    wanted = probed(context, true)
    assert np.array_equal(rule_widths(RULES["fisher_probed"], by_loss), wanted)
    assert any(np.array_equal(w, context.space.widths) for w in true.asked)  # the dense model's own loss


def test_what_follows_is_announced(context: Context) -> None:
    announced: list[bytes] = []
    true = Sum(context, active_curves(context))
    rules.fisher_probed(
        replace(context, divergence=true, expect=lambda plans: announced.extend(p.tobytes() for p in plans))
    )
    assert {w.tobytes() for w in true.asked} <= set(announced)
    assert len(announced) == len(set(announced))


def test_a_divergence_is_the_score_s_or_the_added_loss(evaluator: Evaluator) -> None:
    widths = rule_widths(RULES["uniform"], evaluator.context(BUDGET))
    candidate = evaluator.evaluate(widths)
    assert evaluator.divergence(candidate) == pytest.approx(-candidate.score)
    other = Evaluator(
        evaluator.workload, evaluator.space, score=replace(evaluator.score_settings, kind="loss")
    )
    scored = other.evaluate(widths)
    assert other.divergence(scored) == pytest.approx(scored.loss - other.dense.loss)
    assert other.divergence(other.dense) == 0.0
    context = other.context(BUDGET)
    assert context.divergence is not None
    assert context.divergence(widths) == other.divergence(scored)
