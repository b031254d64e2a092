"""Which task a workload with a loss of its own is about, where it does not say."""

from __future__ import annotations

from ...errors import DataError
from ..metrics import Read, Targets
from .base import Outputs, TaskType, is_labels, shape_of
from .classification import Classification
from .outputs import Choice, find_output
from .own import Own
from .segmentation import Segmentation, SequenceLabels


def guessed(outputs: Outputs, targets: Targets, choice: Choice | None) -> TaskType:
    """The task that outputs and targets of a batch can only be about; `Own` with the reason where there is doubt."""
    try:
        read = find_output(outputs, choice)
    except DataError as error:
        return Own(str(error))
    fitting = [
        kind for kind in (Classification, Segmentation, SequenceLabels) if _fits(kind(), read, targets)
    ]
    if len(fitting) == 1:
        return fitting[0]()
    looks = Classification().misfit(read, targets)
    if looks is None or len(fitting) > 1:
        looks = f"outputs {shape_of(read)} and targets {shape_of(targets)} are those of several tasks"
    return Own(
        f"the workload has a loss of its own and does not say what its outputs mean: {looks}; "
        "task='own' with a score_fn, or score.kind=loss, needs no meaning"
    )


def _fits(task: TaskType, read: Read, targets: Targets) -> bool:
    if not is_labels(targets) or task.misfit(read, targets) is not None:
        return False
    if isinstance(task, Segmentation):
        return bool(read.select(task.axis, 0).shape == targets.shape)
    return True
