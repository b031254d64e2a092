"""Spaces of language models beyond the family contract: limits, dropping, refusals, sharing, the meta device."""

from __future__ import annotations

import copy
import time
from typing import Any

import numpy as np
import pytest
import torch

import rlprune
from helpers.lm import tiny_lm, tokens
from rlprune import GraphError
from rlprune.language import families
from rlprune.language.proof import random_plan
from rlprune.language.sizes import resize
from rlprune.pruning.plan import Plan
from rlprune.pruning.surgery import attributes, dropped, prune


def logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def plan_at(space: rlprune.PruningSpace, widths: Any) -> Plan:
    return rlprune.make_plan(space, importance=[np.arange(g.width) for g in space.groups], widths=widths)


# Limits


def test_rounding_is_for_neurons_and_not_for_heads() -> None:
    space = rlprune.trace(tiny_lm(), tokens(), round_to=16, minimum=20)
    assert space.steps.tolist() == [1, 16] * 3
    assert space.minimums.tolist() == [1, 32] * 3
    again = space.with_rounding(8)
    assert again.steps.tolist() == [1, 8] * 3


@pytest.mark.parametrize("metric", ["macs", "params", "block_params", "kv_cache"])
def test_projection_reaches_a_budget_through_dropped_parts(metric: str) -> None:
    model = tiny_lm()
    space = rlprune.trace(model, tokens(), drop=True, verify=False)
    ratio = 1.0001 * space.cost([0, 40, 3, 40, 3, 0], metric) / space.dense_cost(metric)
    widths = space.project([1.0, 0.0, 0.0, 0.0, 0.0, 1.0], ratio, metric=metric)
    # Neurons hold no cache: they are given back where its bytes are the budget.
    assert widths.tolist() == [0, 40, 3, 40, 3, 40 if metric == "kv_cache" else 0]
    plan = plan_at(space, widths)
    gone = [g.name for g, w in zip(space.groups, widths, strict=True) if w == 0]
    assert dropped(space, plan) == gone
    assert logits(prune(model, plan), tokens()).isfinite().all()


def test_without_drop_every_part_keeps_a_unit() -> None:
    space = rlprune.trace(tiny_lm(), tokens(), verify=False)
    with pytest.raises(rlprune.BudgetError, match="allowed: 1 to 3"):
        plan_at(space, [0, *space.widths[1:]])


def test_a_later_stage_cuts_what_an_earlier_one_left() -> None:
    """The space after a plan is that of the cut model: same cost, same cut, dropped parts stay dropped."""
    model = tiny_lm(dtype=torch.float64)
    space = rlprune.trace(model, tokens(), drop=True, verify=False)
    first = plan_at(space, [0, 20, 2, 0, 3, 30])
    left = space.after(first.kept)
    slim = prune(model, first)
    assert left.dense_cost("params") == sum(p.numel() for p in slim.parameters())
    widths = left.project(np.ones(6), 0.8, metric="params")
    assert widths[0] == widths[3] == 0
    second = prune(slim, plan_at(left, widths))
    direct = prune(model, plan_at(space, widths))  # units are ranked by index, so both keep the last ones
    assert torch.equal(logits(second, tokens()), logits(direct, tokens()))


def test_a_pruned_model_can_be_traced_again() -> None:
    model = tiny_lm()
    space = rlprune.trace(model, tokens(), drop=True)
    slim = prune(model, plan_at(space, [0, 20, 2, 0, 3, 30]))
    again = rlprune.trace(slim, tokens(), drop=True)
    assert again.widths.tolist() == [20, 2, 3, 30]
    assert again.protected["model.layers.0.self_attn"] == "already dropped"
    assert again.dense_cost("macs") == space.cost([0, 20, 2, 0, 3, 30], "macs")


def test_ignored_parts_stay() -> None:
    names = ["model.layers.0", "*.1.mlp", "model.layers.2.self_attn.k_proj"]
    space = rlprune.trace(tiny_lm(), tokens(), ignore=names)
    assert [g.name for g in space.groups] == ["model.layers.1.self_attn", "model.layers.2.mlp"]
    assert space.protected["model.layers.2.self_attn"] == "ignored by 'model.layers.2.self_attn.k_proj'"
    with pytest.raises(GraphError, match="no layer matches 'model.layer.0'"):
        rlprune.trace(tiny_lm(), tokens(), ignore=["model.layer.0"])


# Surgery


