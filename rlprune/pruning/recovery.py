"""Short recovery of a cut model before it is scored: reconstruct, bn, finetune, always in this order."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..config import RecoveryConfig
from .finetune import DistillTargets, fit
from .plan import Plan
from .reconstruct import Reconstruction, evaluating
from .space import PruningSpace

_BATCHNORM = nn.modules.batchnorm._BatchNorm
_LESSON_BATCH = 64

RECOVERIES = {
    "none": "leave the cut model as it is",
    "reconstruct": "fold removed units into the kept weights by ridge regression (no gradient)",
    "bn": "recompute batch-norm statistics on calibration data",
    "finetune": "k steps of SGD, with distillation from the dense model's cached logits on request",
}


class Recovery:
    """The configured steps for one dense model; Gram matrices and dense logits are computed once.

    Args:
        model: the model that candidates are cut from (the workload's, or an earlier stage of it).
    """

    def __init__(
        self, workload: Any, space: PruningSpace, settings: RecoveryConfig, model: nn.Module | None = None
    ) -> None:
        self._workload = workload
        self._settings = settings
        self._model = workload.model if model is None else model
        self._reconstruction: Reconstruction | None = None
        if "reconstruct" in settings.steps:
            self._reconstruction = Reconstruction(self._model, space, self._calibration(), settings.ridge)
        self._lesson: list[tuple[Tensor, ...]] | None = None

    def __call__(self, slim: nn.Module, plan: Plan) -> None:
        """Recover ``slim`` in place; the same plan always gives the same weights (CPU, fixed threads)."""
        if self._reconstruction is not None:
            self._reconstruction(slim, plan)
        if "bn" in self._settings.steps:
            recalibrate(slim, self._calibration())
        if "finetune" in self._settings.steps:
            self._finetune(slim)

    def _calibration(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self._workload.batches("calibration", self._settings.images)

    def _finetune(self, slim: nn.Module) -> None:
        settings = self._settings
        if self._lesson is None:
            self._lesson = self._with_logits(settings.finetune_steps)
        lesson = self._lesson
        fit(
            slim,
            lambda generator: lesson,
            self._workload.loss,
            steps=settings.finetune_steps,
            lr=settings.finetune_lr,
            distill=DistillTargets() if settings.distill else None,
            generator=torch.Generator().manual_seed(0),
            phase="recovery",
        )

    def _with_logits(self, steps: int) -> list[tuple[Tensor, ...]]:
        """The first train batches of a fixed shuffle with the dense model's outputs on them."""
        generator = torch.Generator().manual_seed(0)
        batches = itertools.islice(self._workload.train_batches(generator, _LESSON_BATCH), steps)
        with torch.no_grad(), evaluating(self._model):
            return [(inputs, targets, self._model(inputs)) for inputs, targets in batches]


def recalibrate(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Recompute all batch-norm statistics as the average over ``batches``, in place (EagleEye, arXiv 2007.02491).

    Everything but the batch norms stays in eval mode; modes and momenta are restored.
    """
    norms = [m for m in model.modules() if isinstance(m, _BATCHNORM) and m.track_running_stats]
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
