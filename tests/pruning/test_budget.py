"""Budgets and the exact projection, for any space: property tests on random cost formulas."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.strategies import distributions, spaces
from rlprune.errors import BudgetError
from rlprune.pruning.budget import Limits, parse_budget, project
from rlprune.pruning.cost import AxisSize, FormulaBuilder


@settings(max_examples=300, deadline=None)
@given(spaces(), st.data(), st.floats(0.0, 1.0))
def test_cost_is_within_the_budget_and_no_step_more_fits(space, data, share):
    cost, limits = space
    distribution = data.draw(distributions(len(limits.dense)))
    low, high = float(cost(limits.minimum)), float(cost(limits.dense))
    target = low + share * (high - low)
    widths = project(distribution, target, cost, limits)
    assert (widths >= limits.minimum).all() and (widths <= limits.dense).all()
    multiple = (widths % limits.step == 0) | (widths == limits.dense) | (widths == limits.minimum)
    assert multiple.all()
    assert float(cost(widths)) <= target
    for g in range(len(widths)):
        more = widths.copy()
        more[g] = limits.above(widths)[g]
        assert more[g] == widths[g] or float(cost(more)) > target


def test_a_target_one_rounding_below_the_dense_cost():
    """The root of the cost rounds to the dense widths there, which are above the target."""
    builder = FormulaBuilder(1)
    builder.add(8, AxisSize(3, np.ones(1)), AxisSize(2, 2 * np.ones(1)))
    cost, limits = builder.build(), Limits(np.array([41]), np.ones(1, int), np.ones(1, int))
    target = float(np.nextafter(cost(limits.dense), 0.0))
    assert project([1.0], target, cost, limits).tolist() == [40]


@settings(max_examples=60, deadline=None)
@given(spaces(), st.data(), st.floats(0.0, 1.0))
def test_many_rows_are_projected_like_each_alone(space, data, share):
    cost, limits = space
    rows = np.array([data.draw(distributions(len(limits.dense))) for _ in range(4)])
    low, high = float(cost(limits.minimum)), float(cost(limits.dense))
    target = low + share * (high - low)
    together = project(rows, target, cost, limits)
    for row, widths in zip(rows, together, strict=True):
        np.testing.assert_array_equal(project(row, target, cost, limits), widths)


def reference(distribution, target, cost, limits):
    """The contract's text in plain Python: bisection on lambda, floor, give back the largest remainder."""
    d, dense = np.asarray(distribution, float), limits.dense.astype(float)
    most = 1 - limits.minimum / dense

    def shares(scale):
        return np.minimum(most, scale * d)

    low, high = 0.0, float((most[d > 0] / d[d > 0]).max())
    if float(cost(dense * (1 - shares(high)))) > target:
        base, low, high = shares(high), 0.0, 1.0

        def shares(scale):
            return np.where(d > 0, base, scale * most)

    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if float(cost(dense * (1 - shares(middle)))) > target else (low, middle)
    wanted = dense * (1 - shares(high))
    widths = limits.floor(wanted, tolerance=1e-6)
    remainder = np.round((wanted - widths) / limits.step, 6)
    while True:
        best = None
        for g in range(len(widths)):
            more = widths.copy()
            more[g] = limits.above(widths)[g]
            fits = more[g] > widths[g] and float(cost(more)) <= target
            if fits and (best is None or remainder[g] > remainder[best]):
                best = g
        if best is None:
            return widths
        widths[best] = limits.above(widths)[best]
        remainder[best] -= 1


def test_projection_is_the_contracts_text():
    rng = np.random.default_rng(0)
    for _ in range(200):
        groups = int(rng.integers(2, 7))
        builder = FormulaBuilder(groups)
        for i in range(groups):
            a, b = AxisSize(0, np.eye(groups)[i]), AxisSize(1, np.eye(groups)[(i + 1) % groups])
            builder.add(int(rng.integers(1, 40)), a, b)
        step = int(rng.choice([1, 1, 4]))
        dense = step * rng.integers(2, 20, groups)
        limits = Limits(dense, np.full(groups, step), np.full(groups, step))
        cost = builder.build()
        low, high = float(cost(limits.minimum)), float(cost(dense))
        target = low + rng.random() * (high - low)
        d = rng.random(groups) * (rng.random(groups) > 0.3)
        d[0] = max(d[0], 0.1)
        np.testing.assert_array_equal(project(d, target, cost, limits), reference(d, target, cost, limits))


@pytest.mark.parametrize(
    ("distribution", "text"),
    [
        ([1.0, float("nan")], "NaN"),
        ([1.0, float("inf")], "infinity"),
        ([1.0, -0.1], "negative"),
        ([0.0, 0.0], "all zero"),
        ([1.0], "shape"),
        ([[[1.0, 1.0]]], "shape"),
        ("uniform", "numbers"),
    ],
)
def test_malformed_distributions_are_refused(distribution, text):
    builder = FormulaBuilder(2)
    builder.add(1, AxisSize(0, np.array([1.0, 0.0])), AxisSize(0, np.array([0.0, 1.0])))
    limits = Limits(np.array([4, 4]), np.array([1, 1]), np.array([1, 1]))
    with pytest.raises(BudgetError, match=text):
        project(distribution, 8.0, builder.build(), limits)


def test_infeasible_targets_name_the_feasible_range():
    builder = FormulaBuilder(1)
    builder.add(10, AxisSize(0, np.array([1.0])))
    limits = Limits(np.array([10]), np.array([2]), np.array([1]))
    with pytest.raises(BudgetError, match="feasible: 20 to 100"):
        project([1.0], 19.0, builder.build(), limits)
    with pytest.raises(BudgetError, match="above the dense model"):
        project([1.0], 101.0, builder.build(), limits)


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        (0.5, "ratio", 0.5), ("0.5", "ratio", 0.5), ("50%", "ratio", 0.5), (1, "ratio", 1.0), ("100 %", "ratio", 1.0),
        ("150M", "absolute", 150e6), ("1.5g", "absolute", 1.5e9), (150_000_000, "absolute", 150e6),
        ("2k", "absolute", 2000.0), (1e6, "absolute", 1e6), (np.float64(0.25), "ratio", 0.25),
    ],
)  # fmt: skip
def test_budgets_are_read(text, kind, value):
    budget = parse_budget(text)
    assert (budget.kind, budget.value) == (kind, value)


@pytest.mark.parametrize(
    "text",
    [
        0,
        -1,
        1.5,
        80,
        "abc",
        "",
        "150X",
        "0%",
        "101%",
        True,
        None,
        [0.5],
        float("nan"),
        float("inf"),
        "0.0001k",
    ],
)
def test_what_is_no_budget_is_refused(text):
    with pytest.raises(BudgetError, match="not a budget"):
        parse_budget(text)
