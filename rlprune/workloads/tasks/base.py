"""What a model's outputs mean: the protocol of a task type, and the registry of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import ConfigError, DataError, near_miss
from ...utils.pytrees import Inputs, call, sample_count, take
from ...utils.registry import Named, Registry
from ..metrics import Meter, Read, SumMeter, Targets
from .outputs import Choice, find_output

Outputs = Any
"""What a model returns, or what `TaskType.forward` made of it."""
Scale = Any
"""What a task measures once of the dense model's outputs on the validation split."""

TASK_TYPES: Registry[Named] = Registry("task type", home="workloads.tasks.shipped")
Kind = TypeVar("Kind", bound="type[TaskType]")


class TaskType:
    """What a model's outputs mean, and so how a pruned model is compared with the dense one.

    A subclass for a task of your own overrides what is different; by default there is one tensor, found in the
    outputs by `find_output`. ``read`` stands for what :meth:`read` returns. Objects hold no state of a run.
    """

    name: str = ""
    metric_name: str = "metric"
    higher_is_better: ClassVar[bool] = True
    """Whether a larger metric is a better one."""
    exp_of_loss: ClassVar[bool] = False
    """Whether the metric is the exponential of the loss, so that a difference of losses is a ratio of metrics."""
    compares: ClassVar[bool] = True
    """Whether the task knows a divergence to the dense model (`score.kind: kl`) and a distillation loss."""
    own_pass: ClassVar[bool] = False
    """Whether the loss reads other outputs than the score: `forward_for_loss` is another pass then."""

    # -- reading what a model returns -----------------------------------------------------------------------------

    def forward(self, model: nn.Module, inputs: Inputs, like: Outputs = None) -> Outputs:
        """Call a model as it is used; ``like`` are the dense model's outputs on the same samples, where known."""
        return call(model, inputs)

    def forward_for_loss(
        self, model: nn.Module, inputs: Inputs, targets: Targets, like: Outputs = None
    ) -> Outputs:
        """Call a model for its loss, in the mode that it is in."""
        return call(model, inputs)

    def plain(self, outputs: Outputs) -> Outputs:
        """The model's own outputs in what `forward` gave; a user's loss and metric are given these."""
        return outputs

    def read(self, outputs: Outputs, choice: Choice | None = None) -> Read:
        """What the task reads of the outputs; DataError where that is not clear."""
        return find_output(outputs, choice)

    def count(self, inputs: Inputs, targets: Targets) -> int:
        """Samples in a batch: by its targets, or by its inputs where those have no batch."""
        return sample_count(inputs, targets)

    def misfit(self, read: Read, targets: Targets, own_loss: bool = False) -> str | None:
        """Why outputs and targets are not those of this task, with the task that they look like; None where they fit.

        With ``own_loss`` the targets are the user's own business.
        """
        return None

    # -- quality --------------------------------------------------------------------------------------------------

    def loss(self, read: Read, targets: Targets) -> Tensor:
        """Mean loss of a batch, a scalar tensor."""
        raise DataError(
            f"task {self.name!r}: has no loss of its own; give the workload a loss(outputs, targets)"
        )

    def metric(self, read: Read, targets: Targets) -> Tensor:
        """Sum over a batch of the metric, higher is better; a scalar tensor."""
        raise DataError(
            f"task {self.name!r}: has no metric of its own; give the workload a metric(outputs, targets)"
        )

    def sample_metrics(self, read: Read, targets: Targets) -> Tensor | None:
        """The metric of each sample, (N,), whose sum is `metric`; None where it is asked sample by sample."""
        return None

    def meter(self) -> Meter:
        """Gathers the metric over a split; by default the mean over samples of `metric`."""
        return SumMeter(self.metric)

    def metric_arguments(self, read: Read) -> Mapping[str, object]:
        """Arguments of a metric of torchmetrics that the task knows, such as the number of classes."""
        return {}

    def for_metric(self, read: Read, targets: Targets) -> tuple[object, object]:
        """Predictions and targets as metrics of torchmetrics take them."""
        return read, targets

    # -- comparing with the dense model ---------------------------------------------------------------------------

    def kept(self, read: Read) -> Read:
        """What is kept of the dense model's outputs."""
        return read

    def part(self, kept: Read, samples: slice) -> Read:
        """What is kept of some samples of a batch."""
        return take(kept, samples)

    def scale(self, kept: Sequence[Read]) -> Scale:
        """What `divergence` needs of the dense outputs on all samples."""
        return None

    def divergence(self, dense: Read, read: Read, scale: Scale = None) -> Tensor:
        """Distance of each sample's outputs to the dense model's (what was `kept`), (N,), 0 for the dense model."""
        raise self.refusal()

    def refusal(self) -> DataError:
        """Why candidates cannot be compared with the dense model, where they cannot."""
        return DataError(
            f"task {self.name!r}: has no divergence to the dense model; give the workload a score_fn(model), or set "
            "score.kind=loss"
        )

    def distillation(self, read: Read, teacher: Read, temperature: float) -> Tensor:
        """Loss of imitating a teacher, a scalar tensor whose gradient is 0 where both say the same."""
        raise DataError(f"task {self.name!r}: has no distillation loss")

    def drawn_loss(self, read: Read, generator: torch.Generator) -> Tensor | None:
        """A number whose gradient at a sample's outputs is random, with the Hessian of `divergence` as second moment.

        That is the Fisher information of the outputs: it tells what small changes cost, without a target. The gradient
        of minus the log-likelihood of an answer that is drawn from the outputs would do; a root of the Hessian times
        random signs varies far less where the model is sure of its answers. None where the task knows none.

        Args:
            generator: on the CPU, so that every device draws the same.
        """
        return None

    def rows(self, read: Read) -> Tensor | None:
        """Logits (N * R, C) whose divergence the score is, for models of the search; None where there are none."""
        return None

    def equal_scores(self, read: Read) -> str:
        """Why all plans may have the same score, for the line that refuses it."""
        return "the outputs that the score reads do not depend on what is cut"


