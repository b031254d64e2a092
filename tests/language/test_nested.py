"""The nested closed form and the recovery that uses it, against plain least squares on the activations."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rlprune
from helpers.language_workload import Sentences, activations, plan_of
from helpers.lm import tiny_lm
from rlprune.config.training import RecoveryConfig
from rlprune.errors import ConfigError, DataError
from rlprune.evaluation.importance import compute
from rlprune.evaluation.recovery import Recovery
from rlprune.language.calibration import elimination, grams
from rlprune.language.calibration.nested import Factors, NestedReconstruction
from rlprune.pruning.plan import Plan

RIDGE = 1e-3


def test_gram_matrices_are_the_mean_products_whatever_the_blocks(monkeypatch):
    workload, space, collected = shared_llama()
    monkeypatch.setattr(grams, "_BLOCK", 7)
    blocked = grams.collect(workload.model, space, workload.batches("calibration"))
    for name in names(space):
        x = activations(workload, name)
        for found in (collected[name], blocked[name]):
            torch.testing.assert_close(found.product, x.T @ x / len(x), rtol=1e-12, atol=1e-13)
            torch.testing.assert_close(found.mean, x.mean(0), rtol=1e-12, atol=1e-13)
            torch.testing.assert_close(found.centred(), torch.cov(x.T, correction=0), rtol=1e-9, atol=1e-12)
            assert found.count == len(x)


def folded(model, space, collected, scores, **how):
    """The closed form of Gram matrices, which it uses up."""
    return NestedReconstruction.of(space, grams.UsedUp(collected), Factors(model, RIDGE, **how), scores)


def known(workload, space, given):
    """A cache of measurements that holds Gram matrices already; None where none are given."""
    if given is None:
        return None
    cache = workload.adapter.calibration(workload, space, workload.model)
    cache.give_grams(given)
    return cache


def workload_of(name: str, **changes):
    return Sentences(tiny_lm(name, dtype=torch.float64, num_hidden_layers=2, **changes))


def regression(x, w, kept, bias, intercept):
    """Weights (k, O) and bias by ``lstsq`` on raw activations, the ridge as added rows."""
    tokens = len(x)
    mean = x.mean(0) if intercept else torch.zeros(x.shape[1], dtype=x.dtype)
    centred = x - mean
    lam = RIDGE * float((centred**2).mean())
    target = centred @ w
    penalty = (lam * tokens) ** 0.5
    left = torch.cat([centred[:, kept], penalty * torch.eye(len(kept), dtype=x.dtype)])
    right = torch.cat([target, penalty * w[kept]])
    new = torch.linalg.lstsq(left, right, driver="gelsd").solution
    start = torch.zeros(w.shape[1], dtype=x.dtype) if bias is None else bias
    return new, start + mean @ w - mean[kept] @ new if intercept else bias


def columns_kept(consumer, kept):
    return np.sort(consumer.columns[kept].reshape(-1))


class TestNested:
    @pytest.mark.parametrize("intercept", [False, True])
    @pytest.mark.parametrize("name", ["llama", "llama-biases", "gpt2", "phi3", "gpt_neox", "opt"])
    def test_it_is_least_squares_on_the_activations(self, name, intercept):
        """Best-ranked sets of any width and arbitrary sets, biases, Conv1D, both kinds of group."""
        workload = workload_of(name) if name != "gpt2" else Sentences(tiny_lm(name, dtype=torch.float64))
        model = workload.model
        space = rlprune.trace(model, workload.example_inputs)
        rng = np.random.default_rng(0)
        scores = [rng.random(g.width) for g in space.groups]
        collected = grams.collect(model, space, workload.batches("calibration"))
        fold = folded(model, space, collected, scores, intercept=intercept)
        assert len(collected) == 0 and fold.nbytes > 0
        best = rlprune.make_plan(space, importance=scores, widths=np.maximum(space.widths * 2 // 3, 1))
        other = plan_of(space, seed=1)
        for plan in (best, other):
            slim = rlprune.prune(model, plan)
            fold(slim, plan)
            for consumer in grams.unit_consumers(space):
                x = activations(workload, consumer.module)
                dense, layer = model.get_submodule(consumer.module), slim.get_submodule(consumer.module)
                kept = columns_kept(consumer, plan.kept[consumer.group])
                bias = None if dense.bias is None else dense.bias.detach()
                centred = intercept or bias is not None
                new, shift = regression(x, consumer.matrix(model), kept, bias, centred)
                weight = layer.weight if consumer.dim == 0 else layer.weight.T
                torch.testing.assert_close(weight.detach(), new, rtol=1e-6, atol=1e-8)
                assert (layer.bias is None) == (shift is None)
                if shift is not None:
                    torch.testing.assert_close(layer.bias.detach(), shift, rtol=1e-6, atol=1e-8)

    @given(seed=st.integers(0, 10**6), data=st.data())
    @settings(max_examples=25, deadline=None)
    def test_every_width_of_one_factor_equals_a_direct_solve(self, seed, data):
        workload, space, collected = shared_llama()
        rng = np.random.default_rng(seed)
        scores = [rng.random(g.width) for g in space.groups]
        products = {n: collected[n].product for n in names(space)}
        again = grams.Grams({n: collected[n] for n in names(space)})
        fold = folded(workload.model, space, again, scores)
        widths = [data.draw(st.integers(1, g.width)) for g in space.groups]
        plan = rlprune.make_plan(space, importance=scores, widths=widths)
        slim = rlprune.prune(workload.model, plan)
        fold(slim, plan)
        for consumer in grams.unit_consumers(space):
            kept = columns_kept(consumer, plan.kept[consumer.group])
            g, w = products[consumer.module], consumer.matrix(workload.model)
            lam = RIDGE * g.diagonal().mean()
            removed = np.setdiff1d(np.arange(len(g)), kept)
            kk = g[kept][:, kept] + lam * torch.eye(len(kept), dtype=g.dtype)
            wanted = w[kept] + torch.linalg.solve(kk, g[kept][:, removed]) @ w[removed]
            found = slim.get_submodule(consumer.module).weight.detach().T
            torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-9)

    def test_float32_factors_are_close_to_float64(self):
        model = tiny_lm("llama", num_hidden_layers=2)
        workload = Sentences(model)
        space = rlprune.trace(model, workload.example_inputs)
        twin = Sentences(copy.deepcopy(model).double())
        plan = plan_of(space, seed=2)
        outputs = []
        for w in (workload, twin):
            recover = Recovery(w, space, RecoveryConfig(steps=("reconstruct",)))
            slim = rlprune.prune(w.model, plan)
            recover(slim, plan)
            with torch.no_grad():
                outputs.append(slim(w.example_inputs).logits.double())
        torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-3, atol=1e-3)

    def test_obs_with_its_own_reconstruction_has_the_error_that_it_promised(self):
        """The elimination's curve is the measured squared error of the rebuilt layer plus the penalty."""
        workload, space, collected = shared_llama()
        found = elimination.eliminations(workload.model, space, collected, RIDGE)
        ranks = [found[g].ranks for g in range(len(space.groups))]
        again = grams.Grams({n: collected[n] for n in names(space)})
        fold = folded(workload.model, space, again, ranks)
        for width in (30, 12, 3):
            widths = [min(width, g.width) for g in space.groups]
            plan = rlprune.make_plan(space, importance=ranks, widths=widths)
            slim = rlprune.prune(workload.model, plan)
            fold(slim, plan)
            for consumer in grams.unit_consumers(space):
                gone = space.groups[consumer.group].width - widths[consumer.group]
                if not gone:
                    continue
                x, w = activations(workload, consumer.module), consumer.matrix(workload.model)
                kept = columns_kept(consumer, plan.kept[consumer.group])
                new = torch.zeros_like(w)
                new[kept] = slim.get_submodule(consumer.module).weight.detach().T
                lam = RIDGE * float((x**2).mean())
                error = float((x @ (w - new)).square().sum(1).mean() + lam * (w - new).square().sum())
                assert error == pytest.approx(found[consumer.group].errors[gone - 1], rel=1e-6)

    def test_shared_tensors_stay_as_they_are(self):
        """Candidates may share uncut tensors: a bias is replaced, never written into."""
        workload = workload_of("llama-biases")
        space = rlprune.trace(workload.model, workload.example_inputs)
        plan = plan_of(space, seed=3)
        for steps in (("reconstruct",), ("bias",)):
            slim = rlprune.prune(workload.model, plan)
            layer = slim.get_submodule(grams.unit_consumers(space)[0].module)
            before = layer.bias.detach()
            copy = before.clone()
            Recovery(workload, space, RecoveryConfig(steps=steps))(slim, plan)
            assert torch.equal(before, copy) and not torch.equal(layer.bias, copy)


