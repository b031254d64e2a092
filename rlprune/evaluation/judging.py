"""Judging candidates on the search's samples or on the whole validation split, in parts where rungs cut it.

Either way training samples without labels may be scored as well (`training_samples`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import cached_property

from torch import nn

from ..config.config import AUTO, ScoreConfig
from ..workloads.base import Workload
from ..workloads.judge import Judge, Judgement
from .training_samples import TrainingSamples, WithTrainingSamples, wanted


class Judging:
    """The judges of one workload by its score settings."""

    def __init__(self, workload: Workload, settings: ScoreConfig) -> None:
        self._workload, self._settings = workload, settings
        if settings.unlabelled != AUTO:
            wanted(workload, settings)  # refused before anything is measured
        self._judges = {False: self._new(settings.samples)}

    def _new(self, limit: int | None) -> Judge:
        return self._workload.judge(self._settings.kind, limit, top_k=self._settings.top_k)

    def of(self, full: bool) -> Judge:
        """The judge of the search's samples, or of the whole validation split."""
        if full not in self._judges:
            self._judges[full] = self._new(None)
        judge, training = self._judges[full], self._training
        return judge if training is None else WithTrainingSamples(judge, training)

    @cached_property
    def unlabelled(self) -> int:
        """Training samples that every whole score reads in addition."""
        return wanted(self._workload, self._settings)

    @cached_property
    def _training(self) -> TrainingSamples | None:
        return TrainingSamples(self._workload, self.unlabelled) if self.unlabelled else None

    @property
    def samples(self) -> int:
        """Validation samples (images, sequences) that a whole score in the search reads."""
        size = int(self._workload.size("validation"))
        return size if self._settings.samples is None else min(self._settings.samples, size)

    @property
    def rungs(self) -> tuple[int, ...]:
        """Sample counts at which successive halving may drop a candidate, rising, all below ``samples``."""
        rungs = self._settings.rungs
        return tuple(r for r in sorted(set(rungs)) if r < self.samples) if rungs else ()

    def ask_dense(self, parts: Sequence[Judgement], full: bool, samples: int | None) -> None:
        """Have the dense model's answers to what is left, before a candidate is in memory as well."""
        for span in self._spans(parts, full, samples):
            self.of(full).ask_dense(*span)

    def __call__(
        self, model: nn.Module, parts: list[Judgement], full: bool, samples: int | None
    ) -> Judgement:
        """Judge on what ``parts`` have not read, up to ``samples``, and add to them; always cut at the rungs,
        so that the result does not depend on where a candidate paused."""
        judge = self.of(full)
        for start, stop in self._spans(parts, full, samples):
            part = judge(model, start, stop)
            # Nobody keeps the outputs of what may be dropped half-scored.
            parts.append(dataclasses.replace(part, outputs=None) if self.rungs else part)
        return judge.merge(parts)

    def _spans(
        self, parts: Sequence[Judgement], full: bool, samples: int | None
    ) -> list[tuple[int, int | None]]:
        """What is left to judge after some parts, up to ``samples``, cut at the rungs."""
        rungs = () if full else self.rungs
        spans: list[tuple[int, int | None]] = list(zip((0, *rungs), (*rungs, None), strict=True))
        return [span for span in spans[len(parts) :] if samples is None or span[0] < samples]