def test_cast_and_shared_tensors() -> None:
    model = tiny_lm(tie_word_embeddings=True)
    space = rlprune.trace(model, tokens(), drop=True, verify=False)
    shared: dict[str, torch.Tensor] = {}
    plan = plan_at(space, [1, 20, 3, 40, 3, 0])
    slim = prune(model, plan, dtype=torch.bfloat16, shared=shared)
    assert {p.dtype for p in slim.parameters()} == {torch.bfloat16}
    assert slim.lm_head.weight is slim.model.embed_tokens.weight
    # Rotary frequencies are no weights: half their digits would move every position.
    assert slim.model.rotary_emb.inv_freq.dtype == torch.float32
    other = prune(model, plan_at(space, [3, 40, 2, 10, 3, 40]), dtype=torch.bfloat16, shared=shared)
    embeddings = [m.model.embed_tokens.weight.data_ptr() for m in (slim, other)]
    assert embeddings[0] == embeddings[1] == shared["model.embed_tokens.weight"].data_ptr()
    reference = prune(model, plan).to(torch.bfloat16)
    assert (logits(slim, tokens()) - logits(reference, tokens())).abs().max() < 0.1


def test_sharing_without_a_cast_copies_no_matrix() -> None:
    model = tiny_lm()
    space = rlprune.trace(model, tokens(), verify=False)
    slim = prune(model, plan_at(space, space.widths), shared={})
    for name, parameter in slim.named_parameters():
        own = model.get_parameter(name)
        assert parameter is not own
        assert (parameter.data_ptr() == own.data_ptr()) == (own.ndim > 1)
    plain = prune(model, plan_at(space, space.widths))
    assert all(p.data_ptr() != model.get_parameter(n).data_ptr() for n, p in plain.named_parameters())


def test_attributes_follow_in_fused_families() -> None:
    model = tiny_lm("phi3")
    space = rlprune.trace(model, tokens(), verify=False)
    plan = plan_at(space, [1, 24, *space.widths[2:]])
    changed = attributes(space, plan)["model.layers.0.self_attn"]
    assert changed == {"num_key_value_heads": 1, "config.num_attention_heads": 2}
    slim = prune(model, plan)
    config = slim.model.layers[0].self_attn.config
    assert (config.num_attention_heads, config.hidden_size) == (2, 32)
    assert slim.config.num_attention_heads == model.config.num_attention_heads == 4
    copied = copy.deepcopy(slim)
    assert copied.model.layers[0].self_attn.config.num_attention_heads == 2
    assert copied.model.layers[0].self_attn.config._shared is copied.config


def test_static_cache_generates_the_same_tokens() -> None:
    model = tiny_lm()
    space = rlprune.trace(model, tokens(), drop=True, verify=False)
    slim = prune(model, plan_at(space, [0, 20, 2, 0, 1, 30]))
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        plain = slim.generate(tokens(5), use_cache=False, **options)
        beams = [slim.generate(tokens(5), use_cache=u, num_beams=2, **options) for u in (True, False)]
        static = slim.generate(tokens(5), cache_implementation="static", disable_compile=True, **options)
    assert torch.equal(plain, static)
    assert torch.equal(*beams)


