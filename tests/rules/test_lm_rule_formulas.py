"""Each rule of language models against a plain reading of its formula, on blocks made by hand."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from helpers.lm import tokens
from helpers.toy_blocks import absolute, toy, widths, with_measured, with_statistics
from rlprune import rules
from rlprune.errors import ConfigError
from rlprune.rules.alpha_pruning import block_factors, tail_exponent
from rlprune.rules.fisher import hull
from rlprune.rules.owl import block_shares
from rlprune.rules.saap import chunks, stability
from rlprune.rules.threshold import mean_share
from rlprune.rules.two_ssp import attention_count
from rlprune.workloads import Workload


@pytest.mark.parametrize("budget", [0.9, 0.75, 0.55])
def test_flap_cuts_the_lowest_of_the_pool(budget: float) -> None:
    context = replace(with_statistics(toy(), np.zeros(4)), budget=budget)
    moments = context.statistics().inputs
    pool: list[tuple[float, int, float]] = []  # standardised score, group, parameters
    for b in range(4):
        for g, (part, name) in enumerate((("self_attn", "o_proj"), ("mlp", "down_proj"))):
            module = f"layers.{b}.{part}.{name}"
            w = context.model.get_parameter(f"{module}.weight").tolist()
            variance = moments[module].variance
            raw = [variance[j] * sum(row[j] ** 2 for row in w) for j in range(len(variance))]
            raw = [r**2 for r in raw] if part == "self_attn" else raw
            mean, spread = statistics.mean(raw), statistics.stdev(raw)
            z = [(r - mean) / spread for r in raw]
            if part == "self_attn":
                pool += [((z[0] + z[1]) / 2, 2 * b, 16.0), ((z[2] + z[3]) / 2, 2 * b, 16.0)]
            else:
                pool += [(s, 2 * b + g, 8.0) for s in z]
    left, kept, cost = context.space.target(budget, "params"), [2, 6] * 4, 100.0 + 4 * (32 + 48)
    for _, g, price in sorted(pool):
        if cost <= left:
            break
        if kept[g] > 1:
            kept[g], cost = kept[g] - 1, cost - price
    assert np.allclose(rules.flap(context), 1 - np.array(kept) / ([2, 6] * 4))


def test_adapt_pruner_follows_its_recursion() -> None:
    context = with_statistics(toy(neurons=100, heads=4), [0.9, 0.99, 0.8, 0.95])
    mean = (0.9 + 0.99 + 0.8 + 0.95) / 4
    centred = [-c + mean for c in (0.9, 0.99, 0.8, 0.95)]
    scores = [c / max(abs(x) for x in centred) for c in centred]
    assert max(scores) == 1.0  # the block with the lowest cosine
    shares = [0.0] * 4
    for step in range(1, 40):
        shares = [min(max(s + 1 / 50 - 0.02 * i, 0.0), 0.99) for s, i in zip(shares, scores, strict=True)]
        if step in (3, 20):
            cut = np.repeat(shares, 2)
            cut = np.minimum(cut, 1 - 1 / context.space.widths)
            cost = context.space.cost((1 - cut) * context.space.widths, "params")
            found = rules.adapt_pruner(absolute(context, cost))
            assert np.allclose(found, np.repeat(shares, 2), atol=1e-9)
    assert found[4] == 0  # the most important block is never cut


def test_owl_is_the_papers_band() -> None:
    context = with_statistics(toy(neurons=60, heads=4), np.zeros(4), seed=3)
    moments = context.statistics().inputs
    outliers = []
    for b in range(4):
        values = []
        for module in (f"layers.{b}.self_attn.o_proj", f"layers.{b}.mlp.down_proj"):
            w = context.model.get_parameter(f"{module}.weight").tolist()
            norms = [math.sqrt(s) for s in moments[module].second]
            values += [abs(row[j]) * norms[j] for row in w for j in range(len(norms))]
        limit = 5 * sum(values) / len(values)
        outliers.append(sum(v > limit for v in values) / len(values))
    assert len(set(outliers)) > 1
    p = mean_share(context)
    kept = [(o - min(outliers)) / (max(outliers) - min(outliers)) * 0.16 for o in outliers]
    kept = [k - sum(kept) / 4 + (1 - p) for k in kept]
    assert np.allclose(rules.owl(context), np.repeat([1 - k for k in kept], 2))


@given(st.lists(st.floats(0, 1), min_size=2, max_size=9), st.floats(0.2, 0.8))
def test_owl_shares_have_mean_p(outliers: list[float], p: float) -> None:
    shares = block_shares(np.array(outliers), p)
    assert shares.mean() == pytest.approx(p)
    assert np.ptp(shares) <= 0.16 + 1e-12
    assert shares[int(np.argmax(outliers))] == shares.min()


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 8), st.integers(2, 8), st.integers(0, 1000))
def test_tail_exponent_is_hills_estimate(rows: int, columns: int, seed: int) -> None:
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    values = sorted(float(s) ** 2 for s in torch.linalg.svdvals(matrix))
    n, k = len(values), len(values) // 2
    expected = 1 + k / sum(math.log(values[n - i] / values[n - k - 1]) for i in range(1, k + 1))
    assert tail_exponent(matrix) == pytest.approx(expected, rel=1e-3)


def test_alpha_pruning_cuts_light_tails_more() -> None:
    context = replace(toy(blocks=3, neurons=16, heads=8, head_dim=2, size=16), budget=0.75)
    with torch.no_grad():
        for b, power in enumerate((0.1, 1.0, 2.0)):  # spectra 1 / i^power: the higher, the heavier the tail
            for name, p in context.model.named_parameters():
                if name.startswith(f"layers.{b}."):
                    left, right = (torch.linalg.qr(torch.randn(16, 16))[0] for _ in range(2))
                    p.copy_((left * torch.arange(1, 17.0) ** -power) @ right)
    found = rules.alpha_pruning(context)
    assert np.array_equal(found[::2], found[1::2])
    assert found[0] > found[2] > found[4]
    assert found.mean() == pytest.approx(mean_share(context))
    assert np.allclose(block_factors(np.array([2.0, 4.0, 3.0])), [0.7, 1.3, 1.0])
    assert np.array_equal(block_factors(np.full(3, 2.0)), np.ones(3))


@pytest.mark.parametrize("drop", [True, False])
def test_shortgpt_removes_whole_blocks(drop: bool) -> None:
    context = with_statistics(toy(drop=drop), [0.9, 0.99, 0.8, 0.95])
    least = [0, 0] if drop else [1, 1]
    after_two = [2, 6, *least, 2, 6, *least]
    cost = context.space.cost(np.array(after_two), "params")
    assert widths(absolute(context, cost), "shortgpt") == after_two
    # With room for a head and three neurons more, the second block comes back in part, the first one not at all.
    found = widths(absolute(context, cost + 16 + 3 * 8), "shortgpt")
    assert found[:6] == after_two[:6]
    assert context.space.cost(np.array(found), "params") == cost + 40
    assert found[6] + found[7] > sum(least)


@given(st.floats(0.32, 0.99), st.booleans())
@settings(max_examples=40, deadline=None)
def test_shortgpt_touches_a_block_only_when_those_before_it_are_gone(budget: float, drop: bool) -> None:
    context = replace(with_statistics(toy(neurons=40, drop=drop), [0.9, 0.99, 0.8, 0.95]), budget=budget)
    if budget * context.space.dense_cost("params") < context.space.feasible("params")[0]:
        return
    found = np.array(widths(context, "shortgpt")).reshape(4, 2)[[1, 3, 0, 2]]
    dense = np.array([2, 40])
    touched = [b for b in range(4) if (found[b] < dense).any()]
    assert touched == list(range(len(touched)))
    for b in touched[:-1]:
        assert (found[b] <= (0 if drop else 1) + np.array([0, 1])).all()


def test_llm_pruner_spares_the_ends() -> None:
    full = rules.llm_pruner(toy(blocks=32))
    assert np.flatnonzero(full[::2]).tolist() == list(range(4, 30))
    assert np.array_equal(full[::2], full[1::2])
    neurons = rules.llm_pruner_ffn(toy(blocks=32))
    assert np.array_equal(neurons[1::2], full[1::2])
    assert not neurons[::2].any()
    assert np.flatnonzero(rules.llm_pruner(toy(blocks=30))[::2]).tolist() == list(range(4, 28))
    assert rules.llm_pruner(toy(blocks=1)).all()


def test_feed_forward_only_rules_on_a_cache_budget() -> None:
    context = absolute(toy(blocks=4), 0.75 * 4 * 16, "kv_cache")
    for name in ("ffn_uniform", "uniform", "llm_pruner_ffn"):
        found = widths(context, name)
        assert found[1::2] == [6] * 4
        assert context.space.cost(np.array(found), "kv_cache") <= 48
    assert rules.ffn_uniform(toy()).tolist() == [0, 1] * 4
    # Budgets that neurons alone cannot meet take the rest from the heads.
    found = widths(absolute(toy(), 100 + 4 * (16 + 8)), "ffn_uniform")
    assert found == [1, 1] * 4


class Sum(Workload):
    """The loss is the squared distance of the Toy's output from the dense one."""

    name = "sum"

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.example_inputs = tokens(4)
        self.dense = model(self.example_inputs).item()

    def batches(self, split: str, limit: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        assert split == "calibration"
        yield tokens(4), tokens(4)

    def loss(self, outputs: Any, targets: Tensor) -> Tensor:
        return (outputs - self.dense) ** 2


def test_two_ssp_drops_attentions_greedily_and_shares_the_rest() -> None:
    context = toy(blocks=4, heads=2, head_dim=4, neurons=20, drop=True)
    with torch.no_grad():
        for b, effect in enumerate((3.0, -3.1, 1.0, 5.0)):
            context.model.get_parameter(f"layers.{b}.self_attn.o_proj.weight").fill_(effect / 32)
    workload = Sum(context.model)
    # 160 parameters of neurons over 64 of attention: 4 p^((160/64)/1.5) attentions.
    context = replace(context, workload=workload, budget=1 - 0.6 * 4 * 224 / (100 + 4 * 224))
    p = mean_share(context)
    assert p == pytest.approx(0.6)
    count = round(4 * 0.6 ** ((160 / 64) / 1.5))
    assert count == 2
    assert attention_count(context, p) == count
    found = widths(context, "two_ssp")
    # First the smallest effect (1.0); then 1.0 - 3.1 is nearer to nothing than 1.0 + 3.0.
    assert found[::2] == [2, 0, 0, 2]
    target = context.space.target(context.budget, "params")
    assert max(found[1::2]) - min(found[1::2]) <= 1
    assert target - 8 < context.space.cost(np.array(found), "params") <= target


def test_two_ssp_takes_more_attentions_where_neurons_save_nothing() -> None:
    context = toy(drop=True)
    context = absolute(replace(context, workload=Sum(context.model)), 2 * 16, "kv_cache")
    found = widths(context, "two_ssp")
    assert sorted(found[::2]) == [0, 0, 2, 2]
    assert found[1::2] == [6] * 4


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.35, 0.95))
def test_fisher_is_no_worse_than_any_plan(seed: int, budget: float) -> None:
    """On convex curves the rule's real-valued widths have the least sum of errors: checked against all plans."""
    context = toy(blocks=2, heads=2, neurons=5, drop=True)
    random = np.random.default_rng(seed)
    space = context.space
    curves = {}
    for g, group in enumerate(space.groups):
        steps = np.sort(random.gamma(0.3, 1.0, group.width))
        curves[g] = np.concatenate([[0.0], np.cumsum(steps) / steps.sum()])
    if budget * space.dense_cost("params") < 100:
        return
    context = with_measured(replace(context, budget=budget), "fisher", curves)
    cut = rules.fisher(context) * space.widths
    target = space.target(budget, "params")
    assert space.cost(space.widths - cut, "params") == pytest.approx(target)
    own = sum(np.interp(cut[g], np.arange(len(c)), c) for g, c in curves.items())
    best = min(
        sum(float(curves[g][space.widths[g] - w]) for g, w in enumerate(plan))
        for plan in itertools.product(*(range(w + 1) for w in space.widths))
        if space.cost(np.array(plan), "params") <= target
    )
    assert own <= best + 1e-9


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_hull_lies_under_the_curve(values: list[float]) -> None:
    curve = np.sort(np.array([0.0, *values]))
    lengths, slopes = hull(curve)
    assert sum(lengths) == len(curve) - 1
    assert all(a < b or math.isclose(a, b) for a, b in itertools.pairwise(slopes))
    corners = np.concatenate([[0], np.cumsum(lengths)])
    line = np.interp(np.arange(len(curve)), corners, curve[corners])
    assert (line <= curve + 1e-12).all()


def test_saap_ranks_by_mean_over_deviation() -> None:
    scores = np.array([[1.0, 2.0, 0.0], [3.0, 2.0, 0.0], [2.0, 2.0, 0.0]])
    found = stability(scores)
    assert found[0] == pytest.approx(2.0 / statistics.pstdev([1, 3, 2]))
    assert found[1] > 1e6
    assert found[2] == 0
    ids = torch.arange(11)[:, None]
    parts = list(chunks(iter([(ids[:6], ids[:6]), (ids[6:], ids[6:])])))
    assert len(parts) == 8
    assert torch.equal(torch.cat([p[0] for p in parts]), ids)
    assert all(torch.equal(a, b) for a, b in parts)


def test_rules_that_need_the_blocks_say_so() -> None:
    context = with_statistics(toy(), [])
    with pytest.raises(ConfigError, match="not known for this model"):
        rules.shortgpt(context)
