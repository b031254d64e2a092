"""A space of transformer blocks made by hand, whose costs are simple sums, for the formulas of rules."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rlprune.importance import importance
from rlprune.language.calibration.statistics import Moments, Statistics
from rlprune.pruning.cost import CostFormula
from rlprune.pruning.space import Axis, Cut, Group, Member, PruningSpace
from rlprune.rules import RULES, Context
from rlprune.workloads import Workload


class Part(nn.Module):
    def __init__(self, size: int, inner: int, names: tuple[str, str]) -> None:
        super().__init__()
        self.add_module(names[0], nn.Linear(size, inner, bias=False))
        self.add_module(names[1], nn.Linear(inner, size, bias=False))


class Block(nn.Module):
    def __init__(self, size: int, heads: int, neurons: int) -> None:
        super().__init__()
        self.self_attn = Part(size, heads, ("q_proj", "o_proj"))
        self.mlp = Part(size, neurons, ("up_proj", "down_proj"))


class Toy(nn.Module):
    """Blocks of two parts; its output is the sum of all o_proj outputs for inputs of one."""

    def __init__(self, blocks: int, size: int, channels: int, neurons: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(size, channels, neurons) for _ in range(blocks))

    def forward(self, ids: Tensor) -> Tensor:
        outputs = []
        for layer in self.layers:
            out: Any = layer.get_submodule("self_attn.o_proj")
            outputs.append(out(torch.ones(1, out.in_features)).sum())
        return torch.stack(outputs).sum()


def toy(
    blocks: int = 4, heads: int = 2, head_dim: int = 2, neurons: int = 6, size: int = 4, drop: bool = False
) -> Context:
    """A context whose costs are: a head 2 * size * head_dim parameters, a neuron 2 * size, and 100 that stay."""
    torch.manual_seed(0)
    model = Toy(blocks, size, heads * head_dim, neurons).eval()
    groups, axes, cuts, prices, cache, start = [], [], [], [], [], 0
    for b in range(blocks):
        for kind, width, unit, part, names in (
            ("attention", heads, head_dim, "self_attn", ("q_proj", "o_proj")),
            ("ffn", neurons, 1, "mlp", ("up_proj", "down_proj")),
        ):
            name = f"layers.{b}.{part}"
            members = (Member(f"{name}.{names[0]}", "out", unit), Member(f"{name}.{names[1]}", "in", unit))
            minimum = 0 if drop else 1
            groups.append(Group(name, kind, width, unit, minimum, 1, members, b / blocks, 1, 1, b))
            axes.append(Axis(np.repeat(np.arange(start, start + width), unit)))
            cuts.append(Cut(f"{name}.{names[0]}.weight", 0, len(axes) - 1, False))
            cuts.append(Cut(f"{name}.{names[1]}.weight", 1, len(axes) - 1, True))
            prices.append(2.0 * size * unit)
            cache.append(4.0 * unit if kind == "attention" else 0.0)
            start += width
    nothing = np.zeros((len(groups), len(groups)))
    costs = {
        "params": CostFormula(100.0, np.array(prices), nothing),
        "kv_cache": CostFormula(0.0, np.array(cache), nothing),
    }
    space = PruningSpace(tuple(groups), {}, "toy", tuple(axes), tuple(cuts), (), costs, wing="language")
    return Context(space, model, importance.magnitude(model, space), 0.7, "params")


def absolute(context: Context, cost: float, metric: str = "params") -> Context:
    return replace(context, metric=metric, budget=cost / context.space.dense_cost(metric))


def with_statistics(context: Context, cosine: Any, seed: int = 0) -> Context:
    random = np.random.default_rng(seed)
    inputs = {}
    for cut in context.space.cuts:
        if cut.consumer:
            n = len(context.space.axes[cut.axis].slots)
            values = random.gamma(0.5, 1.0, n)
            inputs[cut.tensor.removesuffix(".weight")] = Moments(0 * values, 2 * values, values, 10)
    cosine = np.asarray(cosine, dtype=np.float64)
    found = Statistics(inputs, cosine, cosine, cosine)
    return with_measured(context, "statistics", found)


def with_measured(context: Context, name: str, value: object) -> Context:
    """The context with a measurement that is there already, and a workload that may not be read."""
    context = replace(context, workload=Nothing(), calibration=None)
    assert context.calibration is not None
    context.calibration.keep(name, value)
    return context


class Nothing(Workload):
    """A workload that no rule may read: everything it needs is remembered."""

    name = "nothing"

    def batches(self, split: str, limit: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        raise AssertionError(f"{split} was read")


def widths(context: Context, name: str) -> list[int]:
    distribution = RULES[name].function(context)
    return context.space.project(distribution, context.budget, context.metric).tolist()
