"""Where the final fine-tune starts from: the closed form, or batch-norm statistics alone.

The closed form folds removed units into the weights that are left, which is worth most before any training; a longer
training may get further from the dense model's own weights. Which one that is depends on the data and on the length,
so `finish.start: auto` tries both for a few steps and asks the validation split.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from ..evaluation.recovery import Recovery
from ..pruning.plan import Plan
from ..pruning.surgery import prune
from ..workloads.adapter import TuneJob
from .prepare import Experiment

RECOVERED, STATISTICS, AUTO = "recovered", "statistics", "auto"
CLOSED_FORMS = ("bias", "reconstruct")
# Steps of each trial: a tenth of the fine-tune, within these bounds.
FEWEST, MOST = 10, 200


def tuning_start(
    experiment: Experiment, model: nn.Module, plan: Plan | None, seed: int
) -> tuple[nn.Module, dict[str, Any]]:
    """The model to fine-tune, and what results.json says of the choice; ``model`` is the recovered one.

    Nothing is chosen for the dense model, where the recovery has no closed form, and for plans in several stages.
    """
    wanted = experiment.config.finish.start
    steps = experiment.config.recovery.steps
    if wanted == RECOVERED or plan is None or not set(CLOSED_FORMS) & set(steps):
        return model, {}
    if wanted == STATISTICS:
        return _with_statistics(experiment, plan), {"start": STATISTICS}
    losses = {}
    for name in (RECOVERED, STATISTICS):
        losses[name] = _after_few_steps(experiment, plan, name, seed)
    best = min(losses, key=losses.__getitem__)  # of equal ones the recovered one
    facts = {"start": best, "start_losses": {name: round(loss, 6) for name, loss in losses.items()}}
    return (model if best == RECOVERED else _with_statistics(experiment, plan)), facts


def trial_steps(experiment: Experiment) -> int:
    """Steps of each trial."""
    finish = experiment.config.finish
    whole = finish.epochs * experiment.workload.train_steps(finish.batch_size)
    return max(1, min(whole, max(FEWEST, min(MOST, whole // 10))))


def _after_few_steps(experiment: Experiment, plan: Plan, name: str, seed: int) -> float:
    """Validation loss after a short fine-tune whose learning rate falls to zero as that of the whole one does."""
    workload = experiment.workload
    model = (
        experiment.evaluator.build(plan.widths) if name == RECOVERED else _with_statistics(experiment, plan)
    )
    job = TuneJob(seed, steps=trial_steps(experiment), phase=f"trial from {name}")
    return workload.evaluate(
        workload.fine_tune(model, experiment.config.finish, job).model, "validation"
    ).loss


def _with_statistics(experiment: Experiment, plan: Plan) -> nn.Module:
    """The cut model after the recovery without its closed forms."""
    settings = experiment.config.recovery
    left = tuple(step for step in settings.steps if step not in CLOSED_FORMS)
    evaluator = experiment.evaluator
    slim = prune(experiment.workload.model, plan)
    recovery = Recovery(
        experiment.workload,
        experiment.space,
        replace(settings, steps=left or ("none",)),
        importance=evaluator.importance,
        calibration=evaluator.calibration,
    )
    recovery(slim, plan)
    return slim
