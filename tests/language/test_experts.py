"""Mixtures of experts: exact cuts of neurons and of whole experts, exact costs, legal routing, files that load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import rlprune
from helpers.lm import MIXTURES, tiny_config, tiny_lm, tokens
from rlprune import BudgetError, GraphError
from rlprune.language import families
from rlprune.language.proof import counted, difference, random_plan, skeleton
from rlprune.language.sizes import layer_sizes, resize
from rlprune.pruning.plan import Plan, make_plan
from rlprune.pruning.space import PruningSpace
from rlprune.pruning.surgery import masked, masked_in_place, prune

LENGTH = 12


def logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def group(space: PruningSpace, kind: str, block: int) -> int:
    """The last group of a kind in a block: of the kind "ffn" that of the experts' neurons."""
    return next(
        i
        for i in reversed(range(len(space.groups)))
        if (space.groups[i].kind, space.groups[i].block) == (kind, block)
    )


@pytest.fixture(scope="module")
def cases() -> dict[str, tuple[Any, PruningSpace]]:
    """Each variant's model in float64 and its space with dropping allowed."""
    found = {}
    for name in MIXTURES:
        model = tiny_lm(name, dtype=torch.float64)
        found[name] = model, rlprune.trace(model, tokens(LENGTH), drop=True, verify=False)
    return found


