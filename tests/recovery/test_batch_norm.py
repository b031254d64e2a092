"""Batch-norm statistics of cut models: what is measured, and how the dense model's own ones are changed by it."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

import rlprune
from helpers.nets import OWN, build
from helpers.workloads import Images
from rlprune.config.training import RecoveryConfig
from rlprune.evaluation.recovery import Recovery
from rlprune.pruning.plan import Plan, make_plan
from rlprune.recovery.batch_norm import correct_statistics, measured_statistics, recalibrate

NAMES = ["cifar_resnet20", "tiny_densenet", *(name for name in OWN if name in ("Residual", "Grouped"))]


def off_its_data(name: str) -> Images:
    """A workload whose model's statistics are not those of the calibration split."""
    workload = Images(build(name), size=32)
    recalibrate(workload.model, [(2.0 * torch.randn(64, *workload.example_inputs.shape[1:]) + 0.3, None)])
    return workload


def plan_with(workload: Images, share: float) -> Plan:
    space = rlprune.trace(workload.model, workload.example_inputs)
    widths = space.limits.floor(space.widths * share)
    scores = [np.random.default_rng(0).random(g.units) for g in space.groups]
    return make_plan(space, importance=scores, widths=widths)


@pytest.mark.parametrize("name", NAMES)
def test_where_nothing_is_cut_nothing_changes(name: str) -> None:
    workload = off_its_data(name)
    plan = plan_with(workload, 1.0)
    for statistics, kept in (("corrected", True), ("measured", False)):
        slim = rlprune.prune(workload.model, plan)
        before = copy.deepcopy(slim.state_dict())
        settings = RecoveryConfig(steps=("bn",), statistics=statistics)
        Recovery(workload, plan.space, settings)(slim, plan)
        changes = [
            float((v - before[k]).abs().max())
            for k, v in slim.state_dict().items()
            if "running" in k and v.numel()
        ]
        if changes:
            assert (max(changes) < 1e-4) is kept, (statistics, max(changes))


@pytest.mark.parametrize("name", NAMES)
def test_means_change_by_the_difference_and_variances_by_the_ratio(name: str) -> None:
    workload = off_its_data(name)
    plan = plan_with(workload, 0.5)
    images = list(workload.batches("calibration"))
    own = copy.deepcopy(workload.model.state_dict())
    dense = measured_statistics(workload.model, images)
    assert all(torch.equal(v, own[k]) for k, v in workload.model.state_dict().items())

    left, measured, found = (rlprune.prune(workload.model, plan) for _ in range(3))
    recalibrate(measured, images)
    correct_statistics(found, plan, images, dense)
    # The same cut of a model that has the dense one's measured statistics says where its channels have gone.
    other = copy.deepcopy(workload.model)
    recalibrate(other, images)
    other = rlprune.prune(other, plan)
    states = [m.state_dict() for m in (left, measured, other, found)]
    for key in (k for k in states[0] if k.endswith("running_mean")):
        a, b, c, d = (s[key] for s in states)
        torch.testing.assert_close(d, a + b - c, rtol=1e-4, atol=1e-5)
        a, b, c, d = (s[key.replace("mean", "var")] for s in states)
        torch.testing.assert_close(d, a * b / c, rtol=2e-2, atol=1e-4)
        assert (d >= 0).all()


def test_few_images_harm_a_slightly_cut_model_less() -> None:
    """Eight images say little: a model that has lost a few channels stays nearer to the dense one's outputs."""
    workload = off_its_data("cifar_resnet20")
    plan = plan_with(workload, 0.95)
    inputs = 2.0 * torch.randn(64, *workload.example_inputs.shape[1:]) + 0.3
    errors = {}
    for statistics in ("corrected", "measured"):
        settings = RecoveryConfig(steps=("reconstruct", "bn"), statistics=statistics, samples=8)
        slim = rlprune.prune(workload.model, plan)
        Recovery(workload, plan.space, settings)(slim, plan)
        with torch.no_grad():
            dense, cut = workload.model.eval()(inputs), slim.eval()(inputs)
        errors[statistics] = float((dense - cut).square().mean())
    assert errors["corrected"] < 0.5 * errors["measured"]


def test_a_batch_that_fails_leaves_the_dense_model_as_it_was() -> None:
    workload = off_its_data("cifar_resnet20")
    model = workload.model.eval()
    before = copy.deepcopy(model.state_dict())
    momenta = [m.momentum for m in model.modules() if hasattr(m, "momentum")]
    good = next(iter(workload.batches("calibration")))
    with pytest.raises(RuntimeError):
        measured_statistics(model, [good, (torch.randn(2, 99, 4, 4), None)])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [m.momentum for m in model.modules() if hasattr(m, "momentum")] == momenta
    assert not any(m.training for m in model.modules())
