"""A workload whose tokens come in pairs, so that a language model has something to learn in a few steps."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from helpers.lm import tiny_lm, tokens
from rlprune.config.training import FinishConfig
from rlprune.workloads.base import Batch, Workload

FAMILIES = ["llama-mha-tied", "gpt2", "phi3", "opt"]
QUICK = FinishConfig(method="lora", steps=12, batch_size=4, lr=5e-3, dropout=0.1)


class Echo(Workload):
    """Sequences in which every token comes twice: half of the tokens can be learned."""

    name = "echo"

    def __init__(self, family: str = "llama-mha-tied", length: int = 12) -> None:
        self.model = tiny_lm(family, seed=7)
        self.example_inputs = tokens(length)
        drawn = torch.randint(2, 30, (48, length // 2), generator=torch.Generator().manual_seed(3))
        self.rows = drawn.repeat_interleave(2, dim=1)

    def batches(self, split: str, limit: int | None = None) -> Iterator[Batch]:
        for rows in self.rows[:limit].split(8):
            yield rows, rows

    def evaluate_loss(self, model: nn.Module) -> float:
        with torch.no_grad():
            return float(model(self.rows, labels=self.rows).loss)

    def train_batches(self, generator: torch.Generator, batch_size: int | None = None) -> Iterator[Batch]:
        order = torch.randperm(len(self.rows), generator=generator)
        for index in order.split(batch_size or 8):
            yield self.rows[index], self.rows[index]


class Killed(Exception):
    pass


def pruned(family: str = "llama-mha-tied") -> nn.Module:
    """A student: some other random model of the family, as if it had been cut."""
    return tiny_lm(family, seed=1)


def same(a: nn.Module, b: nn.Module) -> bool:
    """Whether all tensors are equal to the bit."""
    pairs = zip(a.state_dict().items(), b.state_dict().items(), strict=True)
    return all(m == n and torch.equal(x, y) for (m, x), (n, y) in pairs)


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    """What a model says of ids (B, L), (B, L, V), without a gradient."""
    with torch.no_grad():
        return model(ids).logits
