"""A workload of random token sequences for a tiny language model, and random plans for its space."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lm import tokens
from torch import nn

from rlprune.pruning.plan import Plan
from rlprune.workloads.base import Workload


class Sentences(Workload):
    """Sequences (B, L) of random ids; each split has its own."""

    language = True

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
