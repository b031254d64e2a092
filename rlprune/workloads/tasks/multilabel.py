"""Several yes/no labels a sample: a sigmoid for each."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from ..metrics import Read, Targets
from .base import Scale, TaskType, bernoulli_divergence, random_signs, shape_of, task_type


@task_type("yes/no labels: logits (N, labels), targets of the same shape", name="multilabel")
class Multilabel(TaskType):
    """Logits and targets (0 or 1) of one shape, (N, L) or (N,).

    The divergence is KL(dense || pruned) between the labels' Bernoulli distributions in nats, the mean over labels; the
    loss binary cross-entropy, the metric the share of labels that are right at probability 0.5. Distillation is the
    same KL at a temperature.
    """

    metric_name = "label accuracy"

    def misfit(self, read: Read, targets: Targets, own_loss: bool = False) -> str | None:
        if own_loss:
            return None
        if not isinstance(targets, Tensor) or targets.shape != read.shape:
            looks = (
                "; state task: classification"
                if isinstance(targets, Tensor) and targets.ndim < read.ndim
                else ""
            )
            return (
                f"the task 'multilabel' needs targets of the outputs' shape {shape_of(read)}, got {shape_of(targets)}"
                f"{looks}"
            )
        if not bool(((targets >= 0) & (targets <= 1)).all()):
            return "the task 'multilabel' needs targets between 0 and 1; state task: regression"
        return None

    def loss(self, read: Read, targets: Targets) -> Tensor:
        return F.binary_cross_entropy_with_logits(read, targets.to(read.dtype))

    def metric(self, read: Read, targets: Targets) -> Tensor:
        right = ((read > 0) == (targets > 0.5)).float()
        return right.flatten(1).mean(dim=1).sum() if right.ndim > 1 else right.sum()

    def metric_arguments(self, read: Read) -> Mapping[str, object]:
        if read.ndim < 2 or read.shape[1] == 1:
            return {"task": "binary"}
        return {"task": "multilabel", "num_labels": read.shape[1], "average": "macro"}

    def for_metric(self, read: Read, targets: Targets) -> tuple[object, object]:
        return read.float().sigmoid(), targets.long()

    def divergence(self, dense: Read, read: Read, scale: Scale = None) -> Tensor:
        each = bernoulli_divergence(dense, read)
        return each.flatten(1).mean(dim=1) if each.ndim > 1 else each

    def distillation(self, read: Read, teacher: Read, temperature: float) -> Tensor:
        each = bernoulli_divergence(teacher / temperature, read / temperature)
        return each.mean() * temperature**2

    def drawn_loss(self, read: Read, generator: torch.Generator) -> Tensor | None:
        logits = read.float()
        p = logits.detach().sigmoid()
        noise = (p * (1 - p)).sqrt() * random_signs(logits, generator)
        return (logits * noise).sum() / logits[0].numel() ** 0.5  # the divergence is a mean over the labels
