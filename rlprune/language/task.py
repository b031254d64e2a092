"""Next tokens as a task: what causal language models are for by default."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..errors import DataError
from ..workloads.metrics import Read, Targets
from ..workloads.tasks.base import Outputs, Scale, TaskType, softmax_divergence, task_type
from ..workloads.tasks.outputs import Choice, find_output
from .logits import logits_of, next_token_loss


@task_type("next tokens: logits (B, L, vocabulary), targets (B, L); -100 is left out", name="language")
class NextToken(TaskType):
    """Logits (B, L, V) of a causal language model and token ids (B, L).

    The language wing scores token by token, see `rlprune.language.judge`; this is what stands for it where a workload
    has a loss or a metric of its own: KL(dense || pruned) in nats, the mean over a sequence's positions.
    """

    metric_name = "perplexity"
    higher_is_better = False
    exp_of_loss = True

    def read(self, outputs: Outputs, choice: Choice | None = None) -> Read:
        return logits_of(outputs) if choice is None else find_output(outputs, choice)

    def misfit(self, read: Read, targets: Targets, own_loss: bool = False) -> str | None:
        return None if read.ndim == 3 or own_loss else "the task 'language' needs logits (B, L, vocabulary)"

    def loss(self, read: Read, targets: Targets) -> Tensor:
        """Mean next-token cross-entropy in nats."""
        return next_token_loss(read, targets)

    def metric(self, read: Read, targets: Targets) -> Tensor:
        """Perplexity of the batch times its sequences; use ``evaluate`` for the perplexity of a split."""
        return self.loss(read, targets).exp() * len(targets)

    def kept(self, read: Read) -> Read:
        return F.log_softmax(read.float(), dim=-1)

    def divergence(self, dense: Read, read: Read, scale: Scale = None) -> Tensor:
        return softmax_divergence(dense, read)

    def distillation(self, read: Read, teacher: Read, temperature: float) -> Tensor:
        raise DataError("task 'language': distils by the trainer of the language wing")
