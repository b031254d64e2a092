"""Modules that are not made of torch's plain layers: one line each, with what to do; frozen ones and fx graphs work."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, weight_norm

import rlprune


def plain() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).eval()


def with_first(change: Callable[[nn.Module], object]) -> nn.Module:
    model = plain()
    changed = change(model[0])
    if isinstance(changed, nn.Module):
        model[0] = changed
    return model


def _sparse(layer: nn.Module) -> None:
    layer.weight = nn.Parameter(layer.weight.detach().to_sparse(), requires_grad=False)


def _quantised(layer: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about the future of these modules
        return torch.ao.nn.quantized.dynamic.Linear(4, 6)


MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "weight norm": (lambda: with_first(parametrizations.weight_norm), "is parametrized.*remove_parametrizations"),
    "spectral norm": (lambda: with_first(parametrizations.spectral_norm), "'0': its weight is parametrized"),
    "old weight norm": (lambda: with_first(weight_norm), r"recomputed by WeightNorm.*remove_weight_norm\(module\)"),
    "mask": (lambda: with_first(lambda m: prune.l1_unstructured(m, "weight", 0.5)), "masked by torch.nn.utils.prune"),
    "traced": (lambda: torch.jit.trace(plain(), torch.zeros(1, 4)), "a program of TorchScript.*it was made from"),
    "scripted part": (lambda: with_first(torch.jit.script), "'0': is a program of TorchScript"),
    "compiled": (lambda: torch.compile(plain()), "torch.compile.*_orig_mod"),
    "lazy": (lambda: with_first(lambda m: nn.LazyLinear(6)), "'0.weight': has no size yet: run the model once"),
    "meta": (lambda: plain().to("meta"), "'0.weight': is on the meta device"),
    "sparse": (lambda: with_first(_sparse), "'0.weight': is sparse.*to_dense"),
    "quantised": (lambda: with_first(_quantised), "'0': Linear is quantised: prune the float model"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODELS)
def test_one_line_that_says_what_to_do(name: str) -> None:
    make, text = MODELS[name]
    with pytest.raises(rlprune.GraphError, match=text) as error:
        rlprune.trace(make(), torch.randn(2, 4))
    assert "\n" not in str(error.value)


def test_what_the_line_says_helps() -> None:
    model = with_first(parametrizations.weight_norm)
    torch.nn.utils.parametrize.remove_parametrizations(model[0], "weight")
    assert len(rlprune.trace(model, torch.randn(2, 4)).groups) == 2


@pytest.mark.parametrize(
    "change", [lambda m: m.requires_grad_(False), torch.fx.symbolic_trace, copy.deepcopy]
)
def test_frozen_and_graph_modules_work(change: Callable[[nn.Module], nn.Module]) -> None:
    model = change(plain())
    space = rlprune.trace(model, torch.randn(2, 4))
    assert [group.name for group in space.groups] == ["0", "2"]
