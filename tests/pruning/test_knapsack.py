"""The least sum of curves under a budget, against every plan of a small space."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlprune.api import trace
from rlprune.pruning.knapsack import least_sum
from rlprune.rules.threshold import widths_distribution
from rlprune.vision.zoo import build_model


@pytest.fixture(scope="module")
def space():
    """Four groups of 3 and 6 channels whose costs multiply: a residual stream and what lies inside of its blocks."""
    model = build_model("cifar_resnet20", channels=1, arguments={"width": 3})
    import torch

    found = trace(model, torch.zeros(1, 1, 8, 8))
    keep = [
        g for g in found.groups if g.name in ("conv1", "layer1.0.conv1", "layer1.1.conv1", "layer2.0.conv1")
    ]
    # The others stay as they are: their minimum is their width.
    return replace(found, groups=tuple(g if g in keep else replace(g, minimum=g.width) for g in found.groups))


def curves_of(space, seed: int, power: float):
    rng = np.random.default_rng(seed)
    return {
        g: np.concatenate([[0.0], np.cumsum(rng.exponential(size=group.width) ** power)])
        for g, group in enumerate(space.groups)
        if group.minimum < group.width
    }


def total(space, curves, widths) -> float:
    return float(sum(curve[space.widths[g] - widths[g]] for g, curve in curves.items()))


def every_plan(space):
    choices = [range(g.minimum, g.width + 1) for g in space.groups]
    return np.array(list(itertools.product(*choices)))


class TestLeastSum:
    @given(
        seed=st.integers(0, 10**6),
        power=st.sampled_from([0.5, 1.0, 3.0]),
        share=st.floats(0.02, 0.98),
        metric=st.sampled_from(["macs", "params"]),
    )
    @settings(max_examples=40, deadline=None)
    def test_no_plan_that_changes_two_groups_is_better(self, space, seed, power, share, metric):
        curves = curves_of(space, seed, power)
        low, dense = space.feasible(metric)
        target = low + share * (dense - low)
        widths = least_sum(space, curves, target, metric)
        assert space.cost(widths, metric) <= target
        plans = every_plan(space)
        near = plans[(space.cost(plans, metric) <= target) & ((plans != widths).sum(axis=1) <= 2)]
        mine, best = total(space, curves, widths), min(total(space, curves, p) for p in near)
        assert mine <= best * (1 + 1e-8) + 1e-12

    def test_it_is_nearly_always_the_best_of_all_plans(self, space):
        plans = every_plan(space)
        costs, (low, dense) = space.cost(plans), space.feasible()
        best = 0
        for seed in range(60):
            curves = curves_of(space, seed, (0.5, 1.0, 3.0)[seed % 3])
            target = low + np.random.default_rng([seed, 1]).uniform(0.02, 0.98) * (dense - low)
            sums = sum(curve[space.widths[g] - plans[:, g]] for g, curve in curves.items())
            mine = total(space, curves, least_sum(space, curves, target, "macs"))
            best += mine <= sums[costs <= target].min() * (1 + 1e-8)
        assert best >= 55

    @given(seed=st.integers(0, 10**6), share=st.floats(0.05, 0.95))
    @settings(max_examples=25, deadline=None)
    def test_the_projection_of_its_shares_gives_the_same_widths(self, space, seed, share):
        low, dense = space.feasible()
        target = low + share * (dense - low)
        widths = least_sum(space, curves_of(space, seed, 1.0), target, "macs")
        again = space.project_cost(widths_distribution(space, widths), target)
        assert again.tolist() == widths.tolist()

    def test_groups_of_one_width_stay_together(self, space):
        tied = replace(space, ties=((1, 2),))
        curves = curves_of(space, 3, 1.0)
        widths = least_sum(tied, curves, 0.9 * tied.dense_cost(), "macs")
        assert widths[1] == widths[2] and tied.cost(widths) <= 0.9 * tied.dense_cost()

    def test_a_group_without_a_curve_is_left_alone(self, space):
        curves = {g: c for g, c in curves_of(space, 4, 1.0).items() if g != 0}
        widths = least_sum(space, curves, space.feasible()[0], "macs")
        assert widths[0] == space.widths[0]
        assert all(widths[g] == space.minimums[g] for g in curves)
