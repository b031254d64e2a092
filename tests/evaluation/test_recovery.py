"""Importances, the closed form, batch-norm recalibration and the recovery that composes them."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

import rlprune
from helpers.nets import OWN, Grouped, build, example
from helpers.workloads import Images
from rlprune.config.training import RecoveryConfig
from rlprune.errors import ConfigError
from rlprune.evaluation.importance import compute
from rlprune.evaluation.recovery import Recovery
from rlprune.importance import importance
from rlprune.pruning.plan import Plan
from rlprune.recovery.batch_norm import recalibrate
from rlprune.recovery.reconstruct import Reconstruction

torch.manual_seed(0)


def half_plan(space, seed=0):
    rng = np.random.default_rng(seed)
    kept = tuple(np.sort(rng.permutation(g.width)[: max(1, g.width // 2)]) for g in space.groups)
    return Plan(space, np.array([len(k) for k in kept]), kept)


def layer_errors(net, space, plan, slim, inputs):
    """Squared error of the first consumer's output, cut model against dense (same kept rows)."""
    with torch.no_grad():
        return float(((slim(inputs) - net(inputs)) ** 2).mean())


class TestImportance:
    def test_l1_and_l2_are_norms_of_the_producing_rows(self):
        net = build("Residual")
        space = rlprune.trace(net, example())
        rows = net.a.weight.detach().flatten(1).numpy()
        np.testing.assert_allclose(importance.l2(net, space)[1], np.sqrt((rows**2).sum(1)))
        np.testing.assert_allclose(importance.l1(net, space)[1], np.abs(rows).sum(1))
        stream = np.concatenate([net.stem.weight.detach().flatten(1), net.b.weight.detach().flatten(1)], 1)
        np.testing.assert_allclose(importance.magnitude(net, space)[0], np.sqrt((stream**2).sum(1)))

    def test_bn_scale_is_gamma_and_falls_back_to_l2(self):
        net = build("Residual")
        space = rlprune.trace(net, example())
        scores = importance.bn_scale(net, space)
        np.testing.assert_allclose(scores[1], net.norm.weight.detach().abs().numpy())
        np.testing.assert_allclose(scores[0], importance.l2(net, space)[0])

    def test_taylor_is_weight_times_gradient_and_leaves_the_model_alone(self):
        workload = Images(build("FlattenIntoLinear"), dtype=torch.float64)
        net = workload.model
        space = rlprune.trace(net, workload.example_inputs)
        net.a.weight.requires_grad_(False)
        scores = importance.taylor(net, space, workload.batches("calibration"), workload.loss)
        assert all(p.grad is None for p in net.parameters()) and not net.a.weight.requires_grad
        twin = copy.deepcopy(net).requires_grad_(True)
        images, labels = workload.parts["calibration"]
        nn.functional.cross_entropy(twin(images), labels, reduction="sum").backward()
        hidden = [
            (p.grad * p).abs().detach()
            for p in (twin.hidden.weight, twin.hidden.bias, twin.norm.weight, twin.norm.bias)
        ]
        wanted = (
            hidden[0].sum(1)
            + hidden[1]
            + hidden[2]
            + hidden[3]
            + (twin.head.weight.grad * twin.head.weight).abs().sum(0)
        )
        np.testing.assert_allclose(scores[1], wanted.detach().numpy(), rtol=1e-9)

    @pytest.mark.parametrize(
        "name", [n for n, found in importance.IMPORTANCES.items() if found.wing in (None, "vision")]
    )
    @pytest.mark.parametrize("net", ["Concatenation", "Grouped", "cifar_resnet20"])
    def test_every_importance_scores_every_unit(self, name, net):
        workload = Images(build(net))
        space = rlprune.trace(workload.model, workload.example_inputs)
        scores = compute(name, workload, space, seed=1)
        assert [len(s) for s in scores] == space.widths.tolist()
        assert all(np.isfinite(s).all() and (s >= 0).all() and s.std() > 0 for s in scores)
        again = compute(name, workload, space, seed=1)
        assert all(np.array_equal(a, b) for a, b in zip(scores, again, strict=True))

    def test_unknown_names_are_refused_with_the_near_miss(self):
        with pytest.raises(ConfigError, match="did you mean 'taylor'"):
            compute("tailor", None, None)

    def test_plans_keep_the_highest_scores(self):
        net = build("Residual")
        space = rlprune.trace(net, example())
        plan = rlprune.make_plan(space, importance=[np.arange(8.0), -np.arange(12.0)], widths=[3, 2])
        assert [k.tolist() for k in plan.kept] == [[5, 6, 7], [0, 1]]


