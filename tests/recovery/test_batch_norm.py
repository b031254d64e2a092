"""Batch-norm statistics of cut models: what is measured, and how the dense model's own ones are changed by it."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

import rlprune
from helpers.nets import OWN, build
from helpers.workloads import Images
from rlprune.config.training import RecoveryConfig
from rlprune.evaluation.recovery import Recovery
from rlprune.pruning.plan import Plan, make_plan
from rlprune.pruning.surgery import axis_indices, cut_tensor, cuts_by_tensor
from rlprune.recovery import batch_norm
from rlprune.recovery.batch_norm import Statistics, arrivals, correct_statistics, recalibrate

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


def assert_changed(after: nn.Module, own: nn.Module, left: torch.Tensor, dense: torch.Tensor) -> None:
    """Statistics ``own`` have changed as an input (N, C, H, W) of the dense model became that of the cut one."""
    ratio = (left.var((0, 2, 3), correction=0) + own.eps) / (dense.var((0, 2, 3), correction=0) + own.eps)
    off = own.running_mean - dense.mean((0, 2, 3))
    torch.testing.assert_close(
        after.running_mean, left.mean((0, 2, 3)) + off * ratio.sqrt(), rtol=1e-3, atol=1e-4
    )
    variance = ((own.running_var + own.eps) * ratio - own.eps).clamp_min(0.0)
    torch.testing.assert_close(after.running_var, variance, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("steady", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_statistics_change_as_what_comes_to_each_batch_norm_has_changed(
    name: str, steady: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_norm, "STEADY", float("inf") if steady else 0.0)
    workload = off_its_data(name)
    plan = plan_with(workload, 0.5)
    images = list(workload.batches("calibration"))[:1]
    state = copy.deepcopy(workload.model.state_dict())
    dense = arrivals(workload.model, lambda: images)
    assert dense.steady is steady
    assert all(torch.equal(v, state[k]) for k, v in workload.model.state_dict().items())

    own, found = (rlprune.prune(workload.model, plan) for _ in range(2))
    correct_statistics(found, plan, images, dense)
    # What the batch norms read: in train mode, or in eval mode, of the cut model with the statistics it has got.
    read = inputs_of_norms(found, images[0][0], steady)
    before = inputs_of_norms(workload.model, images[0][0], steady)
    cuts = cuts_by_tensor(plan.space, axis_indices(plan.space, plan.kept))
    norms = [n for n, m in found.named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms
    for norm in norms:
        kept = cut_tensor(before[norm].transpose(0, 1), cuts.get(f"{norm}.running_mean", [])).transpose(0, 1)
        assert_changed(found.get_submodule(norm), own.get_submodule(norm), read[norm], kept)


def test_a_model_that_is_no_longer_itself_under_the_statistics_of_images_runs_with_its_own() -> None:
    """Channels that hardly vary, whose small errors the next layer blows up."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)]
    model = nn.Sequential(*layers).eval()
    images = [(torch.randn(16, 3, 6, 6), None)]
    recalibrate(model, images)
    assert arrivals(model, lambda: images).steady
    with torch.no_grad():  # the second layer reads a difference of large numbers
        layers[0].weight[1:] = layers[0].weight[:1]
        layers[2].weight[:] = torch.tensor([1e3, -1e3, 1e3, -1e3])[None, :, None, None]
    layers[1].running_mean += torch.tensor([0.1, 0.0, -0.1, 0.0])
    recalibrate(model[2:], [(model[:2](images[0][0]), None)])
    assert not arrivals(model, lambda: images).steady


def inputs_of_norms(model: nn.Module, images: torch.Tensor, train: bool) -> dict[str, torch.Tensor]:
    """What comes to each batch norm; in train mode of these alone the model's statistics are left as they are."""
    found = {}
    model = copy.deepcopy(model).eval()
    for n, m in model.named_modules():
        if isinstance(m, nn.BatchNorm2d):
            m.train(train)
            m.register_forward_hook(lambda _, inputs, __, n=n: found.update({n: inputs[0]}))
    with torch.no_grad():
        model(images)
    return found


def test_several_batches_count_as_one() -> None:
    x = torch.randn(12, 3, 2, 2) * torch.tensor([1.0, 5.0, 0.1])[None, :, None, None]
    whole = Statistics.arriving(x)
    pooled = Statistics.pooled([Statistics.arriving(part) for part in x.chunk(3)])
    torch.testing.assert_close(whole.mean, x.mean((0, 2, 3)))
    torch.testing.assert_close(whole.variance, x.var((0, 2, 3), correction=0))
    one = Statistics.arriving(x[:1, :, :1, :1])
    assert torch.equal(one.mean, x[0, :, 0, 0]) and not one.variance.any()
    torch.testing.assert_close(pooled.mean, whole.mean)
    torch.testing.assert_close(pooled.variance, whole.variance)


@pytest.mark.parametrize("name", NAMES)
def test_after_the_closed_form_statistics_harm_little(name: str) -> None:
    """Running statistics may be far from those of the images, as those of a model that was trained for a few epochs.

    Statistics that are measured in train mode made the error of the DenseNet's outputs a hundred times as large.
    """
    workload = off_its_data(name)
    plan = plan_with(workload, 0.7)
    inputs = torch.cat([x for x, _ in workload.batches("validation")])
    errors = {}
    for steps in (("reconstruct",), ("reconstruct", "bn")):
        slim = rlprune.prune(workload.model, plan)
        Recovery(workload, plan.space, RecoveryConfig(steps=steps))(slim, plan)
        with torch.no_grad():
            dense, cut = workload.model.eval()(inputs), slim.eval()(inputs)
        errors[steps] = float((dense - cut).square().mean())
    assert errors["reconstruct", "bn"] < 4.0 * errors["reconstruct",]


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
        arrivals(model, lambda: [good, (torch.randn(2, 99, 4, 4), None)])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [m.momentum for m in model.modules() if hasattr(m, "momentum")] == momenta
    assert not any(m.training for m in model.modules())
