"""One contract for the language-model families: exact cuts, exact costs, and generation that still works."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import rlprune
from helpers.lm import VARIANTS, tiny_config, tiny_lm, tokens
from rlprune.language import families
from rlprune.language.dropped import DroppedAttention, DroppedFeedForward
from rlprune.language.linear import is_dropped
from rlprune.language.proof import counted, difference, random_plan, skeleton
from rlprune.language.sizes import hidden_size, layer_sizes, resize
from rlprune.pruning.plan import Plan
from rlprune.pruning.space import PruningSpace
from rlprune.pruning.surgery import attributes, axis_indices, dropped, masked, prune

# Their attention is one unit: kept, or dropped whole.
WHOLE = {"llama-mqa", "bloom", "falcon-mqa", "olmo2", "olmo3"}
LENGTH = 12


def plan_of(space: PruningSpace, widths: dict[str, int], seed: int = 0) -> Plan:
    """Random units; the widths of the named groups, all of the others."""
    rng = np.random.default_rng(seed)
    chosen = np.array([widths.get(g.name, g.width) for g in space.groups])
    kept = tuple(
        np.sort(rng.permutation(g.width)[:w]) for g, w in zip(space.groups, chosen.tolist(), strict=True)
    )
    return Plan(space, chosen, kept)


def groups_of(space: PruningSpace, kind: str) -> list[str]:
    return [g.name for g in space.groups if g.kind == kind]


def logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def largest_difference(model: torch.nn.Module, plan: Plan, ids: torch.Tensor) -> float:
    wanted = logits(masked(model, plan), ids)
    return float((logits(prune(model, plan), ids) - wanted).abs().max() / wanted.abs().max())


@pytest.fixture(scope="module")
def cases() -> dict[str, tuple[torch.nn.Module, PruningSpace]]:
    """Each variant's model in float64 and its space with dropping allowed, made when first asked for."""
    return {}


def case(cases: dict[str, Any], name: str) -> tuple[torch.nn.Module, PruningSpace]:
    if name not in cases:
        model = tiny_lm(name, dtype=torch.float64)
        cases[name] = (model, rlprune.trace(model, tokens(LENGTH), drop=True, verify=False))
    return cases[name]


def emptied(space: PruningSpace, plan: Plan) -> set[str]:
    """Names of the tensors of which a plan leaves nothing."""
    indices = axis_indices(space, plan.kept)
    return {c.tensor for c in space.cuts if (i := indices[c.axis]) is not None and not len(i)}


