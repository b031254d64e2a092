"""Vectors whose direction counts: cosines."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..metrics import Read, Targets
from .base import Scale, TaskType, shape_of, task_type


@task_type("vectors whose direction counts: outputs (N, D)", name="embedding")
class Embedding(TaskType):
    """Vectors (N, D); further dimensions are further vectors of a sample, (N, ..., D).

    The divergence is 1 - cosine to the dense model's vector, the mean over a sample's vectors. Without a loss of your
    own, targets are vectors of the same shape and the loss is 1 - cosine to them, the metric the mean cosine.
    Distillation is the divergence.
    """

    metric_name = "cosine"

    def misfit(self, read: Read, targets: Targets, own_loss: bool = False) -> str | None:
        if read.ndim < 2 or read.shape[-1] == 1:
            return (
                f"the task 'embedding' compares directions, and outputs {shape_of(read)} are single numbers; state "
                "task: regression"
            )
        if not own_loss and (not isinstance(targets, Tensor) or targets.shape != read.shape):
            return (
                f"the task 'embedding' needs targets of the outputs' shape {shape_of(read)}, or a loss of the "
                f"workload's own; got {shape_of(targets)}"
            )
        return None

    def loss(self, read: Read, targets: Targets) -> Tensor:
        return self.divergence(targets, read).mean()

    def metric(self, read: Read, targets: Targets) -> Tensor:
        return (1 - self.divergence(targets, read)).sum()

    def divergence(self, dense: Read, read: Read, scale: Scale = None) -> Tensor:
        cosine = F.cosine_similarity(read.float(), dense.float(), dim=-1)
        each = (1 - cosine).clamp_min(0.0)
        return each.flatten(1).mean(dim=1) if each.ndim > 1 else each

    def drawn_loss(self, read: Read, generator: torch.Generator) -> Tensor | None:
        """Of normal noise across each vector, in units of its length."""
        vectors = read.float()
        length = vectors.detach().norm(dim=-1, keepdim=True).clamp_min(1e-12)
        along = vectors.detach() / length
        noise = torch.randn(read.shape, generator=generator).to(along)
        across = (noise - (noise * along).sum(dim=-1, keepdim=True) * along) / length
        count = vectors[0].numel() // vectors.shape[-1]  # the divergence is a mean over a sample's vectors
        return (vectors * across).sum() / count**0.5

    def distillation(self, read: Read, teacher: Read, temperature: float) -> Tensor:
        return (1 - F.cosine_similarity(read.float(), teacher.float(), dim=-1)).mean()
