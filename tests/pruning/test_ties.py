"""Groups of one width: the projection works on the sets as if each were one group."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.strategies import distributions, spaces
from helpers.synthetic import FakeEvaluator, make_space
from rlprune.envs.sequential import SequentialEnv
from rlprune.envs.task import Task
from rlprune.errors import BudgetError
from rlprune.pruning.budget import project
from rlprune.pruning.space import PruningSpace
from rlprune.pruning.ties import Tied, classes


@st.composite
def tied(draw: st.DrawFn):
    """A random cost and limits in which some groups have the limits of others, and the sets of those."""
    cost, limits = draw(spaces())
    groups = len(limits.dense)
    leader = [draw(st.integers(0, g)) for g in range(groups)]
    for g in range(groups):
        leader[g] = leader[leader[g]] if leader[g] < g else g
    own = replace(
        limits, dense=limits.dense[leader], minimum=limits.minimum[leader], step=limits.step[leader]
    )
    sets = [tuple(g for g in range(groups) if leader[g] == lead) for lead in sorted(set(leader))]
    return cost, own, tuple(s for s in sets if len(s) > 1)


@settings(max_examples=200, deadline=None)
@given(tied(), st.data(), st.floats(0.0, 1.0))
def test_one_width_within_the_budget_and_no_step_of_a_set_more_fits(case, data, share):
    cost, limits, ties = case
    distribution = data.draw(distributions(len(limits.dense)))
    low, high = float(cost(limits.minimum)), float(cost(limits.dense))
    target = low + share * (high - low)
    widths = project(distribution, target, cost, limits, ties=ties)
    assert float(cost(widths)) <= target
    assert (widths >= limits.minimum).all() and (widths <= limits.dense).all()
    of_group = classes(ties, len(widths))
    for index in set(of_group):
        members = of_group == index
        assert len(set(widths[members])) == 1
        wider = np.where(members, limits.above(widths), widths)
        assert (wider == widths).all() or float(cost(wider)) > target


@settings(max_examples=60, deadline=None)
@given(spaces(), st.data())
def test_the_cost_of_sets_is_that_of_their_groups(space, data):
    cost, limits = space
    groups = len(limits.dense)
    of_group = classes(((0, groups - 1),), groups) if groups > 1 else classes((), groups)
    own = Tied(cost, of_group)
    widths = own.first(limits.dense).astype(np.float64)
    assert own(widths) == cost(own.whole(widths))
    steps = np.ones_like(widths)
    for index, added in enumerate(own.increase(widths, steps)):
        assert added == cost(own.whole(widths) + (of_group == index)) - cost(own.whole(widths))
    assert np.allclose(own.unit_costs(widths).sum(), cost.unit_costs(own.whole(widths).astype(float)).sum())


def space_of_pairs() -> PruningSpace:
    space = make_space(6, width=16)
    groups = tuple(replace(g, width=16, minimum=1, step=1) for g in space.groups)
    return replace(space, groups=groups, ties=((0, 3), (1, 4, 5)))


def test_groups_that_differ_cannot_be_tied() -> None:
    space = make_space(6, width=16)
    with pytest.raises(BudgetError, match="layer0, layer5 and others cannot have one width"):
        replace(space, ties=((0, 5),))


def test_what_is_drawn_for_the_first_group_counts_for_its_set() -> None:
    space = space_of_pairs()
    assert space.leaders.tolist() == [0, 1, 2, 0, 1, 1]
    assert space.led(np.arange(6.0)).tolist() == [0, 1, 2, 0, 1, 1]
    many = space.project(np.random.default_rng(0).random((20, 6)), 0.5)
    assert (many == many[:, space.leaders]).all()


@pytest.mark.filterwarnings("ignore:uniform pruning scores")
def test_the_sequential_environment_keeps_one_width() -> None:
    space = space_of_pairs()
    env = SequentialEnv(tasks=Task(FakeEvaluator(6, space=space), 0.5))
    rng = np.random.default_rng(0)
    for _ in range(20):
        env.reset(seed=0)
        done = False
        while not done:
            _, _, done, _, info = env.step(rng.uniform(-1, 1, 1).astype(np.float32))
        widths = info["widths"]
        assert (widths == widths[space.leaders]).all()
        assert space.cost(widths) <= space.target(0.5)