@pytest.mark.parametrize("name", VARIANTS)
class TestContract:
    @given(seed=st.integers(0, 2**32 - 1))
    @settings(
        max_examples=6,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )
    def test_cut_equals_masked_and_costs_are_exact(self, cases: dict[str, Any], name: str, seed: int) -> None:
        model, space = case(cases, name)
        plan = random_plan(space, np.random.default_rng(seed))
        ids = tokens(LENGTH, batch=2, seed=seed % 1000)
        assert largest_difference(model, plan, ids) < 1e-9
        slim = prune(model, plan)
        assert counted(slim, ids[:1])[1] == space.cost(plan.widths, "macs")
        assert sum(p.numel() for p in slim.parameters()) == space.cost(plan.widths, "params")
        stem = families.family_of(model).blocks + "."
        inside = sum(p.numel() for n, p in slim.named_parameters() if n.startswith(stem))
        assert inside == space.cost(plan.widths, "block_params")

    def test_cache_holds_what_the_cost_says(self, cases: dict[str, Any], name: str) -> None:
        model, space = case(cases, name)
        # Sliding windows hold no more than the window: a context inside it.
        ids = tokens(6)
        for seed in range(3):
            plan = random_plan(space, np.random.default_rng(seed))
            with torch.no_grad():
                cache = prune(model, plan)(input_ids=ids, use_cache=True).past_key_values
            held = sum(t.numel() for layer in cache.layers for t in (layer.keys, layer.values))
            assert 2 * held == space.cost(plan.widths, "kv_cache") * ids.shape[1]
            assert cache.get_seq_length() == ids.shape[1]

    def test_generates_the_same_with_and_without_cache(self, cases: dict[str, Any], name: str) -> None:
        model, space = case(cases, name)
        attention, ffn = groups_of(space, "attention"), groups_of(space, "ffn")
        plans = [
            random_plan(space, np.random.default_rng(0)),
            plan_of(space, {attention[0]: 0}),  # positions are counted by the first layer's cache
            plan_of(space, {ffn[1]: 0, attention[-1]: 0}),
            plan_of(space, {attention[1]: 0, ffn[1]: 0}),  # a whole block
            plan_of(space, dict.fromkeys(attention, 0)),
        ]
        ids = tokens(6, batch=2)
        for plan in plans:
            slim = prune(model, plan)
            with torch.no_grad():
                cached, plain = (
                    slim.generate(ids, max_new_tokens=10, do_sample=False, use_cache=use, pad_token_id=0)
                    for use in (True, False)
                )
            assert torch.equal(cached, plain)
            assert plain.shape == (2, 16)

    def test_names_ties_and_the_dense_model_stay(self, cases: dict[str, Any], name: str) -> None:
        model, space = case(cases, name)
        before = copy.deepcopy(model.state_dict())
        sizes = layer_sizes(model)
        for plan in (
            random_plan(space, np.random.default_rng(1)),
            plan_of(space, {g.name: 0 for g in space.groups}),
        ):
            slim = prune(model, plan)
            gone = emptied(space, plan)
            assert list(slim.state_dict()) == [n for n in before if n not in gone]
            assert all(tensor.numel() for tensor in slim.state_dict().values())
            assert layer_sizes(model) == sizes
            assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
            tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
            assert (slim.get_output_embeddings().weight is slim.get_input_embeddings().weight) == tied
            stubs = (DroppedAttention, DroppedFeedForward)
            found = {n for n, m in slim.named_modules() if isinstance(m, stubs)}
            assert {n for n in dropped(space, plan) if not n.endswith("fc1") or "opt" not in name} == found

    def test_resized_dense_model_takes_the_weights(self, cases: dict[str, Any], name: str) -> None:
        model, space = case(cases, name)
        for seed in (0, 1):
            plan = random_plan(space, np.random.default_rng(seed))
            slim = prune(model, plan)
            other = tiny_lm(name, seed=9, dtype=torch.float64)
            resize(other, layer_sizes(slim))
            other.load_state_dict(slim.state_dict())
            assert torch.equal(logits(other, tokens()), logits(slim, tokens()))
            for module, values in attributes(space, plan).items():
                present = dict(other.named_modules()).get(module)
                if present is not None and not is_dropped(present):
                    for attribute, value in values.items():
                        owner: Any = present
                        for part in attribute.split("."):
                            owner = getattr(owner, part)
                        assert owner == value

    def test_hidden_size_as_a_group(self, name: str) -> None:
        model = tiny_lm(name)
        space = rlprune.trace(model, tokens(LENGTH), hidden=True)
        group = space.groups[-1]
        assert (group.name, group.kind, group.block) == ("hidden", "hidden", -1)
        widths = space.widths.copy()
        widths[-1] = 20
        plan = rlprune.make_plan(space, importance=[np.arange(g.width) for g in space.groups], widths=widths)
        slim = prune(model, plan)
        assert counted(slim, tokens(LENGTH))[1] == space.cost(widths, "macs")
        assert sum(p.numel() for p in slim.parameters()) == space.cost(widths, "params")
        assert hidden_size(slim) == 20
        out = slim.generate(tokens(4), max_new_tokens=3, do_sample=False, pad_token_id=0)
        assert out.shape == (1, 7)
        other = tiny_lm(name, seed=5)
        resize(other, layer_sizes(slim), hidden_size=20)
        other.load_state_dict(slim.state_dict())
        assert torch.equal(logits(other, tokens()), logits(slim, tokens()))
        tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        assert (other.get_output_embeddings().weight is other.get_input_embeddings().weight) == tied

    def test_groups_are_in_block_order(self, name: str) -> None:
        space = rlprune.trace(tiny_lm(name), tokens(LENGTH), drop=True, round_to=8)
        assert [(g.block, g.kind) for g in space.groups] == [
            (b, kind) for b in range(3) for kind in ("attention", "ffn")
        ]
        assert [g.depth for g in space.groups] == sorted({g.depth for g in space.groups})
        for group in space.groups:
            assert group.minimum == 0
            assert group.step == (8 if group.kind == "ffn" else 1)
            assert {m.role for m in group.members} == {"out", "in"}
        assert all(g.width == 1 for g in space.groups if g.kind == "attention") == (name in WHOLE)
        plain = rlprune.trace(tiny_lm(name), tokens(LENGTH), verify=False, round_to=1)
        kinds = {g.kind for g in plain.groups}
        assert kinds == ({"ffn"} if name in WHOLE else {"attention", "ffn"})
        assert all(g.minimum == 1 for g in plain.groups)
        if name in WHOLE:
            reason = next(why for n, why in plain.protected.items() if "att" in n)
            assert "dropped whole (prune.drop)" in reason

    def test_skeleton_proves_the_family(self, name: str) -> None:
        narrow = skeleton(tiny_config(name)).double()
        space = rlprune.trace(narrow, tokens(LENGTH), drop=True, verify=False)
        assert len(space.groups) == 4
        plan = random_plan(space, np.random.default_rng(0))
        assert difference(narrow, tokens(LENGTH), plan) is None