def task_type(summary: str, *, name: str) -> Callable[[Kind], Kind]:
    """Register a subclass of :class:`TaskType` as a task that a workload can name.

    Raises (when applied):
        ConfigError: the name is taken, or the summary is missing.
    """

    def register(cls: Kind) -> Kind:
        if not (isinstance(cls, type) and issubclass(cls, TaskType)):
            raise ConfigError(f"task_type {name!r}: must be a subclass of rlprune.TaskType, got {cls!r}")
        cls.name = name
        return TASK_TYPES.decorator("task_type", summary, lambda own, made: Named(own, summary, made), name)(
            cls
        )

    return register


def find_task(task: str | TaskType | type[TaskType]) -> TaskType:
    """A task type by name, class or object; DataError with the near miss for an unknown one."""
    if isinstance(task, TaskType):
        return task
    if isinstance(task, type) and issubclass(task, TaskType):
        return task()
    if not isinstance(task, str):
        raise DataError(f"task: expected a name or a rlprune.TaskType, got {type(task).__name__}")
    if not TASK_TYPES.knows(task):
        raise DataError(
            f"task: unknown {task!r}{near_miss(task, TASK_TYPES)}; allowed: {', '.join(TASK_TYPES)}, or an object "
            "of a subclass of rlprune.TaskType"
        )
    found: TaskType = TASK_TYPES.source(task)()
    return found


def softmax_divergence(dense_log: Tensor, logits: Tensor, axis: int = -1) -> Tensor:
    """KL(dense || pruned) of each sample, (N,), over the classes of ``axis``; further dimensions are averaged."""
    each = (dense_log.exp() * (dense_log - F.log_softmax(logits.float(), dim=axis))).sum(dim=axis)
    return each.flatten(1).mean(dim=1) if each.ndim > 1 else each


def softmax_noise(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Random directions (N, C) whose second moments are the Hessians of KL divergences from rows of logits (N, C).

    ``H = diag(p) - p p' = L L'`` with ``L = diag(sqrt p) - p sqrt(p)'``, and L times random signs has it.
    """
    root = logits.detach().float().softmax(dim=-1).sqrt()
    signed = root * random_signs(logits, generator)
    return signed - root.square() * signed.sum(dim=-1, keepdim=True)


def random_signs(like: Tensor, generator: torch.Generator) -> Tensor:
    """1 or -1 for each number of a tensor, drawn on the CPU."""
    return (torch.randint(2, like.shape, generator=generator) * 2 - 1).to(like.device, torch.float32)


def bernoulli_divergence(dense: Tensor, logits: Tensor) -> Tensor:
    """KL between yes/no answers with logits of one shape, element by element."""
    dense, logits = dense.float(), logits.float()
    p = dense.sigmoid()
    yes = F.logsigmoid(dense) - F.logsigmoid(logits)
    no = F.logsigmoid(-dense) - F.logsigmoid(-logits)
    return p * yes + (1 - p) * no


def shape_of(tensor: object) -> str:
    """A tensor's shape in words, the batch as N."""
    if not isinstance(tensor, Tensor):
        return type(tensor).__name__
    return f"({', '.join(['N', *map(str, tensor.shape[1:])])})"


def is_labels(targets: object) -> bool:
    """Whether targets are whole numbers."""
    return isinstance(targets, Tensor) and not targets.is_floating_point() and targets.dtype != torch.bool
