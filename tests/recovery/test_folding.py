"""Batch norms folded into convolutions: which ones, and that nothing but rounding changes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from helpers.nets import build, example
from rlprune.recovery.folding import fold, foldable_pairs


class Mixed(nn.Module):
    """Pairs that can be folded, with and without a bias, and all the ones that cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.a_norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.b, self.b_norm = nn.Conv2d(4, 4, 1, bias=False, groups=2), nn.BatchNorm2d(4, affine=False)
        self.read_twice, self.read_norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.called_twice, self.called_norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.after_relu = nn.BatchNorm2d(4)
        self.up, self.up_norm = nn.ConvTranspose2d(4, 4, 1), nn.BatchNorm2d(4)
        self.c, self.no_statistics = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.a_norm(self.a(x)))
        x = torch.relu(self.b_norm(self.b(x)))
        y = self.read_twice(x)
        x = self.read_norm(y) + y
        x = self.called_norm(self.called_twice(self.called_twice(x)))
        x = self.up_norm(self.up(self.after_relu(torch.relu(x))))
        return self.no_statistics(self.c(x))


def with_statistics(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            module.running_mean.normal_()
            module.running_var.uniform_(0.3, 2.0)
            if module.affine:
                module.weight.data.uniform_(-1.5, 1.5)
                module.bias.data.normal_()
    return model.eval()


def test_only_pairs_that_nothing_else_reads_are_folded() -> None:
    model = with_statistics(Mixed()).double()
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    pairs = foldable_pairs(model, x)
    assert pairs == [("a", "a_norm"), ("b", "b_norm")]
    folded = copy.deepcopy(model)
    fold(folded, pairs)
    assert isinstance(folded.a_norm, nn.Identity) and isinstance(folded.read_norm, nn.BatchNorm2d)
    torch.testing.assert_close(folded(x), model(x), rtol=1e-9, atol=1e-9)
    assert isinstance(model.a_norm, nn.BatchNorm2d)  # the model itself is as it was


@pytest.mark.parametrize("name", ["Residual", "cifar_resnet20"])
def test_networks_compute_the_same_in_float64(name: str) -> None:
    model = with_statistics(build(name)).double()
    x = example(torch.float64)
    pairs = foldable_pairs(model, x)
    assert pairs
    folded = copy.deepcopy(model)
    fold(folded, pairs)
    with torch.no_grad():
        torch.testing.assert_close(folded(x), model(x), rtol=1e-9, atol=1e-10)


class Forked(nn.Module):
    """A model that torch.fx cannot follow."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.a(x)) if float(x.sum()) > 0 else self.a(x)


class Watched(Forked):
    """One whose norm does more than it says: the proof on the example finds it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.a(x))


def test_what_cannot_be_followed_or_proved_is_left_alone() -> None:
    x = torch.ones(1, 3, 6, 6)
    assert foldable_pairs(with_statistics(Forked()), x) == []
    model = with_statistics(Watched())
    assert foldable_pairs(model, x) == [("a", "norm")]
    model.norm.register_forward_hook(lambda module, inputs, output: output.abs() + 1)
    assert foldable_pairs(model, x) == []
