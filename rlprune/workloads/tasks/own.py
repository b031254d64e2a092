"""A task that rlprune knows nothing of: the user gives the loss, the metric and the score."""

from __future__ import annotations

from ...errors import DataError
from ..metrics import Read
from .base import Outputs, TaskType, task_type
from .outputs import Choice


@task_type("your own: the workload gives loss, metric and score_fn", name="own")
class Own(TaskType):
    """Outputs of any kind. There is no distillation, and a score only by ``score_fn`` or ``score.kind: loss``.

    ``reason`` says why there is no divergence, where the task was not stated but could not be told.
    """

    compares = False

    def __init__(self, reason: str | None = None) -> None:
        self.reason = reason

    def read(self, outputs: Outputs, choice: Choice | None = None) -> Read:
        return outputs if choice is None else super().read(outputs, choice)

    def refusal(self) -> DataError:
        return super().refusal() if self.reason is None else DataError(self.reason)