@pytest.mark.parametrize("name", MIXTURES)
class TestContract:
    @given(seed=st.integers(0, 2**32 - 1))
    @settings(max_examples=3, deadline=None, database=None)
    def test_cut_equals_masked_and_costs_are_exact(self, cases: dict[str, Any], name: str, seed: int) -> None:
        model, space = cases[name]
        plan = random_plan(space, np.random.default_rng(seed))
        ids = tokens(LENGTH, batch=2, seed=seed % 1000)
        slim = prune(model, plan)
        wanted = logits(masked(model, plan), ids)
        assert float((logits(slim, ids) - wanted).abs().max() / wanted.abs().max()) < 1e-9
        assert counted(slim, ids[:1])[1] == space.cost(plan.widths, "macs")
        assert sum(p.numel() for p in slim.parameters()) == space.cost(plan.widths, "params")
        inside = sum(p.numel() for n, p in slim.named_parameters() if n.startswith("model.layers."))
        assert inside == space.cost(plan.widths, "block_params")

    def test_masking_in_place_leaves_nothing_behind(self, cases: dict[str, Any], name: str) -> None:
        model, space = cases[name]
        plan, ids = random_plan(space, np.random.default_rng(3)), tokens(LENGTH)
        before = {n: t.clone() for n, t in model.state_dict().items()}
        dense = logits(model, ids)
        with masked_in_place(model, plan):
            assert torch.equal(logits(model, ids), logits(masked(model, plan), ids))
        assert torch.equal(logits(model, ids), dense)
        assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
        assert not any("forward" in vars(m) for m in model.modules())

    def test_the_cache_is_as_before(self, cases: dict[str, Any], name: str) -> None:
        model, space = cases[name]
        ids, options = tokens(6), {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
        for seed in range(2):
            plan = random_plan(space, np.random.default_rng(seed))
            slim: Any = prune(model, plan)
            with torch.no_grad():
                cache = slim(input_ids=ids, use_cache=True).past_key_values
                outs = [slim.generate(ids, use_cache=use, **options) for use in (True, False)]
            held = sum(t.numel() for layer in cache.layers for t in (layer.keys, layer.values))
            assert 2 * held == space.cost(plan.widths, "kv_cache") * ids.shape[1]
            assert torch.equal(*outs)

    def test_experts_without_neurons_leave_their_bias_at_most(self, cases: dict[str, Any], name: str) -> None:
        model, space = cases[name]
        widths = space.widths.copy()
        widths[[i for i, g in enumerate(space.groups) if g.lanes > 1]] = 0
        plan = make_plan(space, importance=[np.arange(g.units) for g in space.groups], widths=widths)
        slim, ids = prune(model, plan), tokens(LENGTH)
        wanted = logits(masked(model, plan), ids)
        assert float((logits(slim, ids) - wanted).abs().max() / wanted.abs().max()) < 1e-9
        assert counted(slim, ids)[1] == space.cost(widths, "macs")

    def test_a_skeleton_proves_the_family(self, name: str) -> None:
        narrow = skeleton(tiny_config(name, num_experts_per_tok=3)).double()
        space = rlprune.trace(narrow, tokens(LENGTH), drop=True, verify=False)
        plan = random_plan(space, np.random.default_rng(0))
        assert {g.kind for g in space.groups} == {"attention", "ffn", "experts"}
        assert difference(narrow, tokens(LENGTH), plan) is None

    def test_folders_load_to_the_bit(self, name: str, tmp_path: Path) -> None:
        """Three loaders agree: ours, transformers with the folder's code, and the model that was saved."""
        from transformers import AutoModelForCausalLM

        model = tiny_lm(name)
        space = rlprune.trace(model, tokens(LENGTH), drop=True, verify=False)
        plan = random_plan(space, np.random.default_rng(4))
        slim = prune(model, plan)
        rlprune.save(slim, plan, tmp_path / "out")
        wanted = logits(slim, tokens(LENGTH, 2))
        loaded = rlprune.load(tmp_path / "out")
        auto = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
        assert torch.equal(logits(loaded, tokens(LENGTH, 2)), wanted)
        assert torch.equal(logits(auto, tokens(LENGTH, 2)), wanted)
        assert layer_sizes(loaded) == layer_sizes(slim)
        assert {type(m).__name__ for m in loaded.modules()} >= {
            type(m).__name__ for m in slim.model.modules()
        }

    def test_a_resized_dense_model_takes_the_weights(self, cases: dict[str, Any], name: str) -> None:
        model, space = cases[name]
        slim = prune(model, random_plan(space, np.random.default_rng(0)))
        other = tiny_lm(name, seed=9, dtype=torch.float64)
        resize(other, layer_sizes(slim))
        other.load_state_dict(slim.state_dict())
        assert torch.equal(logits(other, tokens()), logits(slim, tokens()))


# Against formulas that are written down here


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_a_block_is_what_the_formula_says(cases: dict[str, Any], name: str) -> None:
    """Router, choice and experts of a cut block, computed from the dense weights by hand."""
    model, space = cases[name]
    plan = random_plan(space, np.random.default_rng(11))
    block = families.blocks_of(model)[0].experts
    assert block is not None
    whole, inner = (plan.kept[group(space, kind, 0)] for kind in ("experts", "ffn"))
    x = torch.randn(1, 7, model.config.hidden_size, dtype=torch.float64)
    part = model.get_submodule(block.owner)
    experts, router = model.get_submodule(block.module), model.get_submodule(block.router)
    scores = x[0] @ router.weight.T + getattr(router, "bias", 0.0)
    gone = np.setdiff1d(np.arange(block.count), whole)
    scores[:, gone] = -torch.inf
    chosen = scores.topk(block.top_k).indices
    # A softmax over those that were chosen is that over all, normalised to 1.
    weights = scores.gather(1, chosen).softmax(dim=-1)
    wanted = torch.zeros_like(x[0])
    for t in range(len(x[0])):
        for k, e in enumerate(chosen[t].tolist()):
            kept = inner[inner // block.neurons == e] % block.neurons
            wanted[t] += weights[t, k] * expert(experts, e, x[0, t], torch.from_numpy(kept), name)
    slim = prune(model, plan).get_submodule(block.owner)
    with torch.no_grad():
        found = slim(x)
    found = found[0] if isinstance(found, tuple) else found
    assert torch.allclose(found[0], wanted, atol=1e-6)  # the routers' softmax is in float32
    assert not torch.allclose(wanted, (part(x)[0] if name == "gpt_oss" else part(x))[0], atol=1e-3)


def expert(experts: Any, e: int, x: torch.Tensor, kept: torch.Tensor, name: str) -> torch.Tensor:
    """One expert for one token (H,), of whose neurons some are left."""
    if name == "gpt_oss":
        both = x @ experts.gate_up_proj[e] + experts.gate_up_proj_bias[e]
        gate, up = both[::2].clamp(max=7.0), both[1::2].clamp(-7.0, 7.0)
        hidden = (up + 1) * gate * torch.sigmoid(1.702 * gate)
        return hidden[kept] @ experts.down_proj[e][kept] + experts.down_proj_bias[e]
    gate, up = (experts.gate_up_proj[e] @ x).chunk(2)
    return experts.down_proj[e][:, kept] @ (F.silu(gate) * up)[kept]


def test_every_expert_keeps_its_own_neurons(cases: dict[str, Any]) -> None:
    model, space = cases["mixtral"]
    widths = space.widths.copy()
    whole, inner = group(space, "experts", 1), group(space, "ffn", 1)
    widths[[whole, inner]] = 3, 4
    rng = np.random.default_rng(0)
    scores = [rng.random(g.units) for g in space.groups]
    plan = make_plan(space, importance=scores, widths=widths)
    slim: Any = prune(model, plan)
    old, new = model.model.layers[1].mlp, slim.model.layers[1].mlp
    table = scores[inner].reshape(5, 16)
    best = np.sort(np.argsort(-scores[whole])[:3])
    assert torch.equal(new.gate.weight, old.gate.weight[best])
    chosen = [np.sort(np.argsort(-table[e])[:4]) for e in best]
    assert len({tuple(c) for c in chosen}) > 1
    for place, (e, units) in enumerate(zip(best, chosen, strict=True)):
        assert torch.equal(new.experts.down_proj[place], old.experts.down_proj[e][:, units])
        rows = np.concatenate([units, 16 + units])
        assert torch.equal(new.experts.gate_up_proj[place], old.experts.gate_up_proj[e][rows])
    assert (new.gate.num_experts, new.experts.num_experts, new.experts.intermediate_dim) == (3, 3, 4)
    assert (new.gate.top_k, slim.config.num_local_experts) == (2, 5)


# What is left alone, and what is refused


def test_the_router_can_always_choose() -> None:
    model = tiny_lm("mixtral")
    space = rlprune.trace(model, tokens(), drop=True, verify=False)
    index = group(space, "experts", 0)
    assert space.minimums[index] == space.groups[index].lowest == 2
    widths = space.widths.copy()
    widths[index] = 1
    with pytest.raises(BudgetError, match=r"width 1 of group 'model.layers.0.mlp.gate'; allowed: 2 to 5"):
        make_plan(space, importance=[np.arange(g.units) for g in space.groups], widths=widths)
    rounded = space.with_rounding(8, 8)
    assert (rounded.groups[index].step, rounded.groups[index].minimum) == (1, 2)
    busy = rlprune.trace(tiny_lm("mixtral", num_experts_per_tok=5), tokens(), verify=False)
    assert busy.protected["model.layers.0.mlp.gate"] == "its router sends every token to all 5 experts"
    assert "experts" not in {g.kind for g in busy.groups}


def test_ignored_parts_stay() -> None:
    space = rlprune.trace(tiny_lm("mixtral"), tokens(), ignore=["*.0.mlp.gate", "*.1.mlp.experts", "*.2.mlp"])
    names = [g.name for g in space.groups if g.kind != "attention"]
    assert names == ["model.layers.0.mlp.experts", "model.layers.1.mlp.gate"]
    assert space.groups[1].lane_group == ""


def test_a_dense_block_between_mixtures_is_a_plain_one() -> None:
    space = rlprune.trace(tiny_lm("qwen3_moe"), tokens(), verify=False)
    kinds = [[(g.kind, g.width, g.lanes) for g in space.groups if g.block == b] for b in range(2)]
    assert kinds[0] == [("attention", 3, 1), ("experts", 6, 1), ("ffn", 16, 6)]
    assert kinds[1] == [("attention", 3, 1), ("ffn", 40, 1)]


def test_widths_that_torch_cannot_multiply_at_once_run_one_by_one() -> None:
    """torch's grouped product wants rows of whole 16 bytes, and models of other widths have to run all the same."""
    model = tiny_lm("mixtral")
    space = rlprune.trace(model, tokens(), verify=False)
    widths = space.widths.copy()
    places = [group(space, "ffn", b) for b in range(3)]
    widths[places] = 8, 7, 16
    plan = make_plan(space, importance=[np.arange(g.units) for g in space.groups], widths=widths)
    for dtype in (torch.float32, torch.bfloat16):
        slim: Any = prune(model, plan, dtype=dtype)
        own = [layer.mlp.experts.config._experts_implementation for layer in slim.model.layers]
        assert own == ["grouped_mm", "eager", "grouped_mm"]
        assert logits(slim, tokens()).isfinite().all()
    assert model.config._experts_implementation == "grouped_mm"


def test_refusals_are_one_line() -> None:
    with pytest.raises(GraphError, match=r"prune.hidden: MixtralForCausalLM is a mixture of experts"):
        rlprune.trace(tiny_lm("mixtral"), tokens(), hidden=True)
    model = tiny_lm("mixtral")
    model.model.layers[1].mlp.experts.scale = torch.nn.Parameter(torch.ones(5))
    with pytest.raises(GraphError, match=r"'model.layers.1.mlp.experts' .* tensor 'scale' is not known"):
        rlprune.trace(model, tokens())
    model = tiny_lm("mixtral")
    del model.model.layers[0].mlp.gate.top_k, model.model.layers[0].mlp.top_k
    with pytest.raises(GraphError, match=r"'model.layers.0.mlp.gate' .* and a top_k") as caught:
        rlprune.trace(model, tokens())
    assert "\n" not in str(caught.value)


def test_a_router_that_looks_at_all_experts_is_refused_by_the_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that every expert's score has a part in are others when experts are gone."""
    from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

    def forward(self: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        scores = F.linear(hidden, self.weight)
        weights, chosen = scores.sigmoid().topk(self.top_k, dim=-1)
        return scores, weights / scores.sigmoid().mean(dim=-1, keepdim=True), chosen

    monkeypatch.setattr(MixtralTopKRouter, "forward", forward)
    with pytest.raises(GraphError, match="cutting it is not exact"):
        rlprune.trace(tiny_lm("mixtral"), tokens())


def test_sizes_that_do_not_fit_are_refused() -> None:
    model = tiny_lm("mixtral")
    sizes = layer_sizes(model)
    sizes[1] |= {"num_local_experts": 1}
    with pytest.raises(
        families.UnsupportedModel, match=r"per_layer_config\[1\].num_local_experts: 1; allowed: 2 to 5"
    ):
        resize(model, sizes)


def test_two_plans_are_one() -> None:
    model = tiny_lm("qwen2_moe", dtype=torch.float64)
    space = rlprune.trace(model, tokens(), drop=True, verify=False)
    first = random_plan(space, np.random.default_rng(2))
    slim = prune(model, first)
    left = space.after(first.kept)
    second = random_plan(left, np.random.default_rng(5))
    kept = tuple(before[now] for before, now in zip(first.kept, second.kept, strict=True))
    at_once = prune(model, Plan(space, second.widths, kept))
    assert left.dense_cost("macs") == space.cost(first.widths, "macs")
    assert torch.equal(logits(at_once, tokens()), logits(prune(slim, second), tokens()))
