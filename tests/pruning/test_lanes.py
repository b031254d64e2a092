"""Groups with lanes: one width for all lanes of a tensor, other units in each, and whole lanes that go."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import rlprune
from rlprune import ArtifactError, BudgetError
from rlprune.importance.unit_scores import per_unit
from rlprune.pruning.cost import FormulaBuilder
from rlprune.pruning.plan import Plan, best_units, make_plan
from rlprune.pruning.space import Axis, Cut, Group, PruningSpace
from rlprune.pruning.surgery import masked, masked_in_place, prune

LANES, UNITS, WIDTH = 4, 5, 3


class Parts(nn.Module):
    """Four parts side by side: x (N, 3) -> relu(x up) down, added up over the parts that ``chosen`` names."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.up = nn.Parameter(torch.randn(LANES, WIDTH, UNITS, generator=generator, dtype=torch.float64))
        self.shift = nn.Parameter(torch.randn(LANES, UNITS, generator=generator, dtype=torch.float64))
        self.down = nn.Parameter(torch.randn(LANES, UNITS, 2, generator=generator, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack(
            [(x @ u + s).relu() @ d for u, s, d in zip(self.up, self.shift, self.down, strict=True)]
        )


def space_of(drop_lanes: bool = True) -> PruningSpace:
    """A group of whole parts, and one of the units inside of them."""
    whole = Group("parts", "experts", LANES, 1, 1, 1, (), 0.0, 1, 1)
    inner = Group("units", "ffn", UNITS, 1, 0, 1, (), 0.0, 1, 1, lanes=LANES, lane_group="parts")
    alone = Group("units", "ffn", UNITS, 1, 0, 1, (), 0.0, 1, 1, lanes=LANES)
    groups = (whole, inner) if drop_lanes else (alone,)
    first = LANES if drop_lanes else 0
    numbers = first + np.arange(LANES * UNITS)
    axes = (Axis(np.arange(LANES)), Axis(numbers, LANES, 0)) if drop_lanes else (Axis(numbers, LANES),)
    own = len(axes) - 1
    cuts = [Cut("up", 2, own, False), Cut("shift", 1, own, False), Cut("down", 1, own, True)]
    if drop_lanes:
        cuts = [Cut(name, 0, 0, False) for name in ("up", "shift", "down")] + cuts
    builder = FormulaBuilder(len(groups))
    sizes = PruningSpace(groups, {}, "", axes, (), (), {}).axis_sizes()
    builder.add((WIDTH + 1 + 2) * (1 if drop_lanes else LANES), *sizes)
    costs = {"params": builder.build()}
    return PruningSpace(groups, {}, "", axes, tuple(cuts), (), costs)


def random_plan(space: PruningSpace, seed: int) -> Plan:
    rng = np.random.default_rng(seed)
    widths = np.array([rng.integers(g.minimum, g.width + 1) for g in space.groups])
    return Plan(space, widths, best_units(space, [rng.permutation(g.units) for g in space.groups], widths))


@given(seed=st.integers(0, 2**32 - 1), drop_lanes=st.booleans())
@settings(max_examples=30, deadline=None, database=None)
def test_cut_equals_masked(seed: int, drop_lanes: bool) -> None:
    space, model = space_of(drop_lanes), Parts()
    plan = random_plan(space, seed)
    slim = prune(model, plan)
    x = torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(seed % 999), dtype=torch.float64)
    before = {name: p.clone() for name, p in model.named_parameters()}
    wanted = masked(model, plan)(x)
    with masked_in_place(model, plan):
        assert torch.equal(model(x), wanted)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    lanes = plan.kept[0] if drop_lanes else np.arange(LANES)
    assert torch.allclose(slim(x), wanted[torch.from_numpy(lanes)], atol=1e-12)
    inner = len(plan.kept[-1]) // len(lanes)
    assert inner == plan.widths[-1]
    assert sum(p.numel() for p in slim.parameters()) == space.cost(plan.widths, "params")
    assert Plan.from_dict(plan.to_dict(), space).to_dict() == plan.to_dict()


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=20, deadline=None, database=None)
def test_a_later_stage_cuts_what_an_earlier_one_left(seed: int) -> None:
    """The space after a plan is that of the cut model, and two plans are one against the first model."""
    space, model = space_of(), Parts()
    first = random_plan(space, seed)
    left = space.after(first.kept)
    assert left.unit_counts.tolist() == [len(k) for k in first.kept]
    assert left.dense_cost("params") == space.cost(first.widths, "params")
    slim = prune(model, first)
    second = random_plan(left, seed + 1)
    kept = tuple(before[now] for before, now in zip(first.kept, second.kept, strict=True))
    at_once = Plan(space, second.widths, kept)
    twice = prune(slim, second)
    assert Plan.from_dict(at_once.to_dict(), space).widths.tolist() == second.widths.tolist()
    for name, tensor in prune(model, at_once).named_parameters():
        assert torch.equal(tensor, twice.get_parameter(name))
    composed = rlprune.compose(first, second)
    assert [k.tolist() for k in composed.kept] == [k.tolist() for k in kept]
    assert composed.widths.tolist() == second.widths.tolist()


def test_each_lane_is_ranked_by_its_own_scores() -> None:
    space, model = space_of(), Parts()
    scores = per_unit(model, space, lambda cut, t: t.detach().abs() if cut.tensor == "down" else None)
    assert [len(s) for s in scores] == [LANES, LANES * UNITS]
    assert np.allclose(scores[1], model.down.detach().abs().sum(dim=2).reshape(-1))
    assert np.allclose(scores[0], model.down.detach().abs().sum(dim=(1, 2)))
    plan = make_plan(space, importance=scores, widths=[2, 3])
    whole = np.sort(np.argsort(-scores[0], kind="stable")[:2])
    rows = scores[1].reshape(LANES, UNITS)
    wanted = [lane * UNITS + np.sort(np.argsort(-rows[lane], kind="stable")[:3]) for lane in whole]
    assert plan.kept[0].tolist() == whole.tolist()
    assert plan.kept[1].tolist() == np.concatenate(wanted).tolist()


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda d: d["groups"][1].update(kept=[0, 1, 2, 7]), "must keep 2 units in each of the 2 lanes"),
        (lambda d: d["groups"][0].update(kept=[0, 3]), "must keep 2 units in each of the 2 lanes"),
        (lambda d: d["groups"][1].update(kept=[0, 1, 5]), "do not fit"),
        (lambda d: d["groups"][1].update(kept=[0, 1, 5, 20]), "do not fit"),
    ],
)
def test_a_plan_whose_lanes_differ_is_refused(change: Any, line: str) -> None:
    space = space_of()
    kept = (np.array([0, 1]), np.array([0, 2, 6, 7]))
    data = Plan(space, np.array([2, 2]), kept).to_dict()
    assert Plan.from_dict(data, space).to_dict() == data
    change(data)
    with pytest.raises(ArtifactError, match=line):
        Plan.from_dict(data, space)


def test_scores_of_one_lane_are_refused() -> None:
    with pytest.raises(BudgetError, match="group 'units' needs 20 numbers"):
        make_plan(space_of(), importance=[np.ones(LANES), np.ones(UNITS)], widths=[2, 2])
