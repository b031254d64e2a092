"""The lowest budgets of a space, and the protected layers that keep them from being lower."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import nn

import rlprune
from helpers.lm import tiny_lm
from rlprune.pruning import NarrowSpaceWarning, ProtectedShare
from rlprune.pruning.cost_terms import OUTSIDE, formulas, narrow_lines


def net() -> nn.Module:
    """Three convolutions of 3 -> 8 -> 8 -> 4 channels over 6 x 6 pixels; the last is the output."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1))


IMAGE = torch.zeros(2, 3, 6, 6)


def test_lowest_is_the_cost_at_the_smallest_widths() -> None:
    space = rlprune.trace(net(), IMAGE)
    assert space.lowest("macs") == space.cost(space.minimums) / space.dense_cost()
    # Widths of 1 and 1: 3 * 9, 1 and 4 products for each of 36 pixels, of 8 * 27, 8 * 8 and 8 * 4.
    assert space.lowest("macs") == (27 + 1 + 4) / (216 + 64 + 32)
    assert space.with_rounding(round_to=8).lowest("macs") == 1.0


def test_terms_add_up_to_the_costs_at_all_widths() -> None:
    space = rlprune.trace(net(), IMAGE)
    built = formulas(space.terms, space.axis_sizes(), len(space.groups))
    for widths in (space.widths, space.minimums, [3, 5]):
        assert {m: float(f(widths)) for m, f in built.items()} == {
            m: space.cost(widths, m) for m in ("macs", "params")
        }


def test_shares_are_those_of_the_protected_layers_at_the_smallest_widths() -> None:
    with pytest.warns(NarrowSpaceWarning) as caught:
        space = rlprune.trace(net(), IMAGE, ignore=["0"])
    # The first layer stays whole, the second keeps 8 inputs and one output, the last one input.
    assert space.protected_shares("macs") == (
        ProtectedShare("0", 216 / 312, "ignored by '0'"),
        ProtectedShare("3", 4 / 312, "output of the model"),
    )
    assert space.protected_shares("params")[0].share == (216 + 8) / (216 + 8 + 64 + 8 + 32 + 4)
    assert [str(w.message) for w in caught] == narrow_lines(space)
    assert narrow_lines(space)[0] == (
        f"the lowest budget of macs is {228 / 312:.4f} of the dense model; of it are protected: "
        "0 69.2% (ignored by '0'); 3 1.3% (output of the model)"
    )
    with pytest.raises(rlprune.BudgetError, match=r"0 alone keeps 69.2%: ignored by '0'"):
        space.target(0.5)


def test_a_space_that_reaches_half_warns_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert narrow_lines(rlprune.trace(net(), IMAGE)) == []


def test_layers_of_one_kind_are_told_together() -> None:
    model = nn.Sequential(*(nn.Conv2d(4, 4, 1) for _ in range(6)))
    with pytest.warns(NarrowSpaceWarning):
        space = rlprune.trace(model, torch.zeros(1, 4, 2, 2), ignore=["1", "2", "3", "4"])
    (line, _) = narrow_lines(space)
    # Layer 1 reads one channel of layer 0, the others four: 4 + 3 * 16 of 6 * 16 products a pixel.
    assert "* (4 layers) 54.2% (ignored by '2'); 5 16.7% (output of the model)" in line


class Products(nn.Module):
    """A product that belongs to no layer, beside one layer that can be cut."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x @ x.transpose(1, 2) @ x))


def test_what_belongs_to_no_layer_is_told_as_well() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NarrowSpaceWarning)
        space = rlprune.trace(Products(), torch.zeros(1, 20, 4))
    first = space.protected_shares("macs")[0]
    assert first.name == OUTSIDE
    assert math.isclose(first.share, 2 * 20 * 20 * 4 / (2 * 20 * 20 * 4 + 2 * 20 * 4 * 6))


class Scaled(nn.Module):
    """A pair of layers and a parameter of the model's own, which no group reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(4))
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x + self.bias))


def test_a_parameter_that_no_group_reaches_is_told() -> None:
    space = rlprune.trace(Scaled(), torch.zeros(1, 4))
    assert ProtectedShare("bias", 4 / (4 + 30 + 28), "no group reaches it") in space.protected_shares(
        "params"
    )


def test_terms_of_a_language_model_add_up_and_name_what_stays() -> None:
    model = tiny_lm(vocab_size=2048)
    with pytest.warns(NarrowSpaceWarning, match="embed_tokens"):
        space = rlprune.trace(model, torch.zeros(1, 8, dtype=torch.long))
    built = formulas(space.terms, space.axis_sizes(), len(space.groups))
    for widths in (space.widths, space.minimums):
        assert {m: float(f(widths)) for m, f in built.items()} == {
            m: space.cost(widths, m) for m in ("macs", "params")
        }
    shares = {part.name: part.share for part in space.protected_shares("params")}
    assert shares["model.embed_tokens"] == 2048 * model.config.hidden_size / space.dense_cost("params")
