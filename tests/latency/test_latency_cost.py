"""The arithmetic of latency tables: smoothing, the cost between grid points, budgets of milliseconds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from helpers import strategies
from rlprune.config.config import BudgetConfig
from rlprune.errors import BudgetError, ConfigError
from rlprune.latency.cost import TableCost
from rlprune.latency.table import LayerTable, monotone, rising
from rlprune.pruning.budget import Limits, parse_budget, project
from rlprune.pruning.cost import AxisSize

GRIDS = hnp.arrays(
    np.float64, hnp.array_shapes(min_dims=2, max_dims=2, max_side=6), elements=st.floats(0, 100)
)


# Smoothing


@settings(max_examples=50, deadline=None)
@given(GRIDS)
def test_smoothing_is_monotone_and_as_near_as_an_isotonic_regression(values: np.ndarray) -> None:
    found = monotone(values)
    assert (np.diff(found, axis=0) >= 0).all() and (np.diff(found, axis=1) >= 0).all()
    np.testing.assert_allclose(monotone(found), found, atol=1e-6)
    # The nearest monotone table is nearer than the two that are easy to name.
    for other in (
        np.full_like(values, values.mean()),
        np.maximum.accumulate(np.maximum.accumulate(values, 0), 1),
    ):
        assert ((found - values) ** 2).sum() <= ((other - values) ** 2).sum() + 1e-3


def test_smoothing_pools_the_neighbours_that_fall() -> None:
    # By hand: 3 and 1 fall, their mean is 2; nothing else changes.
    np.testing.assert_allclose(monotone(np.array([[0.0, 3.0, 1.0, 4.0]])), [[0, 2, 2, 4]], atol=1e-9)
    np.testing.assert_allclose(monotone(np.array([[0.0], [3.0], [1.0]])), [[0], [2], [2]], atol=1e-9)


def test_a_flat_table_rises_a_little_and_an_empty_layer_costs_nothing() -> None:
    found = rising(np.full((3, 2), 5.0), np.array([0, 4, 8]), np.array([1, 2]))
    assert (found[0] == 0).all()
    assert (np.diff(found[1:], axis=0) > 0).all() and (np.diff(found[1:], axis=1) > 0).all()
    np.testing.assert_allclose(found[1:], 5.0, rtol=0.01)


# The cost


@st.composite
def costs(draw: st.DrawFn) -> tuple[TableCost, Limits]:
    """A ring of layers with random monotone tables, widths, steps and minimums; some axes carry fixed slots."""
    limits = draw(strategies.limits(4, 40))
    dense, groups = limits.dense, len(limits.dense)
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    terms = []
    for i in range(groups):
        axes: list[AxisSize | None] = []
        nodes = []
        for g, most in ((i, 3), ((i + 1) % groups, 2)):
            axis = AxisSize(float(draw(st.integers(0, 3))), np.eye(groups)[g] * draw(st.integers(1, most)))
            top = int(axis.constant + axis.slope @ dense)
            if draw(st.booleans()) or top == 1:
                axes.append(axis)
                nodes.append(np.unique([1, *generator.integers(1, top + 1, 4), top]))
            else:
                axes.append(None)
                nodes.append(np.array([top]))
        raw = generator.exponential(size=(len(nodes[0]), len(nodes[1])))
        table = LayerTable("any", nodes[0], nodes[1], rising(np.round(raw, 1), *nodes), float(i % 2))
        terms.append((table, draw(st.floats(0.1, 3.0)), draw(st.floats(0.0, 0.01)), *axes))
    plain = TableCost(terms, draw(st.floats(0, 1)), groups)
    measured = draw(st.none() | st.floats(0.7, 1.3))
    if measured is None:
        return plain, limits
    dense = limits.dense, measured * float(plain(limits.dense))
    return TableCost(terms, plain.constant, groups, dense=dense), limits


@settings(max_examples=60, deadline=None)
@given(costs(), st.data(), st.floats(0.0, 1.0))
def test_a_projection_meets_the_target_and_no_step_more_fits(space, data, share) -> None:
    cost, limits = space
    count = len(limits.dense)
    numbers = st.lists(st.floats(0.0, 1.0), min_size=count, max_size=count).filter(any)
    rows = np.array(data.draw(st.lists(numbers, min_size=1, max_size=3)))
    low, high = float(cost(limits.minimum)), float(cost(limits.dense))
    target = low + share * (high - low)
    widths = project(rows, target, cost, limits, metric="latency")
    assert (widths >= limits.minimum).all() and (widths <= limits.dense).all()
    assert ((widths % limits.step == 0) | (widths == limits.dense) | (widths == limits.minimum)).all()
    assert (cost(widths) <= target).all()
    for row, found in zip(rows, widths, strict=True):
        assert np.array_equal(project(row, target, cost, limits, metric="latency"), found)
        for g in range(count):
            more = found.copy()
            more[g] = limits.above(found)[g]
            assert more[g] == found[g] or float(cost(more)) > target


def test_the_price_of_a_unit_is_that_of_its_layers_whatever_the_dense_model_takes() -> None:
    axis = AxisSize(0.0, np.array([1.0]))
    nodes, into = np.array([1, 10]), np.array([3])
    term = (LayerTable("any", nodes, into, np.array([[1.0], [10.0]]), 1.0), 1.0, 0.0, axis, None)
    for measured in (9.3, 10.0, 10.7):
        cost = TableCost([term], 0.0, 1, dense=(np.array([10]), measured))
        assert float(cost(np.array([10]))) == pytest.approx(measured)
        assert cost.unit_costs(np.array([10.0])) == pytest.approx([1.0])


@settings(max_examples=60, deadline=None)
@given(costs(), st.data())
def test_an_increase_is_the_difference_of_two_costs_to_the_last_bit(space, data) -> None:
    cost, limits = space
    widths = np.array([data.draw(st.integers(1, int(d))) for d in limits.dense])
    steps = np.array([data.draw(st.integers(-int(w) + 1, 9)) for w in widths])
    increase = cost.increase(widths.astype(float), steps.astype(float))
    for g in range(len(widths)):
        moved = widths.copy()
        moved[g] += steps[g]
        assert float(cost(widths)) + increase[g] == float(cost(moved))
    both = np.stack([widths, limits.dense])
    assert np.array_equal(cost(both), [float(cost(widths)), float(cost(limits.dense))])


def test_between_grid_points_the_value_is_bilinear() -> None:
    table = LayerTable("any", np.array([2, 6]), np.array([1, 5]), np.array([[1.0, 5.0], [3.0, 11.0]]), 1.0)
    axes = AxisSize(0.0, np.array([1.0, 0.0])), AxisSize(1.0, np.array([0.0, 2.0]))
    cost = TableCost([(table, 2.0, 0.5, *axes)], 7.0, 2)
    # out 3 is a quarter of the way, in 1 + 2 * 1 = 3 half of it: (3 + (7 - 3) / 4) * 2 + 3 * 0.5 + 7.
    assert float(cost([3, 1])) == pytest.approx(16.5, abs=1e-8)


@pytest.mark.parametrize("measured", [0.7, 0.96, 1.0, 1.2])
def test_the_dense_model_takes_what_was_measured(measured: float) -> None:
    nodes = np.array([1, 100])
    table = LayerTable("any", nodes, np.array([1]), np.array([[1.0], [100.0]]), 0.0)
    terms = [(table, 1.0, 0.0, AxisSize(0.0, np.array([1.0])), None)]
    dense = 100.0 * measured
    cost = TableCost(terms, 0.0, 1, dense=(np.array([100]), dense))
    widths = np.arange(1, 101)[:, None]
    values = cost(widths)
    assert values[-1] == pytest.approx(dense, abs=1e-6)
    assert (np.diff(values) > 0).all()
    # Well below the dense model the sum of the layers stands.
    alone = widths[:, 0] <= 0.97 * min(dense, 100.0)
    np.testing.assert_allclose(values[alone], widths[alone, 0], atol=1e-8)


# Budgets


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [(0.5, "ratio", 0.5), ("50%", "ratio", 0.5), ("0.5 ms", "absolute", 0.5), (3.5, "absolute", 3.5)],
)  # fmt: skip
def test_latency_budgets_are_shares_or_milliseconds(text: Any, kind: str, value: float) -> None:
    found = parse_budget(text, "latency")
    assert (found.kind, found.value) == (kind, value)
    assert BudgetConfig(target=text, metric="latency").target == text


@pytest.mark.parametrize("text", ["-1ms", "0ms", "5M", "120%", "ms", "nan", "3.5s", -1, 0])
def test_other_latency_budgets_are_refused(text: Any) -> None:
    with pytest.raises(BudgetError, match="milliseconds"):
        parse_budget(text, "latency")
    with pytest.raises(ConfigError, match="milliseconds"):
        BudgetConfig(target=text, metric="latency")


def test_milliseconds_are_no_budget_of_macs() -> None:
    with pytest.raises(BudgetError, match="150M"):
        parse_budget("3.5ms")
    with pytest.raises(ConfigError, match="150M"):
        BudgetConfig(target="3.5ms")