@pytest.mark.parametrize(
    ("sizes", "line"),
    [
        ([{"num_attention_heads": 6, "num_key_value_heads": 3, "intermediate_size": 40}], "1 layers for"),
        (
            [{"num_attention_heads": 5, "num_key_value_heads": 3, "intermediate_size": 40}] * 3,
            "multiples of 2",
        ),
        (
            [{"num_attention_heads": 6, "intermediate_size": 41}] * 3,
            "intermediate_size: 41; allowed: 0 to 40",
        ),
        ([{"num_attention_heads": 6, "intermediate_size": None}] * 3, "intermediate_size: None"),
        ([{"num_attention_heads": -2, "intermediate_size": 4}] * 3, "allowed: 0 to 6"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes: list[dict[str, int]], line: str) -> None:
    with pytest.raises(families.UnsupportedModel, match=line):
        resize(tiny_lm(), sizes)


# Refusals


def small(name: str, **settings: Any) -> torch.nn.Module:
    import transformers

    base = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = getattr(transformers, name.split(":")[0])(**(base | settings))
    return getattr(transformers, name.split(":")[1])(config)


@pytest.mark.parametrize(
    ("name", "settings", "line"),
    [
        (
            "GraniteMoeConfig:GraniteMoeForCausalLM",
            {"intermediate_size": 32, "num_key_value_heads": 2, "num_local_experts": 2},
            "mixture of experts of a type without an adapter \\('granitemoe'\\); allowed: gpt_oss, mixtral",
        ),
        (
            "PhimoeConfig:PhimoeForCausalLM",
            {"num_local_experts": 2, "intermediate_size": 32, "num_key_value_heads": 2},
            "'model.layers.0.mlp.*mixture of experts",
        ),
        ("BertConfig:BertForMaskedLM", {"intermediate_size": 32}, "BertForMaskedLM: is no causal"),
        ("BertConfig:BertModel", {"intermediate_size": 32}, "BertModel: is no causal language model"),
        (
            "T5Config:T5ForConditionalGeneration",
            {"d_model": 32, "d_ff": 32, "num_layers": 1, "num_heads": 4, "d_kv": 8},
            "T5ForConditionalGeneration: an encoder-decoder model",
        ),
        (
            "LlamaConfig:LlamaModel",
            {"intermediate_size": 32},
            "LlamaModel: has no language-model head",
        ),
        (
            "LlamaConfig:LlamaForSequenceClassification",
            {"intermediate_size": 32, "pad_token_id": 0},
            "has no language-model head",
        ),
    ],
)
def test_what_is_not_supported_is_refused_in_one_line(name: str, settings: dict[str, Any], line: str) -> None:
    with pytest.raises(GraphError, match=line) as caught:
        rlprune.trace(small(name, **settings), tokens())
    assert "\n" not in str(caught.value)


def test_inputs_that_are_no_tokens_are_refused() -> None:
    for wrong in (torch.rand(1, 4), torch.zeros(4, dtype=torch.long), {"pixels": tokens()}, None):
        with pytest.raises(GraphError, match="token ids"):
            rlprune.trace(tiny_lm(), wrong)
    assert rlprune.trace(tiny_lm(), {"input_ids": tokens(7)}).input_shape == (1, 7)


def test_a_layer_of_another_kind_is_named() -> None:
    model = tiny_lm()
    model.model.layers[1].mlp.up_proj = torch.nn.Bilinear(2, 2, 2)
    with pytest.raises(
        GraphError, match=r"'model.layers.1.mlp.up_proj' should be a linear layer; found: Bilinear"
    ):
        rlprune.trace(model, tokens())


def test_dropping_is_for_language_models() -> None:
    with pytest.raises(GraphError, match=r"prune.drop: only for language models; Linear is none"):
        rlprune.trace(torch.nn.Linear(2, 2), torch.rand(1, 2), drop=True)


def test_a_wrong_cut_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof sees a family whose fused rows are read in the wrong order."""
    from dataclasses import replace

    wrong = replace(families.FAMILIES["gpt_neox"], blocked=True)
    monkeypatch.setitem(families.FAMILIES, "gpt_neox", wrong)  # type: ignore[arg-type]
    with pytest.raises(GraphError, match="cutting it is not exact"):
        rlprune.trace(tiny_lm("gpt_neox"), tokens())


# Size


def shaped(layers: int, hidden: int, inner: int, heads: int) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=128256, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=8,
    )  # fmt: skip
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def test_a_model_without_weights_is_planned_and_cut() -> None:
    model = shaped(32, 4096, 14336, 32)
    start = time.perf_counter()
    space = rlprune.trace(model, torch.zeros(1, 2048, dtype=torch.long), round_to=64)
    widths = space.project(np.ones(len(space.groups)), 0.8, metric="params")
    assert time.perf_counter() - start < 60.0
    assert space.dense_cost("params") == 8_030_261_248  # Llama-3-8B
    assert space.dense_cost("kv_cache") == 2 * 32 * 8 * 128 * 2
    slim = prune(model, plan_at(space, widths))
    assert sum(p.numel() for p in slim.parameters()) == space.cost(widths, "params")
    assert {p.device.type for p in slim.parameters()} == {"meta"}


def test_real_weights_take_a_plan_made_without_them() -> None:
    model = tiny_lm()
    bare = copy.deepcopy(model).to("meta")
    space = rlprune.trace(bare, tokens(), drop=True)
    own = rlprune.trace(model, tokens(), drop=True)
    assert space.fingerprint == own.fingerprint
    plan = random_plan(space, np.random.default_rng(0))
    same = Plan.from_dict(plan.to_dict(), own)
    assert torch.equal(logits(prune(model, plan), tokens()), logits(prune(model, same), tokens()))
