"""Scores that a search can do nothing with, refused with the reason."""

from __future__ import annotations

import torch

from ..config.config import ScoreConfig
from ..errors import ConfigError, DataError
from ..utils.modes import evaluating
from ..workloads.base import Workload
from ..workloads.metrics import TorchMeter

ENOUGH = 6
"""Plans that do not have the same score by chance."""


def check_whole(workload: Workload, settings: ScoreConfig) -> None:
    """ConfigError for settings that judge a part of a split, where the score is one of the split as a whole."""
    if workload.score_fn is not None and settings.kind != "kl":
        raise ConfigError(
            f"score.kind: {settings.kind!r} is given, but the workload has a score_fn, which takes the place of a "
            "kind; leave one of them out"
        )
    who = workload.whole_score(settings.kind)
    if who is None:
        return
    meter = workload.new_meter() if settings.kind == "accuracy" else None
    if isinstance(meter, TorchMeter) and meter.lower_is_better:
        raise ConfigError(
            f"score.kind: 'accuracy' takes the metric as the score, and of {workload.metric_name} less is better; use "
            "kl, loss, or a score_fn"
        )
    for name, given in (("rungs", settings.rungs), ("samples", settings.samples)):
        if given and (name == "rungs" or workload.score_fn is not None):
            raise ConfigError(
                f"score.{name}: {who} judges a model by the validation split as a whole, so that some of its samples "
                "have no score; leave it out"
            )


def equal_scores(workload: Workload, kind: str, score: float, plans: int) -> DataError:
    """What is wrong where all plans have the same score."""
    if workload.score_fn is not None:
        what, reason = "score_fn", "score_fn returns the same number for every model"
    else:
        what = f"score.kind {kind!r}, task {workload.task_type.name!r}"
        reason = _reason(workload, kind, score)
    return DataError(f"score: every one of {plans} different plans scored {score:.4f} ({what}): {reason}")


def _reason(workload: Workload, kind: str, score: float) -> str:
    if score <= -1e9:
        return "the outputs of every pruned model are NaN or infinite; try recovery.steps=[reconstruct,bn]"
    if kind == "accuracy":
        return "so few samples do not tell plans apart by the metric; try score.kind=kl, or more validation samples"
    inputs, _ = next(iter(workload.batches("validation", 1)))
    task, model = workload.task_type, workload.model
    with torch.no_grad(), evaluating(model):
        return task.equal_scores(task.read(task.forward(model, inputs), workload.output))