class TestReconstruction:
    def test_duplicated_channels_are_restored_exactly(self):
        """Units that are copies of kept ones can be folded into them without any error."""
        net = build("Residual")
        with torch.no_grad():
            for tensor in (
                net.a.weight,
                net.norm.weight,
                net.norm.bias,
                net.norm.running_mean,
                net.norm.running_var,
            ):
                tensor[6:] = tensor[:6]
        space = rlprune.trace(net, example(), ignore=("stem", "b"))
        workload = Images(net, dtype=torch.float64)
        fold = Reconstruction(net, space, workload.batches("calibration"), ridge=1e-10)
        plan = rlprune.make_plan(space, importance=[np.arange(12.0)[::-1]], widths=[6])
        slim = rlprune.prune(net, plan)
        assert layer_errors(net, space, plan, slim, example()) > 1e-4
        fold(slim, plan)
        assert layer_errors(net, space, plan, slim, example()) < 1e-10

    def test_constant_channels_move_into_the_bias(self):
        net = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 4)).double()
        with torch.no_grad():
            net[0].weight[3:] = 0
            net[0].bias[3:] = 2.0
        space = rlprune.trace(net, torch.randn(2, 3).double())
        batches = [(torch.randn(200, 3).double(), torch.zeros(200))]
        plan = rlprune.make_plan(space, importance=[np.arange(6.0)[::-1]], widths=[3])
        slim = rlprune.prune(net, plan)
        Reconstruction(net, space, batches, ridge=1e-9)(slim, plan)
        x = torch.randn(50, 3).double()
        torch.testing.assert_close(slim(x), net(x), rtol=0, atol=1e-7)

    @pytest.mark.parametrize(
        "name", ["Grouped", "Concatenation", "FlattenIntoLinear", "Transposed", "cifar_resnet20"]
    )
    def test_it_lowers_the_error_of_a_random_cut(self, name):
        workload = Images(build(name), size=96, dtype=torch.float64)
        net = workload.model
        space = rlprune.trace(net, workload.example_inputs)
        fold = Reconstruction(net, space, workload.batches("calibration"), ridge=1e-3)
        images = workload.parts["validation"][0]
        plain, folded = [], []
        for seed in range(5):
            plan = half_plan(space, seed)
            slim = rlprune.prune(net, plan)
            plain.append(layer_errors(net, space, plan, slim, images))
            fold(slim, plan)
            folded.append(layer_errors(net, space, plan, slim, images))
        assert np.mean(folded) < 0.9 * np.mean(plain)

    def test_grouped_layers_regress_within_their_own_groups(self):
        """One consumer, its output checked against the least squares solution of each group."""
        torch.manual_seed(1)
        net = Grouped().double().eval()
        space = rlprune.trace(net, example(), ignore=("grouped", "last"))
        images = torch.randn(64, 3, 16, 16).double()
        fold = Reconstruction(net, space, [(images, torch.zeros(64))], ridge=1e-12)
        plan = rlprune.make_plan(space, importance=[np.array([3.0, 1.0, 2.0, 0.0])], widths=[2])
        slim = rlprune.prune(net, plan)
        fold(slim, plan)
        with torch.no_grad():
            x = torch.relu(net.stem(images)).flatten(2).transpose(1, 2).reshape(-1, 3, 4)
        kept, gone = [0, 2], [1, 3]
        for group in range(3):
            a, b = x[:, group, kept], x[:, group, gone]
            centred = np.linalg.lstsq((a - a.mean(0)).numpy(), (b - b.mean(0)).numpy(), rcond=None)[0]
            dense = net.grouped.weight[group * 6 : group * 6 + 6].detach().numpy()
            wanted = dense[:, kept] + np.einsum("kr,orhw->okhw", centred, dense[:, gone])
            np.testing.assert_allclose(
                slim.grouped.weight[group * 6 : group * 6 + 6].detach(), wanted, atol=1e-6
            )


class TestRecovery:
    def test_recalibration_gives_the_statistics_of_the_data(self):
        workload = Images(build("Residual"))
        net = copy.deepcopy(workload.model)
        momentum = net.norm.momentum
        recalibrate(net, workload.batches("calibration"))
        with torch.no_grad():
            x = net.a(net.stem(workload.parts["calibration"][0]))
        torch.testing.assert_close(net.norm.running_mean, x.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(net.norm.running_var, x.var((0, 2, 3)), rtol=2e-2, atol=1e-3)
        assert net.norm.momentum == momentum and not net.norm.training

    @pytest.mark.parametrize("name", [*OWN, "tiny_densenet", "cifar_resnet20"])
    def test_every_architecture_recovers_with_every_step(self, name):
        workload = Images(build(name), size=32)
        space = rlprune.trace(workload.model, workload.example_inputs)
        settings = RecoveryConfig(steps=("finetune", "bn", "reconstruct"), finetune_steps=2, finetune_lr=1e-3)
        assert settings.steps == ("reconstruct", "bn", "finetune")
        recover = Recovery(workload, space, settings)
        before = {k: v.clone() for k, v in workload.model.state_dict().items()}
        plan = half_plan(space)
        twice = []
        for _ in range(2):
            slim = rlprune.prune(workload.model, plan)
            recover(slim, plan)
            twice.append(slim.state_dict())
            assert not slim.training
        assert all(torch.equal(a, b) for a, b in zip(twice[0].values(), twice[1].values(), strict=True))
        assert all(torch.isfinite(v).all() for v in twice[0].values())
        assert all(torch.equal(v, before[k]) for k, v in workload.model.state_dict().items())

    def test_finetuning_with_the_dense_logits_lowers_the_loss(self):
        workload = Images(build("Residual"), size=64)
        space = rlprune.trace(workload.model, workload.example_inputs)
        plan = half_plan(space, 1)
        losses = []
        for steps in (0, 40):
            settings = (
                RecoveryConfig(steps=("finetune",), finetune_steps=steps, finetune_lr=0.02)
                if steps
                else RecoveryConfig(steps=("none",))
            )
            slim = rlprune.prune(workload.model, plan)
            Recovery(workload, space, settings)(slim, plan)
            losses.append(workload.evaluate(slim, "train").loss)
        assert losses[1] < 0.8 * losses[0]
