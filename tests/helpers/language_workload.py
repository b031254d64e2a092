"""Workloads of random tokens for tiny language models, their evaluators, and random plans for their spaces."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from helpers.lm import tokens
from rlprune.config.config import ScoreConfig
from rlprune.config.training import RecoveryConfig
from rlprune.evaluation.evaluator import Evaluator
from rlprune.language.text import Text as TextOf
from rlprune.language.text import TextRequest, split_text
from rlprune.language.workload import LanguageWorkload
from rlprune.pruning.plan import Plan
from rlprune.tracing.trace import TraceOptions
from rlprune.workloads import SPLITS
from rlprune.workloads.base import Workload


class Sentences(Workload):
    """Sequences (B, L) of random ids; each split has its own."""

    def __init__(self, model: nn.Module, length: int = 12, size: int = 10) -> None:
        self.model = model
        self.example_inputs = tokens(length)
        names = ("train", "calibration", "validation", "test")
        self.parts = {name: tokens(length, size, seed) for seed, name in enumerate(names, start=1)}

    def batches(self, split: str, limit: int | None = None) -> Any:
        ids = self.parts[split][:limit]
        for start in range(0, len(ids), 4):
            yield ids[start : start + 4], ids[start : start + 4]

    def loss(self, outputs: Any, targets: torch.Tensor) -> torch.Tensor:
        logits = getattr(outputs, "logits", outputs)[:, :-1]
        return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets[:, 1:].reshape(-1))


def plan_of(space: Any, seed: int = 0) -> Plan:
    """Random kept units, about half of each group, at least one and where possible not all."""
    rng = np.random.default_rng(seed)
    kept = tuple(np.sort(rng.permutation(g.width)[: max(1, g.width // 2)]) for g in space.groups)
    return Plan(space, np.array([len(k) for k in kept]), kept)


def workload_of(model, *, sizes=(4, 6, 8, 5), length=16, seed=0, **options) -> LanguageWorkload:
    """A language workload on a stream of 1000 random ids; ``sizes`` are the sequences of the four splits."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(0, 96, (1000,), generator=generator).tolist()
    request = TextRequest(length=length, sizes=sizes, seed=seed, **options)
    data = split_text("random", dict.fromkeys(SPLITS, TextOf("random", "x")), request, lambda _: ids)
    return LanguageWorkload(model, None, data)


def evaluator_of(workload, *, rungs=(), dtype="float32", importance="l2", steps=("none",), **score):
    """An evaluator by the divergence in float32; without a recovery unless ``steps`` asks for one."""
    return Evaluator(
        workload,
        # Steps of one: the default ones leave a tiny model hardly a plan to choose from.
        workload.adapter.trace(workload.model, workload.example_inputs, TraceOptions(round_to=1)),
        importance=importance,
        recovery=RecoveryConfig(steps=steps),
        score=ScoreConfig(rungs=rungs, dtype=dtype, top_k=20, **score),
        metric="params",
    )


def plans(evaluator, count, seed=0, budget=0.7):
    """Random widths (G,) at a budget of the blocks' parameters, ``count`` of them."""
    rng = np.random.default_rng(seed)
    groups = len(evaluator.space.groups)
    return [evaluator.space.project(d, budget, "block_params") for d in rng.random((count, groups))]


def activations(workload: Workload, module: str) -> torch.Tensor:
    """Inputs of a module over the calibration split, (tokens, I)."""
    seen: list[torch.Tensor] = []
    layer = workload.model.get_submodule(module)
    handle = layer.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    with torch.no_grad():
        for inputs, _ in workload.batches("calibration"):
            workload.model(inputs)
    handle.remove()
    return torch.cat([s.reshape(-1, s.shape[-1]) for s in seen])
