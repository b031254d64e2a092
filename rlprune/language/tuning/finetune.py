"""The final fine-tune of a pruned language model: LoRA, all parameters, SAAP's groups or SPP's factors.

It runs through transformers' Trainer and accelerate: on one device with nothing set up, on several GPUs or sharded by
FSDP in the processes that ``accelerate launch`` starts (see `rlprune.experiments.tune`). ``finish.batch_size`` counts
the sequences of one optimizer step over all processes; passes are accumulated so that one holds few enough tokens. GPUs
that have bfloat16 compute in it. Checkpoints go into a folder, and a killed fine-tune goes on.
"""

from __future__ import annotations

import contextlib
import math
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ...config.training import FinishConfig
from ...errors import ConfigError, DataError, near_miss
from ...recovery.finetune import Progress
from ...utils.randomness import isolated_randomness
from ...workloads.base import Workload
from .loss import ADAPTER_LR, FULL_LR, TokenLoss, full_precision, learned
from .peft import attached
from .trainer import Lessons, Work, run_trainer

METHODS = {
    "lora": "low-rank adapters on the linear layers of attention and feed-forward (peft)",
    "full": "all parameters",
    "group": "SAAP: a scale for each row and group of columns, and low rank",
    "spp": "SPP: factors of rows and columns that multiply the weights",
}


@dataclass(frozen=True)
class TuneResult:
    """What a fine-tune did.

    ``model`` is the tuned model, merged (the one given, but under FSDP a copy on the CPU of the main
    process); ``loss`` the mean over the last tenth of the steps, of this process's share, NaN or infinite
    when it diverged; ``tokens`` those of all steps; ``trained`` the number of trained parameters.
    """

    model: nn.Module
    steps: int
    loss: float
    tokens: int
    trained: int
    seconds: float


def tune(
    workload: Workload,
    model: nn.Module,
    settings: FinishConfig,
    *,
    seed: int,
    steps: int | None = None,
    out: str | Path | None = None,
    progress: Progress | None = None,
    phase: str = "fine-tune",
    save_steps: int | None = None,
    before: int = 0,
    whole: int | None = None,
) -> TuneResult:
    """Fine-tune a causal language model on the workload's train split, in place, and merge what was learned.

    AdamW, a learning rate by ``settings.schedule``, gradients clipped to norm 1. The loss is that of `TokenLoss`: with
    ``settings.distill`` the dense model (``workload.model``) is the teacher. The model is a plain one again afterwards,
    in eval mode: the same names, tied weights still tied. On a CPU with a fixed number of threads the result depends on
    the seed alone, and a resumed fine-tune gives the bits of an uninterrupted one; global random states stay.

    Args:
        workload: ``train_batches(generator, batch_size)`` gives (input_ids, targets), (B, L); -100 is not learned.
        model: the pruned model, any causal language model of transformers.
        settings: section ``finish``; ``lr`` None means 1e-4 for adapters and 2e-5 for all parameters.
        seed: of the data's order, the adapters' start and dropout.
        steps: optimizer steps; None for ``settings.steps``, 0 changes nothing.
        out: folder of the Trainer's checkpoints; where it holds some of this very fine-tune, it goes on.
        progress: called as progress(phase, done, total, values).
        save_steps: steps between two checkpoints; None for a tenth of all.
        before: steps of earlier fine-tunes of one seed, whose sequences are passed over.
        whole: steps of all of them where they have one schedule; None: this one has its own.

    Raises:
        ConfigError: an unknown method, or a package of the extra ``language`` is missing.
        DataError: the train split is empty.
        ArtifactError: ``out`` holds the state of a fine-tune with other settings.
    """
    _check_method(settings.method)
    started, lr = time.monotonic(), learning_rate(settings.lr, settings.method)
    total = settings.steps if steps is None else steps
    if total < 1:
        return TuneResult(model, 0, math.nan, 0, 0, 0.0)
    work = Work(settings, settings.method, total, lr, seed, phase, save_steps, before, whole)
    with ExitStack() as stack:
        stack.enter_context(_isolated())
        folder = Path(out) if out is not None else Path(stack.enter_context(tempfile.TemporaryDirectory()))
        lessons = _lessons(workload, total, settings.batch_size, seed, before)
        stack.enter_context(torch.enable_grad())
        if settings.method == "full":
            stack.enter_context(full_precision(model))
        torch.manual_seed(seed)
        with attached(model, settings) as handle:
            teacher = workload.model if settings.distill else None
            loss = TokenLoss(model, teacher, settings.temperature, settings.soft)
            mean, gathered = run_trainer(model, loss, lessons, work, folder, progress, saving=out is not None)
            handle.model = gathered or model
        handle.model.eval()
    tokens, seconds = total * settings.batch_size * len(lessons.ids[0]), time.monotonic() - started
    return TuneResult(handle.model, total, mean, tokens, handle.trained, seconds)


def _check_method(method: str) -> None:
    if method not in METHODS:
        hint = near_miss(method, METHODS)
        raise ConfigError(f"finish.method: unknown method {method!r}{hint}; allowed: {', '.join(METHODS)}")


def learning_rate(lr: float | None, method: str) -> float:
    """The peak learning rate of a method where the settings leave it open: 2e-5 for `full`, else 1e-4."""
    if lr is not None:
        return lr
    return FULL_LR if method == "full" else ADAPTER_LR


def _lessons(workload: Workload, steps: int, batch_size: int, seed: int, done: int) -> Lessons:
    """Sequences (L,) of shuffled epochs of the train split, as int32 on the CPU: ``steps`` of them after ``done``."""
    before, count = done * batch_size, steps * batch_size
    generator = torch.Generator().manual_seed(seed)
    rows: list[Tensor] = []
    wanted: list[Tensor] = []
    masked = False
    while len(rows) < before + count:
        known = len(rows)
        for ids, targets in workload.train_batches(generator, batch_size):
            rows += ids.to("cpu", torch.int32).unbind(0)
            some = learned(ids, targets)
            masked |= some is not None
            wanted += (ids if some is None else some).to("cpu", torch.int32).unbind(0)
            if len(rows) >= before + count:
                break
        if len(rows) == known:
            raise DataError(f"workload {workload.name!r}: the split 'train' is empty")
    own = slice(before, before + count)
    return Lessons(rows[own], wanted[own] if masked else None)


@contextlib.contextmanager
def _isolated() -> Iterator[None]:
    """Leave all global random states, a GPU's too, as they were found."""
    with isolated_randomness(), torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        yield
