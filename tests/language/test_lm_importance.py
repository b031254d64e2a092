"""Importances of a language model's units, against the papers' formulas on raw activations and gradients."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import rlprune
from helpers.language_workload import Sentences, activations
from helpers.lm import VARIANTS, tiny_lm
from helpers.nets import build, example
from rlprune.errors import ConfigError, DataError
from rlprune.evaluation.importance import compute
from rlprune.importance import importance
from rlprune.language.calibration import grams, statistics
from rlprune.language.calibration.cache import STATISTICS
from rlprune.workloads import Workload

EVERY = list(importance.IMPORTANCES)
HEAD, KV, RATIO = 8, 3, 2  # of the variant "llama": 6 query heads, 3 key-value heads


def llama(dtype=torch.float64, **changes):
    workload = Sentences(tiny_lm("llama", dtype=dtype, num_hidden_layers=2, **changes))
    return workload, rlprune.trace(workload.model, workload.example_inputs)


def parts(model, block=0):
    layer = model.model.layers[block]
    attention, mlp = layer.self_attn, layer.mlp
    return attention, mlp


def by_kv_head(values):
    """Sums over the query heads of each KV head: query head h belongs to h // (heads of a group)."""
    heads = values.reshape(KV * RATIO, HEAD).sum(1)
    return np.array([sum(heads[h] for h in range(KV * RATIO) if h // RATIO == kv) for kv in range(KV)])


class TestActivations:
    def test_wanda_sp_written_out(self):
        workload, space = llama()
        scores = compute("wanda_sp", workload, space)
        attention, mlp = parts(workload.model)
        for g, (layer, path) in enumerate(
            ((attention.o_proj, "self_attn.o_proj"), (mlp.down_proj, "mlp.down_proj"))
        ):
            x = activations(workload, f"model.layers.0.{path}").numpy()
            w = layer.weight.detach().numpy()
            columns = (np.abs(w) * np.sqrt((x**2).mean(0))[None, :]).mean(0)
            np.testing.assert_allclose(scores[g], columns if g else by_kv_head(columns), rtol=1e-9)

    def test_flap_written_out(self):
        workload, space = llama()
        scores = compute("flap", workload, space)
        attention, mlp = parts(workload.model)
        x = activations(workload, "model.layers.0.mlp.down_proj").numpy()
        w = mlp.down_proj.weight.detach().numpy()
        np.testing.assert_allclose(scores[1], x.var(0) * (w**2).sum(0), rtol=1e-9)
        x = activations(workload, "model.layers.0.self_attn.o_proj").numpy()
        w = attention.o_proj.weight.detach().numpy()
        squared = (x.var(0) * (w**2).sum(0)) ** 2
        np.testing.assert_allclose(scores[0], by_kv_head(squared) / (HEAD * RATIO), rtol=1e-9)

    @pytest.mark.parametrize("name", ["flap_ifv", "flap_wifn"])
    def test_flaps_other_metrics_written_out(self, name):
        workload, space = llama()
        scores = compute(name, workload, space)
        attention, mlp = parts(workload.model)
        for g, (layer, path) in enumerate(
            ((attention.o_proj, "self_attn.o_proj"), (mlp.down_proj, "mlp.down_proj"))
        ):
            x = activations(workload, f"model.layers.0.{path}").numpy()
            w = layer.weight.detach().numpy()
            columns = x.var(0) if name == "flap_ifv" else (np.abs(w) * np.sqrt((x**2).mean(0))).mean(0)
            expected = columns if g else by_kv_head(columns**2) / (HEAD * RATIO)
            np.testing.assert_allclose(scores[g], expected, rtol=1e-9)

    def test_a_query_head_counts_for_its_own_kv_head(self):
        """The trap of LLM-Pruner: with h % n_kv another KV head would get the score."""
        for name in ("wanda_sp", "flap", "taylor_param_second"):
            workload, space = llama()
            with torch.no_grad():  # head 3 belongs to KV head 1, and 3 % 3 is 0
                workload.model.model.layers[0].self_attn.o_proj.weight[:, 3 * HEAD : 4 * HEAD] *= 100
            assert compute(name, workload, space)[0].argmax() == 1

    def test_conv1d_columns_are_its_first_dimension(self):
        workload = Sentences(tiny_lm("gpt2", dtype=torch.float64))
        space = rlprune.trace(workload.model, workload.example_inputs)
        index = [g.kind for g in space.groups].index("ffn")
        layer = workload.model.transformer.h[0].mlp.c_proj
        x = activations(workload, "transformer.h.0.mlp.c_proj").numpy()
        w = layer.weight.detach().numpy()
        assert w.shape == (40, 32)
        wanda = (np.abs(w) * np.sqrt((x**2).mean(0))[:, None]).mean(1)
        np.testing.assert_allclose(compute("wanda_sp", workload, space)[index], wanda, rtol=1e-9)
        rows = workload.model.transformer.h[0].mlp.c_fc.weight.detach().numpy()
        np.testing.assert_allclose(
            importance.l2(workload.model, space)[index], np.sqrt((rows**2).sum(0)), rtol=1e-9
        )

    def test_obs_ranks_are_a_permutation_and_keep_what_cannot_be_replaced(self):
        workload, space = llama()
        with torch.no_grad():  # neuron 5 is a copy of neuron 4; neuron 7 writes the most
            for layer in (
                workload.model.model.layers[0].mlp.gate_proj,
                workload.model.model.layers[0].mlp.up_proj,
            ):
                layer.weight[5] = layer.weight[4]
            workload.model.model.layers[0].mlp.down_proj.weight[:, 7] *= 50
        scores = compute("obs", workload, space)
        for group, values in zip(space.groups, scores, strict=True):
            assert sorted(values) == list(range(group.width))
        assert min(scores[1][4], scores[1][5]) < 10 and scores[1][7] == 39

    def test_given_statistics_and_gram_matrices_are_used(self):
        workload, space = llama()
        collected = grams.collect(workload.model, space, workload.batches("calibration"))
        found = statistics.collect(workload.model, space, workload.batches("calibration"))
        plain = {n: compute(n, workload, space) for n in ("obs", "wanda_sp", "flap")}
        workload.batches = lambda split, limit=None: iter(())  # there is nothing to read any more
        for name, scores in plain.items():
            known = workload.adapter.calibration(workload, space, workload.model)
            known.give_grams(collected)
            known.keep(STATISTICS, found)
            again = compute(name, workload, space, calibration=known)
            assert all(np.array_equal(a, b) for a, b in zip(scores, again, strict=True))
        assert len(collected) == 4 and collected.nbytes > 0


def sample_gradients(workload, names, limit=None):
    """Gradients of each calibration sequence's loss by autograd: {name: (N, ...)}."""
    twin = copy.deepcopy(workload.model).requires_grad_(True)
    tensors = dict(twin.named_parameters())
    found = {n: [] for n in names}
    for inputs, _ in workload.batches("calibration", limit):
        for ids in inputs:
            logits = twin(ids[None]).logits[0, :-1]
            loss = F.cross_entropy(logits, ids[1:])
            for n, g in zip(names, torch.autograd.grad(loss, [tensors[n] for n in names]), strict=True):
                found[n].append(g)
    return {n: torch.stack(g) for n, g in found.items()}


def slices_of(name, values):
    """A weight's values as slices (units, slices of a unit, length), by hand for the Llama."""
    last = name.split(".")[-2]
    if last in ("o_proj", "down_proj"):
        values = values.T
    rows = {"q_proj": RATIO * HEAD, "o_proj": RATIO * HEAD, "k_proj": HEAD, "v_proj": HEAD}.get(last, 1)
    return values.reshape(-1, rows, values.shape[-1])


class TestTaylor:
    def reference(self, kind, group):
        workload, _ = llama()
        paths = {
            "attention": [f"self_attn.{n}_proj" for n in "qkvo"],
            "ffn": [f"mlp.{n}_proj" for n in ("gate", "up", "down")],
        }[group]
        names = [f"model.layers.1.{p}.weight" for p in paths]
        gradients = sample_gradients(workload, names)
        total, vector = 0.0, 0.0
        for name in names:
            w, g = workload.model.get_parameter(name).detach(), gradients[name]
            first, second = w * g.mean(0), w**2 * (g**2).mean(0)
            terms = {
                "vector": first,
                "param_first": first,
                "param_second": second,
                "param_mix": first - second / 2,
                "saap": first - second / 2,
            }[kind]
            cut = slices_of(name, terms)
            total = total + (cut.sum(2).abs().sum(1) if kind == "vector" else cut.abs().sum((1, 2)))
            vector = vector + cut.sum((1, 2))
        return total.numpy(), np.abs(vector.numpy()) if kind == "saap" else None

    @pytest.mark.parametrize("kind", ["vector", "param_first", "param_second", "param_mix"])
    def test_llm_pruners_scores_written_out(self, kind):
        workload, space = llama()
        scores = compute(f"taylor_{kind}", workload, space)
        for index, group in enumerate(("attention", "ffn"), start=2):
            assert space.groups[index].kind == group
            np.testing.assert_allclose(scores[index], self.reference(kind, group)[0], rtol=1e-7)

    def test_saap_is_the_sum_of_both_parts_over_their_means(self):
        workload, space = llama()
        scores = compute("saap", workload, space)
        for index, group in ((2, "attention"), (3, "ffn")):
            element, vector = self.reference("saap", group)
            # two unknown means (over both blocks) explain all scores of a group
            table = np.stack([vector, element], axis=1)
            solution, _, _, _ = np.linalg.lstsq(table, scores[index], rcond=None)
            np.testing.assert_allclose(table @ solution, scores[index], rtol=1e-6)
            assert (solution > 0).all()
        for kind in ("attention", "ffn"):
            values = np.concatenate([s for s, g in zip(scores, space.groups, strict=True) if g.kind == kind])
            assert values.mean() == pytest.approx(2.0)

    def test_the_published_number_of_samples_can_be_given(self):
        workload, space = llama()
        few = compute("taylor_param_second", workload, space, limit=3)
        gradients = sample_gradients(workload, ["model.layers.0.mlp.down_proj.weight"], limit=3)
        other = compute("taylor_param_second", workload, space)
        assert len(gradients["model.layers.0.mlp.down_proj.weight"]) == 3
        assert not np.allclose(few[1], other[1])

    def test_the_model_is_left_as_it_was(self):
        workload, space = llama(dtype=torch.float32)
        model = workload.model.train()
        parameters = dict(model.named_parameters())
        kept = parameters["model.layers.0.mlp.up_proj.weight"]
        kept.grad = torch.ones_like(kept)
        parameters["model.norm.weight"].requires_grad_(False)
        before = {n: p.detach().clone() for n, p in parameters.items()}
        compute("taylor_param_mix", workload, space)
        assert model.training and (kept.grad == 1).all()
        assert [n for n, p in parameters.items() if not p.requires_grad] == ["model.norm.weight"]
        assert all(p.grad is None for p in parameters.values() if p is not kept)
        assert all(torch.equal(p, before[n]) for n, p in parameters.items())
        assert not any(p._post_accumulate_grad_hooks for p in parameters.values())

    def test_no_sample_is_refused(self):
        workload, space = llama()
        with pytest.raises(DataError, match="no calibration samples"):
            importance.taylor_vector(workload.model, space, [], workload.loss)


class TestEveryFamily:
    @pytest.mark.parametrize("name", [n for n in VARIANTS if n.split("-")[0] in (
        "llama", "qwen3", "gemma2", "gemma3", "phi3", "opt", "gpt_neox", "gpt2", "bloom", "falcon", "granite"
    )])  # fmt: skip
    def test_every_importance_scores_every_unit(self, name):
        workload = Sentences(tiny_lm(name, attention="eager"), size=4)
        space = rlprune.trace(workload.model, workload.example_inputs)
        consumers = grams.unit_consumers(space)
        assert [c.group for c in consumers] == list(range(len(space.groups)))
        for kind in EVERY:
            scores = compute(kind, workload, space, seed=1)
            assert [len(s) for s in scores] == space.widths.tolist()
            assert all(np.isfinite(s).all() and (s >= 0).all() for s in scores)
            assert all(s.std() > 0 for s, g in zip(scores, space.groups, strict=True) if g.width > 1), kind

    def test_networks_for_images_are_refused_in_one_line(self):
        net = build("Residual")
        space = rlprune.trace(net, example())

        class Nothing(Workload):
            model = net

            def batches(self, split, limit=None):
                raise AssertionError("data were read")

        for name in (n for n, i in importance.IMPORTANCES.items() if i.wing):
            with pytest.raises(
                ConfigError, match=rf"{name}' works on attention and feed-forward groups"
            ) as error:
                compute(name, Nothing(), space)
            assert "\n" not in str(error.value)

    def test_unknown_names_are_refused_with_the_near_miss(self):
        with pytest.raises(ConfigError, match="did you mean 'wanda_sp'"):
            compute("wanda-sp", None, None)


class TestStatistics:
    def test_moments_are_those_of_the_activations(self):
        workload, space = llama()
        found = statistics.collect(workload.model, space, workload.batches("calibration"))
        assert set(found.inputs) == {c.module for c in grams.unit_consumers(space)}
        for name, moments in found.inputs.items():
            x = activations(workload, name).numpy()
            np.testing.assert_allclose(moments.mean, x.mean(0), atol=1e-12)
            np.testing.assert_allclose(moments.second, (x**2).mean(0), rtol=1e-10)
            np.testing.assert_allclose(moments.variance, x.var(0), rtol=1e-9)
            assert moments.count == len(x) == 120

    @pytest.mark.parametrize(
        "name",
        [
            "llama",
            "gemma2",
            "granite",
            "gpt_neox",
            "gpt_neox-serial",
            "opt",
            "opt-project",
            "bloom",
            "falcon",
        ],
    )
    def test_cosines_are_those_of_the_residual_stream(self, name):
        """Against hooks on each block and a second model whose feed-forward outputs are zero."""
        workload = Sentences(tiny_lm(name, attention="eager", dtype=torch.float64))
        space = rlprune.trace(workload.model, workload.example_inputs)
        found = statistics.collect(workload.model, space, workload.batches("calibration"))
        from rlprune.language.families import blocks_of

        for block in blocks_of(workload.model):
            expected = np.mean(
                [cosines(workload.model, block, ids) for ids, _ in batches_of_four(workload)], axis=0
            )
            got = [found.block_cosine, found.attention_cosine, found.ffn_cosine]
            np.testing.assert_allclose([g[block.index] for g in got], expected, atol=1e-9)

    def test_a_dropped_part_changes_nothing_in_the_stream(self):
        workload, _ = llama()
        space = rlprune.trace(workload.model, workload.example_inputs, drop=True)
        widths = space.widths.copy()
        widths[0] = 0
        scores = [np.arange(g.width, dtype=float) for g in space.groups]
        slim = rlprune.prune(workload.model, rlprune.make_plan(space, importance=scores, widths=widths))
        rest = rlprune.trace(slim, workload.example_inputs, drop=True)
        found = statistics.collect(slim, rest, workload.batches("calibration"))
        assert found.attention_cosine[0] == pytest.approx(1.0) and found.ffn_cosine[0] < 0.999

    def test_an_empty_split_is_refused(self):
        workload, space = llama()
        for collect in (statistics.collect, grams.collect):
            with pytest.raises(DataError, match="empty"):
                collect(workload.model, space, [])

    def test_activations_that_are_not_finite_are_refused(self):
        workload, space = llama()
        with torch.no_grad():
            workload.model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.inf
        with pytest.raises(DataError, match=r"input of 'model.layers.1.mlp.down_proj' is not finite"):
            grams.collect(workload.model, space, workload.batches("calibration"))


def batches_of_four(workload):
    """Batches of equal size, so that a plain mean over them is the mean over tokens."""
    ids = torch.cat([x for x, _ in workload.batches("calibration")])
    return [(part, part) for part in ids.split(5)]


def cosines(model, block, ids):
    """[block, attention, feed-forward] cosines of one batch; the middle comes from a run without the feed-forward."""

    def run(subject):
        seen = {}
        layer = subject.get_submodule(block.path)

        def before(m, args, kwargs):
            seen["in"] = args[0] if args else kwargs["hidden_states"]

        def after(m, args, output):
            seen["out"] = output if isinstance(output, torch.Tensor) else output[0]

        handles = [
            layer.register_forward_pre_hook(before, with_kwargs=True),
            layer.register_forward_hook(after),
        ]
        with torch.no_grad():
            subject(ids, use_cache=False)
        for handle in handles:
            handle.remove()
        return seen

    whole = run(model)
    twin = copy.deepcopy(model)
    down = twin.get_submodule(block.down)
    with torch.no_grad():
        down.weight.zero_()
        if down.bias is not None:
            down.bias.zero_()
    middle = run(twin)["out"]
    pairs = ((whole["in"], whole["out"]), (whole["in"], middle), (middle, whole["out"]))
    return [float(F.cosine_similarity(a, b, dim=-1).mean()) for a, b in pairs]
