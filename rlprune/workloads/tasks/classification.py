"""One class a sample: softmax over the classes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from ...recovery.finetune import softmax_distillation
from ..metrics import Read, Targets
from .base import Scale, TaskType, is_labels, shape_of, softmax_divergence, softmax_noise, task_type


@task_type("one class a sample: logits (N, classes), targets (N,)", name="classification")
class Classification(TaskType):
    """Logits (N, C) and class numbers (N,).

    The divergence is KL(dense || pruned) of the class probabilities in nats, the loss cross-entropy, the metric
    accuracy, the distillation that of Hinton et al. 2015 (arXiv 1503.02531).
    """

    metric_name = "accuracy"

    def misfit(self, read: Read, targets: Targets, own_loss: bool = False) -> str | None:
        if read.ndim == 2 and read.shape[1] == 1:
            return (
                "the task 'classification' takes a softmax over 1 output, which is 1 for every model; state task: "
                "regression, or multilabel for yes/no labels"
            )
        if read.ndim != 2:
            looks = {1: "regression", 4: "segmentation"}.get(
                read.ndim, "segmentation (classes on axis 1) or sequence"
            )
            return f"the task 'classification' needs outputs (N, classes), got {shape_of(read)}; state task: {looks}"
        if own_loss:
            return None
        if isinstance(targets, Tensor) and targets.is_floating_point():
            looks = "multilabel" if set(targets.unique().tolist()) <= {0.0, 1.0} else "regression"
            return (
                f"the task 'classification' needs whole numbers as targets, got floats; state task: {looks}"
            )
        if not is_labels(targets):
            return f"the task 'classification' needs a tensor of class numbers as targets, got {type(targets).__name__}"
        if targets.ndim != 1:
            looks = "multilabel" if targets.shape == read.shape else "segmentation or sequence"
            return (
                f"the task 'classification' needs targets (N,), got {shape_of(targets)}; state task: {looks}"
            )
        return None

    def loss(self, read: Read, targets: Targets) -> Tensor:
        return F.cross_entropy(read, targets)

    def metric(self, read: Read, targets: Targets) -> Tensor:
        return (read.argmax(1) == targets).sum().float()

    def sample_metrics(self, read: Read, targets: Targets) -> Tensor | None:
        return (read.argmax(1) == targets).float()

    def metric_arguments(self, read: Read) -> Mapping[str, object]:
        return {"task": "multiclass", "num_classes": read.shape[1], "average": "macro"}

    def for_metric(self, read: Read, targets: Targets) -> tuple[object, object]:
        return read.float().softmax(dim=1), targets

    def kept(self, read: Read) -> Read:
        return F.log_softmax(read.float(), dim=-1)

    def divergence(self, dense: Read, read: Read, scale: Scale = None) -> Tensor:
        return softmax_divergence(dense, read)

    def distillation(self, read: Read, teacher: Read, temperature: float) -> Tensor:
        return softmax_distillation(read, teacher, temperature)

    def drawn_loss(self, read: Read, generator: torch.Generator) -> Tensor | None:
        if read.ndim != 2:
            return None
        return (read.float() * softmax_noise(read, generator)).sum()

    def rows(self, read: Read) -> Tensor | None:
        return read.float().cpu() if read.ndim == 2 else None

    def equal_scores(self, read: Read) -> str:
        return self.misfit(read, None, own_loss=True) or super().equal_scores(read)
