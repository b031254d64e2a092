"""Short recovery of a cut model before it is scored: bias, reconstruct, bn, finetune, always in this order."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..config import RecoveryConfig
from .compensation import BiasCompensation
from .finetune import DistillTargets, fit
from .grams import Grams, group_consumers, unit_consumers
from .grams import collect as collect_grams
from .language_training import train_language
from .nested import NestedReconstruction
from .plan import Plan
from .reconstruct import Reconstruction, evaluating
from .space import PruningSpace
from .statistics import collect as collect_statistics
from .torch_internals import BATCH_NORM

LESSON_BATCH = 64
"""Images in a batch of the step `finetune`."""
LANGUAGE_BATCH = 8
"""Sequences in a batch of the step `finetune` of a language model."""

RECOVERIES = {
    "none": "leave the cut model as it is",
    "bias": "put the mean of what the removed units gave into the consumers' biases (language models; no gradient)",
    "reconstruct": "fold removed units into the kept weights by ridge regression (no gradient)",
    "bn": "recompute batch-norm statistics on calibration data",
    "finetune": "k steps of SGD (AdamW for language models), distilled from the dense model on request",
}


class Recovery:
    """The configured steps for one dense model; Gram matrices and dense logits are computed once.

    In a language model `reconstruct` solves for all widths from one factor a layer (:mod:`.nested`); with
    `bias` beside it, its regressions get an intercept, which is the bias compensation of what is left.

    Args:
        model: the model that candidates are cut from (the workload's, or an earlier stage of it).
        importance: G arrays of unit scores that plans are made with: their ranking is factorised.
        grams: from ``grams.collect`` for this model, for language models; collected here when not given.
            They are used up: each matrix is freed when its factor is there.
    """

    def __init__(
        self,
        workload: Any,
        space: PruningSpace,
        settings: RecoveryConfig,
        model: nn.Module | None = None,
        importance: Sequence[Any] | None = None,
        grams: Grams | None = None,
    ) -> None:
        self._workload = workload
        self._space = space
        self._settings = settings
        self._model = workload.model if model is None else model
        self._closed_form = self._prepare(space, importance, grams)
        self._lesson: list[tuple[Tensor, ...]] | None = None

    def _prepare(
        self, space: PruningSpace, importance: Sequence[Any] | None, grams: Grams | None
    ) -> Callable[[nn.Module, Plan], None] | None:
        settings, model = self._settings, self._model
        bias = "bias" in settings.steps
        if bias:
            group_consumers(space, "recovery.steps: 'bias'")
        if "reconstruct" in settings.steps:
            if not unit_consumers(space):
                return Reconstruction(model, space, self._calibration(), settings.ridge)
            if grams is None:
                grams = collect_grams(model, space, self._calibration())
            return NestedReconstruction(
                model, space, grams, importance, settings.ridge, intercept=bias, shrink=settings.shrink
            )
        if not bias:
            return None
        if grams is None:
            inputs = collect_statistics(model, space, self._calibration()).inputs
            means = {name: torch.from_numpy(moments.mean) for name, moments in inputs.items()}
        else:
            means = {c.module: grams[c.module].mean for c in unit_consumers(space)}
        return BiasCompensation(model, space, means)

    def __call__(self, slim: nn.Module, plan: Plan) -> None:
        """Recover ``slim`` in place; the same plan always gives the same weights (CPU, fixed threads)."""
        if self._closed_form is not None:
            self._closed_form(slim, plan)
        if "bn" in self._settings.steps:
            recalibrate(slim, self._calibration())
        if "finetune" in self._settings.steps:
            self._finetune(slim)

    @property
    def nbytes(self) -> int:
        """Bytes that the closed form holds between candidates (language models)."""
        return getattr(self._closed_form, "nbytes", 0)

    def _calibration(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self._workload.batches("calibration", self._settings.images)

    def _finetune(self, slim: nn.Module) -> None:
        settings = self._settings
        if getattr(self._workload, "language", False):
            self._train_language(slim)
            return
        if self._lesson is None:
            self._lesson = self._with_logits(settings.finetune_steps)
        lesson = self._lesson
        fit(
            slim,
            lambda generator: lesson,
            self._workload.loss,
            steps=settings.finetune_steps,
            lr=0.01 if settings.finetune_lr is None else settings.finetune_lr,
            distill=DistillTargets() if settings.distill else None,
            generator=torch.Generator().manual_seed(0),
            phase="recovery",
        )

    def _train_language(self, slim: nn.Module) -> None:
        """Steps of AdamW with the dense model as the teacher: logits of text are too large to be kept.

        Every stage of an incremental pruning has text of its own: the seed is a hash of the widths it cuts.
        """
        settings = self._settings
        seed = zlib.crc32(self._space.widths.tobytes())
        if self._lesson is None:
            generator = torch.Generator().manual_seed(seed)
            batches = self._workload.train_batches(generator, LANGUAGE_BATCH)
            self._lesson = list(itertools.islice(batches, settings.finetune_steps))
        train_language(
            slim,
            self._lesson,
            steps=settings.finetune_steps,
            lr=settings.finetune_lr,
            teacher=self._workload.model if settings.distill else None,
            seed=seed,
        )

    def _with_logits(self, steps: int) -> list[tuple[Tensor, ...]]:
        """The first train batches of a fixed shuffle with the dense model's outputs on them."""
        generator = torch.Generator().manual_seed(0)
        batches = itertools.islice(self._workload.train_batches(generator, LESSON_BATCH), steps)
        with torch.no_grad(), evaluating(self._model):
            return [(inputs, targets, self._model(inputs)) for inputs, targets in batches]


def recalibrate(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Recompute all batch-norm statistics as the average over ``batches``, in place (EagleEye, arXiv 2007.02491).

    Everything but the batch norms stays in eval mode; modes and momenta are restored.
    """
    norms = [m for m in model.modules() if isinstance(m, BATCH_NORM) and m.track_running_stats]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    with torch.no_grad(), evaluating(model):
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the plain average over all batches
            norm.train()
        for inputs, _ in batches:
            model(inputs)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
