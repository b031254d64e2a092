"""Scores on training samples without their labels, next to those on the validation split.

A search compares hundreds of plans on the same few validation samples and ends with one that suits their
peculiarities. What a divergence from the dense model compares needs no label, so that samples of the training split
can be scored as well (``score.unlabelled``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from ..config.config import AUTO, ScoreConfig
from ..errors import ConfigError, DataError
from ..utils.modes import evaluating
from ..utils.pytrees import Inputs, take
from ..workloads.base import Workload
from ..workloads.judge import Judge, Judgement
from ..workloads.metrics import Meter, Read
from ..workloads.tasks.base import Scale

SAMPLES = 1_000
"""Samples, those of the validation split included, up to which `auto` adds training samples."""


def wanted(workload: Workload, settings: ScoreConfig) -> int:
    """Training samples that a score reads in addition, by ``score.unlabelled``; no more than there are.

    Raises:
        ConfigError: a number is given where such samples cannot be scored.
        DataError: a number is given, and there are none.
    """
    asked = settings.unlabelled
    if asked == 0:
        return 0
    obstacle = _obstacle(workload, settings)
    if not isinstance(asked, str):
        if obstacle is not None:
            raise ConfigError(f"score.unlabelled: {obstacle}; allowed here: 0, {AUTO}")
        if not workload.size("train"):
            raise DataError("score.unlabelled: the split 'train' is empty; give 0")
        return min(asked, workload.size("train"))
    # Who limits the samples of a score limits what it costs.
    if obstacle is not None or settings.samples is not None or settings.rungs:
        return 0
    missing = SAMPLES - workload.size("validation")
    return min(missing, workload.size("train")) if missing > 0 and _gives_a_row(workload) else 0


def _obstacle(workload: Workload, settings: ScoreConfig) -> str | None:
    """Why no training sample can be scored, if so."""
    if settings.kind != "kl":
        return f"of score.kind {settings.kind!r} it is not known that it needs no labels, as of kl"
    if not workload.adapter.unlabelled_builds:
        return f"{workload.adapter.models} are scored on the validation split alone"
    who = workload.whole_score(settings.kind)
    if who is not None:
        return f"{who} judges a model by the validation split as a whole"
    if not workload.task_type.compares:
        return f"task {workload.task_type.name!r} does not compare outputs"
    if not workload.repeats_training:
        return (
            f"workload {workload.name!r} does not say that its training split is the same each time it is read "
            "(repeats_training)"
        )
    return None


def _gives_a_row(workload: Workload) -> bool:
    """Whether an output is one row of numbers a sample: maps and boxes would cost far more."""
    inputs, _ = next(iter(workload.batches("validation", 1)), (None, None))
    if not isinstance(inputs, Tensor):
        return False
    with torch.no_grad(), evaluating(workload.model):
        rows = workload.logit_rows(workload.model, inputs[:1])
    return rows is not None and len(rows) == 1


class WithTrainingSamples(Judge):
    """Another judge's judgements, with the scores of training samples added to those of its last sample.

    Loss, metric and count stay those of the validation split.
    """

    def __init__(self, judge: Judge, training: TrainingSamples) -> None:
        self._judge, self._training = judge, training

    def __call__(self, model: nn.Module, start: int = 0, stop: int | None = None) -> Judgement:
        found = self._judge(model, start, stop)
        if stop is not None:
            return found
        scores, rows = self._training(model, self._judge.scale)
        outputs = None if rows is None or found.outputs is None else torch.cat([found.outputs, rows])
        return dataclasses.replace(found, scores=torch.cat([found.scores, scores]), outputs=outputs)

    def ask_dense(self, start: int, stop: int | None) -> None:
        self._judge.ask_dense(start, stop)

    def merge(self, parts: Sequence[Judgement]) -> Judgement:
        return self._judge.merge(parts)

    def new_meter(self) -> Meter | None:
        return self._judge.new_meter()


class TrainingSamples:
    """Scores models on the first ``count`` samples of the training split; the dense answers are kept."""

    def __init__(self, workload: Workload, count: int) -> None:
        self._workload, self._count = workload, count
        self._dense: list[Read] | None = None

    def __call__(self, model: nn.Module, scale: Scale = None) -> tuple[Tensor, Tensor | None]:
        """Scores (n,) float64, and the outputs of all samples where they are rows, (n, C).

        ``scale`` is that of the scores on the validation split, which these are averaged with.
        """
        task, choice = self._workload.task_type, self._workload.output
        dense = self._answers()
        scores, rows = [], []
        with torch.no_grad(), evaluating(model):
            for like, inputs in zip(dense, self._inputs(), strict=True):
                read = task.read(task.forward(model, inputs, like), choice)
                scores.append(-task.divergence(like, read, scale))
                rows.append(task.rows(read))
        logits = [row for row in rows if row is not None]
        found = torch.cat(scores).cpu().double()
        return found, torch.cat(logits) if len(logits) == len(rows) else None

    def _answers(self) -> list[Read]:
        if self._dense is None:
            task, model = self._workload.task_type, self._workload.reference
            with torch.no_grad(), evaluating(model):
                self._dense = [
                    task.kept(task.read(task.forward(model, inputs), self._workload.output))
                    for inputs in self._inputs()
                ]
        return self._dense

    def _inputs(self) -> Iterator[Inputs]:
        """Batches of inputs; a workload may ignore the limit that it is asked for."""
        left = self._count
        for inputs, targets in self._workload.batches("train", self._count):
            size = self._workload.samples_in(inputs, targets)
            yield inputs if size <= left else take(inputs, slice(0, left))
            left -= size
            if left <= 0:
                return