_LLAMA: list = []


def shared_llama():
    if not _LLAMA:
        workload = workload_of("llama")
        space = rlprune.trace(workload.model, workload.example_inputs)
        _LLAMA.append(
            (workload, space, grams.collect(workload.model, space, workload.batches("calibration")))
        )
    return _LLAMA[0]


def names(space):
    return [c.module for c in grams.unit_consumers(space)]


class TestRecovery:
    @pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gpt_neox", "bloom", "falcon-mqa"])
    @pytest.mark.parametrize("steps", [("bias",), ("reconstruct",), ("bias", "reconstruct")])
    def test_parts_that_are_dropped_whole_recover_too(self, name, steps):
        workload = Sentences(tiny_lm(name, dtype=torch.float64))
        model = workload.model
        space = rlprune.trace(model, workload.example_inputs, drop=True)
        scores = [np.arange(g.width, dtype=float) for g in space.groups]
        recover = Recovery(workload, space, RecoveryConfig(steps=steps), importance=scores)
        plan = rlprune.make_plan(space, importance=scores, widths=np.zeros_like(space.widths))
        slim = rlprune.prune(model, plan)
        recover(slim, plan)
        consumer = grams.unit_consumers(space)[0]
        dense, layer = model.get_submodule(consumer.module), slim.get_submodule(consumer.module)
        if "bias" in steps or dense.bias is not None:
            with torch.no_grad():
                mean = dense(activations(workload, consumer.module)).mean(0)
            torch.testing.assert_close(layer.bias.detach(), mean, rtol=1e-9, atol=1e-12)
        else:
            assert layer.bias is None
        with torch.no_grad():
            assert torch.isfinite(slim(workload.example_inputs).logits).all()

    def test_bias_keeps_the_mean_output(self):
        """FLAP's formula, written out: b = W (mean(x) * removed)."""
        workload = workload_of("llama")
        space = rlprune.trace(workload.model, workload.example_inputs)
        plan = plan_of(space, seed=4)
        slim = rlprune.prune(workload.model, plan)
        Recovery(workload, space, RecoveryConfig(steps=("bias",)))(slim, plan)
        for consumer in grams.unit_consumers(space):
            x = activations(workload, consumer.module).numpy()
            kept = columns_kept(consumer, plan.kept[consumer.group])
            removed = np.isin(np.arange(x.shape[1]), kept, invert=True)
            w = workload.model.get_submodule(consumer.module).weight.detach().numpy()
            found = slim.get_submodule(consumer.module)
            np.testing.assert_allclose(found.bias.detach(), w @ (x.mean(0) * removed), atol=1e-12)
            assert np.array_equal(found.weight.detach(), w[:, kept])

    def test_each_step_lowers_the_error_of_the_part_before_it(self):
        """On the first block's consumers, whose inputs no other cut changes: none > bias, reconstruct > both."""
        workload, space, _ = shared_llama()
        consumer = grams.unit_consumers(space)[0]
        x = activations(workload, consumer.module)
        w = consumer.matrix(workload.model)
        plan = plan_of(space, seed=5)
        kept = columns_kept(consumer, plan.kept[consumer.group])
        errors = {}
        for steps in (("none",), ("bias",), ("reconstruct",), ("bias", "reconstruct")):
            slim = rlprune.prune(workload.model, plan)
            Recovery(workload, space, RecoveryConfig(steps=steps))(slim, plan)
            with torch.no_grad():
                got = slim.get_submodule(consumer.module)(x[:, kept])
            errors[steps] = float((got - x @ w).square().mean())
        assert errors[("none",)] > errors[("bias",)] > errors[("bias", "reconstruct")]
        assert errors[("none",)] > errors[("reconstruct",)] > errors[("bias", "reconstruct")]

    def test_given_gram_matrices_are_used_and_freed(self):
        workload, space, collected = shared_llama()
        plan = plan_of(space, seed=6)
        built = []
        for given_ in (None, grams.Grams({n: collected[n] for n in names(space)})):
            recover = Recovery(
                workload,
                space,
                RecoveryConfig(steps=("reconstruct",)),
                calibration=known(workload, space, given_),
            )
            slim = rlprune.prune(workload.model, plan)
            recover(slim, plan)
            assert given_ is None or len(given_) == 0
            assert recover.nbytes > 0
            built.append(slim.state_dict())
        assert all(torch.equal(built[0][k], built[1][k]) for k in built[0])
        with pytest.raises(DataError, match=r"none of 'model.layers.0.self_attn.o_proj'"):
            none = known(workload, space, grams.Grams({}))
            Recovery(workload, space, RecoveryConfig(steps=("reconstruct",)), calibration=none)

    def test_later_stages_start_from_the_model_that_is_left(self):
        workload, space, _ = shared_llama()
        plan = plan_of(space, seed=7)
        slim = rlprune.prune(workload.model, plan)
        rest = space.after(plan.kept)
        recover = Recovery(workload, rest, RecoveryConfig(steps=("reconstruct",)), model=slim)
        again = plan_of(rest, seed=8)
        final = rlprune.prune(slim, again)
        recover(final, again)
        with torch.no_grad():
            assert torch.isfinite(final(workload.example_inputs).logits).all()

    def test_images_refuse_the_bias_step(self):
        from helpers.nets import build, example

        net = build("Residual")
        space = rlprune.trace(net, example())

        class Nothing(rlprune.Workload):
            model = net

            def batches(self, split, limit=None):
                return iter(())

        with pytest.raises(ConfigError, match="recovery.steps: 'bias' works on attention and feed-forward"):
            Recovery(Nothing(), space, RecoveryConfig(steps=("bias",)))


