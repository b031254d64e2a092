"""Further kinds of scores: what stands in addition to `kl`, `loss` and `accuracy`, registered one by one."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..config.names import SCORE_KINDS
from ..errors import ConfigError
from ..utils.registry import Named, named_errors
from .judge import Judge, TaskJudge
from .metrics import Read, Targets

if TYPE_CHECKING:
    from .base import Workload

Score = Callable[..., Tensor]


def score_kind(summary: str, *, wing: str | None = None, name: str | None = None) -> Callable[[Score], Score]:
    """Register a kind of score (a name for ``score.kind``) under the name of the function below.

    The function takes ``(outputs, targets)`` of a batch of validation samples, or ``(outputs, targets, dense)`` with
    the dense model's outputs on them, and returns a score for each sample, (B,), higher is better. Outputs are logits
    (B, classes) and targets (B,) where images are classified; for next tokens they are log-probabilities
    (B, L - 1, vocabulary) and the tokens that came (B, L - 1), -100 where none is scored; for other tasks they are what
    the task reads of the model's outputs (see :class:`rlprune.workloads.tasks.TaskType`).

    Args:
        summary: one line for ``rlprune list scores``.
        wing: the only wing whose models have the score ("vision", "language"); None for all.
        name: instead of the function's own.

    Raises (when applied):
        ConfigError: the name is taken, or the summary is missing.
    """
    return SCORE_KINDS.decorator(
        "score_kind", summary, lambda own, function: Named(own, summary, function, wing), name
    )


def registered(kind: str, wing: str) -> bool:
    """Whether a kind of score is a registered function; ConfigError where it is one for models of another wing."""
    if SCORE_KINDS.source(kind) is None:
        return False
    owner = SCORE_KINDS[kind].wing
    if owner not in (None, wing):
        raise ConfigError(f"score.kind: {kind!r} is for {owner} models only, this is a {wing} model")
    return True


def task_judge(workload: Workload, kind: str, limit: int | None) -> Judge:
    """The judge by whole outputs, for one of rlprune's own scores or a registered one."""
    if registered(kind, workload.adapter.wing):
        return RegisteredJudge(workload, kind, limit)
    return TaskJudge(workload, kind, limit)


def takes_dense(function: Score) -> bool:
    """Whether a score compares with the dense model's outputs."""
    return len(inspect.signature(function).parameters) > 2


def scored(kind: str, outputs: Read, targets: Targets, *dense: Read, count: int | None = None) -> Tensor:
    """The scores (B,), float64, that a registered function gives a batch, with the dense outputs or not.

    ``count`` is the number of samples, where ``targets`` are no tensor. ConfigError naming the function where it
    gives anything else.
    """
    size = len(targets) if count is None else count
    with named_errors("score_kind", kind):
        found = SCORE_KINDS.source(kind)(outputs, targets, *dense)
    shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
    if shape != (size,):
        raise ConfigError(
            f"score_kind {kind!r}: must return a tensor of shape ({size},), one score a sample, got {shape}"
        )
    return found.detach().to(torch.float64)


class RegisteredJudge(TaskJudge):
    """Judges by a registered function of the outputs; loss and metric are the workload's."""

    @property
    def _compares(self) -> bool:
        return takes_dense(SCORE_KINDS.source(self._kind))

    def _kept(self, read: Read) -> Read:
        return read

    def _scores(self, read: Read, targets: Targets, dense: Read, own: Tensor, size: int) -> Tensor:
        return scored(self._kind, read, targets, *(() if dense is None else (dense,)), count=size).cpu()
