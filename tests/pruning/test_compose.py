"""A pruned model that is pruned again: one plan against the first dense model does the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torchvision import models

import rlprune
from rlprune.errors import ArtifactError
from rlprune.vision.zoo import build_model
from tests.helpers.own_models import TwoInputs

IMAGE = torch.zeros(1, 3, 32, 32)


def random_plan(space: rlprune.PruningSpace, seed: int, share: float) -> rlprune.Plan:
    """Random widths between ``share`` of the dense ones and all, random units."""
    rng = np.random.default_rng(seed)
    widths = np.maximum(space.minimums, (space.widths * rng.uniform(share, 1, len(space.groups))).astype(int))
    return rlprune.make_plan(space, importance=[rng.random(g.width) for g in space.groups], widths=widths)


@pytest.mark.parametrize("name", ["cifar_resnet20", "resnet18", "mobilenet_v3_small"])
def test_two_cuts_are_one(name: str) -> None:
    arguments = {"width": 6} if name.startswith("cifar") else {}
    model = build_model(name, 5, arguments=arguments)
    first = random_plan(rlprune.trace(model, IMAGE, verify=False), 0, 0.3)
    slim = rlprune.prune(model, first)
    second = random_plan(rlprune.trace(slim, IMAGE, verify=False), 1, 0.3)
    smaller, composed = rlprune.prune(slim, second), rlprune.compose(first, second)
    again = rlprune.prune(model, composed)
    wanted = smaller.state_dict()
    assert wanted.keys() == again.state_dict().keys()
    assert all(torch.equal(tensor, wanted[key]) for key, tensor in again.state_dict().items())
    assert repr(again) == repr(smaller)
    for metric in ("macs", "params"):
        cost = composed.space.cost(composed.widths, metric)
        assert cost == second.space.cost(second.widths, metric) < first.space.cost(first.widths, metric)


def test_a_trained_model_is_saved_by_one_plan(tmp_path: Path) -> None:
    model = models.resnet18(num_classes=5).eval()
    space = rlprune.trace(model, IMAGE, verify=False)
    first = random_plan(space, 0, 0.5)
    rlprune.save(rlprune.prune(model, first), first, tmp_path / "once")
    slim = rlprune.load(tmp_path / "once")
    with torch.no_grad():
        slim.fc.bias += 1  # what a fine-tune does
    second = random_plan(rlprune.trace(slim, IMAGE, verify=False), 1, 0.5)
    smaller = rlprune.prune(slim, second)
    known = rlprune.load_plan(tmp_path / "once", space)
    rlprune.save(smaller, rlprune.compose(known, second), tmp_path / "twice")
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(rlprune.load(tmp_path / "twice")(x), smaller(x))


def test_a_plan_of_another_model_is_refused() -> None:
    model, other = build_model("cifar_resnet20", 5, arguments={"width": 6}), TwoInputs().eval()
    first = random_plan(rlprune.trace(model, IMAGE, verify=False), 0, 0.5)
    foreign = random_plan(rlprune.trace(other, (IMAGE, torch.zeros(1, 4))), 1, 0.5)
    with pytest.raises(ArtifactError, match="where the first space keeps it whole"):
        rlprune.compose(first, foreign)
    with pytest.raises(ArtifactError, match="belongs to another model"):
        rlprune.compose(first, first)


def test_a_layer_that_the_first_space_protects_stays() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)
    ).eval()
    first = random_plan(rlprune.trace(model, IMAGE, ignore=("2",)), 0, 0.5)
    slim = rlprune.prune(model, first)
    second = random_plan(rlprune.trace(slim, IMAGE), 1, 0.5)
    with pytest.raises(ArtifactError, match="'2.weight' where the first space keeps it whole"):
        rlprune.compose(first, second)
