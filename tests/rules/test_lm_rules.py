"""The rules of language models: one contract on several families, what is measured, and groups left empty."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.lm import tiny_lm, tokens
from helpers.toy_blocks import Nothing
from rlprune import rules
from rlprune.api import trace
from rlprune.errors import BudgetError, DataError
from rlprune.importance import importance
from rlprune.rules import RULES, Context
from rlprune.rules.saap import chunks, stability
from rlprune.workloads import Workload

LANGUAGE = sorted(n for n, r in RULES.items() if r.wing == "language")


class Words(Workload):
    """Random token sequences; the test split must never be asked for."""

    name = "words"

    def __init__(self, model: nn.Module, count: int = 12) -> None:
        self.model = model
        self.example_inputs = tokens(8)
        self.splits = {
            s: tokens(8, count, seed) for seed, s in enumerate(("train", "calibration", "validation"))
        }

    def batches(self, split: str, limit: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        ids = self.splits[split][:limit]
        yield from zip(ids.split(5), ids.split(5), strict=True)

    def loss(self, outputs: Any, targets: Tensor) -> Tensor:
        logits = outputs.logits[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), targets[:, 1:].flatten())

    def metric(self, outputs: Any, targets: Tensor) -> Tensor:
        return torch.zeros(())


VARIANTS = {
    "llama": ("llama", {}),
    "llama-drop": ("llama", {"drop": True}),
    "llama-no-attention": ("llama", {"ignore": ("*.self_attn",)}),
    "llama-no-ffn-0": ("llama", {"ignore": ("model.layers.0.mlp", "model.layers.2")}),
    "llama-hidden": ("llama", {"hidden": True}),
    "llama-rounded": ("llama", {"round_to": 8, "minimum": 8}),
    "gpt2": ("gpt2", {"drop": True}),
    "gpt_neox": ("gpt_neox", {}),
    "llama-mqa": ("llama-mqa", {}),
}


@pytest.fixture(scope="module", params=sorted(VARIANTS))
def context(request: pytest.FixtureRequest) -> Context:
    torch.set_num_threads(1)
    name, arguments = VARIANTS[request.param]
    model = tiny_lm(name)
    workload = Words(model)
    space = trace(model, workload.example_inputs, verify=False, **arguments)
    scores = importance.magnitude(model, space)
    return Context(space, model, scores, 0.8, metric="block_params", workload=workload)


def between(context: Context, metric: str, share: float) -> Context:
    """The context with a budget that takes ``share`` of what can be taken."""
    low, high = context.space.feasible(metric)
    ratio = (high - share * (high - low)) / high
    return replace(context, metric=metric, budget=min(max(ratio, low / high * (1 + 1e-12), 1e-6), 1.0))


class TestContract:
    """What every rule promises on every language model; a new rule is tested by being registered."""

    pytestmark = pytest.mark.parametrize("name", sorted(n for n, r in RULES.items() if not r.external))

    @pytest.mark.parametrize("metric", ["params", "block_params", "macs", "kv_cache"])
    def test_distribution(self, context: Context, name: str, metric: str) -> None:
        for share in (0.0, 0.15, 0.6, 1.0):
            here = between(context, metric, share)
            if RULES[name].probes:
                here = replace(here, probe=lambda widths: float(-widths.sum()))
            distribution = RULES[name].function(here)
            space = here.space
            assert distribution.shape == (len(space.groups),)
            assert distribution.dtype == np.float64
            assert np.isfinite(distribution).all()
            assert (distribution >= 0).all()
            assert distribution.any()
            widths = space.project(distribution, here.budget, metric)
            assert space.cost(widths, metric) <= space.target(here.budget, metric)
            if share < 1.0:  # the very last unit may need the groups that nobody wants to cut
                assert (distribution[~here.active] == 0).all()
                assert np.array_equal(widths[~here.active], space.widths[~here.active])

    def test_deterministic_and_without_effect_on_the_model(self, context: Context, name: str) -> None:
        before = {n: t.clone() for n, t in context.model.state_dict().items()}
        first = RULES[name].function(replace(context, calibration=None))
        torch.manual_seed(123)
        np.random.seed(5)
        assert np.array_equal(first, RULES[name].function(replace(context, calibration=None)))
        assert np.array_equal(first, RULES[name].function(context))
        assert all(torch.equal(before[n], t) for n, t in context.model.state_dict().items())
        assert all(p.grad is None for p in context.model.parameters())
        assert not context.model.training
        assert not any(m._forward_pre_hooks or m._forward_hooks for m in context.model.modules())

    def test_says_what_it_reads(self, context: Context, name: str) -> None:
        found = RULES[name]
        assert found.summary
        assert "arXiv" in (found.function.__doc__ or "") or name in ("uniform", "ffn_uniform")
        assert (name in rules.rules_for(context.space)) != found.on_request
        bare = replace(context, workload=None, calibration=None)
        if found.needs_workload:
            with pytest.raises(DataError, match=name):
                found.function(bare)
        else:
            assert np.array_equal(found.function(bare), found.function(context))


def test_an_impossible_budget_is_refused(context: Context) -> None:
    low, high = context.space.feasible("block_params")
    with pytest.raises(BudgetError, match="feasible"):
        rules.flap(replace(context, budget=0.5 * low / high + 1e-6, metric="block_params"))


def test_saap_cuts_the_least_stable_structures() -> None:
    model = tiny_lm("llama")
    workload = Words(model)
    space = trace(model, workload.example_inputs, verify=False, round_to=1)  # one by one
    context = Context(space, model, importance.magnitude(model, space), 0.85, "block_params", workload)
    found = rules.saap(context)
    per_part = [
        importance.saap(model, space, [part], workload.loss)
        for part in chunks(workload.batches("calibration"))
    ]
    stable = [stability(np.stack(s)) for s in zip(*per_part, strict=True)]
    cut = np.round(found * space.widths).astype(int)
    removed = [np.sort(s)[:c] for s, c in zip(stable, cut, strict=True)]
    kept = [np.sort(s)[c:] for s, c in zip(stable, cut, strict=True)]
    threshold = max(r.max() for r in removed if len(r))
    free = space.widths - cut > space.minimums
    assert all(k.min() > threshold for k, f in zip(kept, free, strict=True) if f)


def test_slow_measurements_are_made_once() -> None:
    model = tiny_lm("llama")
    workload = Words(model)
    space = trace(model, workload.example_inputs, verify=False)
    context = Context(space, model, importance.magnitude(model, space), 0.8, "params", workload)
    for name in LANGUAGE:
        RULES[name].function(context)
    later = replace(context, budget=0.7, workload=Nothing())
    for name in LANGUAGE:
        if name != "two_ssp":  # a smaller budget may ask for one attention more
            assert np.isfinite(RULES[name].function(later)).all()


def test_sensitivity_spends_one_probe_a_group() -> None:
    model = tiny_lm("llama")
    space = trace(model, tokens(8), verify=False, hidden=True)
    probed: list[np.ndarray] = []

    def probe(widths: np.ndarray) -> float:
        probed.append(widths)
        return float((space.widths - widths).sum())

    context = Context(space, model, importance.magnitude(model, space), 0.9, "params", probe=probe)
    found = rules.sensitivity(context)
    assert len(probed) == RULES["sensitivity"].probe_count(space) == 1 + 6
    assert found[-1] == 0
    probing = {name for name, found in RULES.items() if found.probe_count(space)}
    assert probing == {"sensitivity", "fisher_probed"}


def test_after_a_stage_that_dropped_a_part() -> None:
    """Later stages meet groups of which nothing is left."""
    model = tiny_lm("llama")
    space = trace(model, tokens(8), verify=False, drop=True)
    kept = [np.arange(w) for w in space.widths]
    kept[0] = kept[3] = np.arange(0)
    left = space.after(tuple(kept))
    scores = [s[k] for s, k in zip(importance.magnitude(model, space), kept, strict=True)]
    context = Context(left, model, scores, 0.8, "params")
    for name in ("uniform", "lamp", "shallow", "ffn_uniform", "llm_pruner", "erk"):
        found = RULES[name].function(context)
        assert np.isfinite(found).all()
        result = left.project(found, 0.8, "params")
        assert result[0] == result[3] == 0