def test_plans_of_a_nested_ranking_are_prefixes():
    """What NestedReconstruction takes for the quick way is what make_plan chooses, ties included."""
    _, space, _ = shared_llama()
    scores = [np.zeros(g.width) for g in space.groups]
    for width in (1, 2, 3):
        plan: Plan = rlprune.make_plan(space, importance=scores, widths=[width] * len(space.groups))
        for scores_g, kept in itertools.zip_longest(scores, plan.kept):
            assert np.argsort(-scores_g, kind="stable")[:width].tolist() == kept.tolist()


def test_the_hidden_size_as_a_group_cuts_the_rows_of_what_is_solved():
    workload = workload_of("llama")
    space = rlprune.trace(workload.model, workload.example_inputs, hidden=True)
    scores = compute("obs", workload, space)
    hidden = [g.kind for g in space.groups].index("hidden")
    assert scores[hidden].std() > 0
    narrow = rlprune.make_plan(space, importance=scores, widths=np.maximum(space.widths // 2, 1))
    widths = narrow.widths.copy()
    widths[hidden] = space.widths[hidden]
    wide = rlprune.make_plan(space, importance=scores, widths=widths)
    for steps in (("reconstruct",), ("bias",), ("bias", "reconstruct")):
        recover = Recovery(workload, space, RecoveryConfig(steps=steps), importance=scores)
        slim, whole = rlprune.prune(workload.model, narrow), rlprune.prune(workload.model, wide)
        recover(slim, narrow)
        recover(whole, wide)
        rows = narrow.kept[hidden]
        for name in names(space):
            a, b = slim.get_submodule(name), whole.get_submodule(name)
            torch.testing.assert_close(a.weight, b.weight[rows], rtol=1e-12, atol=1e-14)
            assert (a.bias is None) == ("bias" not in steps)
            if a.bias is not None:
                torch.testing.assert_close(a.bias, b.bias[rows], rtol=1e-12, atol=1e-14)
