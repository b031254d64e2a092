"""FLAP's structures AL-MM and UL-MM, and its metrics in the pool, against a plain reading of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from helpers.toy_blocks import toy, with_statistics
from rlprune import rules
from rlprune.rules import Context
from rlprune.rules.threshold import mean_share

HEADS, NEURONS, BLOCKS = 8, 20, 4
HEAD_PRICE, NEURON_PRICE = 16.0, 8.0  # parameters of a unit of `toy`


def context(budget: float) -> Context:
    made = with_statistics(toy(heads=HEADS, neurons=NEURONS), np.zeros(BLOCKS), seed=5)
    return replace(made, budget=budget)


def spared(found: Context, kept: list[int]) -> float:
    """The parameters below the budget when blocks keep these heads and neurons, in turn."""
    cost = 100.0 + HEAD_PRICE * sum(kept[::2]) + NEURON_PRICE * sum(kept[1::2])
    return found.space.target(found.budget, "params") - cost


def standardised(found: Context, block: int, part: str, name: str) -> list[float]:
    """Standardised Var(X_j) * ||W_:j||^2 of one layer, squared in attention, one value a unit."""
    module = f"layers.{block}.{part}.{name}"
    w = found.model.get_parameter(f"{module}.weight").detach().double().numpy()
    raw = found.statistics().inputs[module].variance * (w**2).sum(axis=0)
    raw = raw**2 if part == "self_attn" else raw
    z = (raw - raw.mean()) / raw.std(ddof=1)
    return [float(v) for v in (z.reshape(HEADS, 2).mean(axis=1) if part == "self_attn" else z)]


def lowest_gone(scores: list[list[float]], count: int) -> list[int]:
    pool = sorted((s, b) for b, own in enumerate(scores) for s in own)[:count]
    return [max(1, len(own) - sum(b == at for _, b in pool)) for at, own in enumerate(scores)]


@pytest.mark.parametrize("budget", [0.85, 0.6])
def test_ul_mm_takes_the_same_of_all_layers(budget: float) -> None:
    found = context(budget)
    heads = HEADS - int(384 / 1024 * mean_share(found) / 0.5 * HEADS)
    fits = [n for n in range(1, NEURONS + 1) if spared(found, [heads, n] * BLOCKS) >= 0]
    assert np.allclose(1 - rules.flap_ul_mm(found), np.array([heads / HEADS, max(fits) / NEURONS] * BLOCKS))


@pytest.mark.parametrize("budget", [0.85, 0.6])
def test_al_mm_has_a_pool_of_heads_and_one_of_neurons(budget: float) -> None:
    found = context(budget)
    of_heads = [standardised(found, b, "self_attn", "o_proj") for b in range(BLOCKS)]
    of_neurons = [standardised(found, b, "mlp", "down_proj") for b in range(BLOCKS)]
    heads = lowest_gone(of_heads, round(380 / 1024 * mean_share(found) / 0.5 * HEADS * BLOCKS))
    for count in range(NEURONS * BLOCKS):
        neurons = lowest_gone(of_neurons, count)
        kept = [n for pair in zip(heads, neurons, strict=True) for n in pair]
        if spared(found, kept) >= 0:
            break
    assert len(set(neurons)) > 1, "the layers differ"
    assert np.allclose(1 - rules.flap_al_mm(found), np.array(kept) / ([HEADS, NEURONS] * BLOCKS))
