"""Registered costs: exact on the cut model, known wherever a cost is named, and refused where they are none."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

import rlprune
from helpers.language_workload import plan_of
from helpers.lm import tiny_lm, tokens
from helpers.nets import Residual, example
from helpers.registries import forgotten
from rlprune.errors import BudgetError, ConfigError
from rlprune.pruning.cost import CostFormula, FormulaBuilder


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    with forgotten():
        yield


def bytes_of(name: str, tensor: torch.Tensor) -> float:
    return 0.5 if tensor.ndim > 1 else 2.0


@pytest.mark.parametrize("kind", ["image", "llama", "gpt2", "llama-mha-tied"])
def test_parameter_cost_is_what_the_cut_model_has(kind: str) -> None:
    @rlprune.cost_metric("bytes")
    def some_bytes(space: Any, model: Any) -> CostFormula:
        return rlprune.parameter_cost(space, model, bytes_of)

    @rlprune.cost_metric("parameters again")
    def again(space: Any, model: Any) -> CostFormula:
        return rlprune.parameter_cost(space, model, lambda name, tensor: 1)

    model, inputs = (Residual(), example(torch.float32)) if kind == "image" else (tiny_lm(kind), tokens(8))
    space = rlprune.trace(model, inputs)
    for seed in range(3):
        plan = plan_of(space, seed)
        slim = rlprune.prune(model, plan)
        assert space.cost(plan.widths, "again") == space.cost(plan.widths, "params")
        wanted = sum(t.numel() * bytes_of(n, t) for n, t in slim.named_parameters())
        assert space.cost(plan.widths, "some_bytes") == wanted
        assert plan.to_dict()["cost"]["some_bytes"] == wanted
    widths = space.project(np.ones(len(space.groups)), 0.8, "some_bytes")
    assert space.cost(widths, "some_bytes") <= 0.8 * space.dense_cost("some_bytes")
    assert space.after(plan.kept).dense_cost("some_bytes") == wanted, "a stage's space has it too"


def test_axis_sizes_count_what_is_left() -> None:
    model = Residual()
    space = rlprune.trace(model, example(torch.float32))
    plan = plan_of(space, 1)
    tensors = dict(rlprune.prune(model, plan).named_parameters()) | dict(
        rlprune.prune(model, plan).named_buffers()
    )
    sizes = space.axis_sizes()
    for cut in space.cuts:
        axis = sizes[cut.axis]
        assert tensors[cut.tensor].shape[cut.dim] == axis.constant + axis.slope @ plan.widths


def test_a_cost_may_be_a_sum_of_its_own_and_may_be_absent() -> None:
    @rlprune.cost_metric("units")
    def units(space: Any, model: Any) -> CostFormula:
        builder = FormulaBuilder(len(space.groups))
        builder.add(1.0, *space.axis_sizes()[:1])
        return builder.build()

    rlprune.cost_metric("never", name="never")(lambda space, model: None)
    rlprune.cost_metric("text only", name="texts", wing="language")(lambda space, model: space.costs["macs"])
    space = rlprune.trace(Residual(), example(torch.float32))
    assert list(space.costs) == ["macs", "params", "filters", "units"]
    assert "texts" in rlprune.trace(tiny_lm(), tokens(8)).costs
    with pytest.raises(BudgetError, match=r"unknown metric 'never'; allowed: macs, params, filters, units"):
        space.dense_cost("never")


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda space, model: 3, "must return a Cost, such as rlprune.parameter_cost gives it, got int"),
        (lambda space, model: 1 / 0, "cost_metric 'odd': ZeroDivisionError: division by zero"),
        (
            lambda space, model: linear(space, -1.0),
            "must be above 0 for the dense model and not rise when it is cut",
        ),
        (lambda space, model: linear(space, np.nan), "must be above 0 for the dense model"),
    ],
)
def test_what_is_no_cost_is_named(made: Any, message: str) -> None:
    rlprune.cost_metric("odd", name="odd")(made)
    with pytest.raises(ConfigError, match=message):
        rlprune.trace(Residual(), example(torch.float32))


def linear(space: Any, slope: float) -> CostFormula:
    count = len(space.groups)
    return CostFormula(1000.0, np.full(count, slope), np.zeros((count, count)))
