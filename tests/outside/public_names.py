"""What a type checker sees of rlprune from outside; checked by pyright and mypy, run by nobody."""

from __future__ import annotations

from collections.abc import Iterator
from typing import assert_type

import numpy as np
import torch
from torch import nn

import rlprune


class Mine(rlprune.Workload):
    def __init__(self) -> None:
        self.model = nn.Linear(4, 2)
        self.example_inputs = torch.zeros(1, 4)

    def batches(self, split: str, limit: int | None = None) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        yield torch.zeros(8, 4), torch.zeros(8, dtype=torch.long)


@rlprune.rule("a rule")
def mine(context: rlprune.Context) -> np.ndarray:
    return np.ones(len(context.space.groups))


def whole(model: nn.Module) -> None:
    space = rlprune.trace(model, torch.zeros(1, 3, 8, 8))
    assert_type(space, rlprune.PruningSpace)
    scores = rlprune.importance.magnitude(model, space)
    plan = rlprune.make_plan(space, importance=scores, widths=space.widths)
    assert_type(plan, rlprune.Plan)
    assert_type(rlprune.prune(model, plan), nn.Module)
    assert_type(rlprune.load("folder", base=model), nn.Module)
    result = rlprune.search(Mine(), budget="50%", evaluations=10, settings={"finish": {"epochs": 1}})
    assert_type(result, rlprune.PruningResult)
    assert_type(result.model, nn.Module)
    applied = rlprune.apply("run", Mine(), budget=0.4)
    assert_type(applied, rlprune.AppliedPolicy)
    config = rlprune.load_config("digits", ["seed=1"])
    assert_type(config, rlprune.Config)
    assert_type(config.search.evaluations, int)
    assert_type(rlprune.__version__, str)
