"""The fine-tune's loop: transformers' Trainer around a `TokenLoss`, with checkpoints that it goes on from."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from ...config.training import FinishConfig
from ...errors import ArtifactError, ConfigError
from ...recovery.finetune import Progress, Schedule
from ...utils.checkpoints import require_same, settings_key
from ...utils.files import read_json, write_json_atomic
from ...utils.launched import process_count
from ...utils.values import is_finite
from ..linear import is_dropped
from ..transformers_internals import TrainedOnly, lend_block_classes, use_one_gpu
from .loss import TokenLoss

if TYPE_CHECKING:
    from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

MARK = "rlprune.json"
_LOOK_SECONDS = 0.25
# Tokens of one forward and backward pass: what a small machine holds, and what keeps a GPU busy.
_TOKENS_AT_ONCE = {"cpu": 4096, "other": 16384}


@dataclass(frozen=True)
class Work:
    """What one fine-tune does: its settings, length and names."""

    settings: FinishConfig
    method: str
    steps: int
    lr: float
    seed: int
    phase: str
    save_steps: int | None = None
    before: int = 0
    whole: int | None = None

    @property
    def plain(self) -> bool:
        """Whether transformers has the schedule by name."""
        return self.whole is None and self.settings.schedule in ("cosine", "linear")

    @property
    def schedule(self) -> Schedule:
        """The schedule of the learning rate, where transformers has no name for it."""
        s, before = self.settings, 0 if self.whole is None else self.before
        return Schedule(
            self.steps, self.lr, warmup=s.warmup, shape=s.schedule, before=before, whole=self.whole
        )


class Student(nn.Module):
    """The model with its loss, as one module: DDP and FSDP see every parameter used in one forward.

    ``forward(input_ids (B, L), targets (B, L), weights (B,)) -> {"loss": scalar}``; the last two are
    those of `TokenLoss`.
    """

    accepts_loss_kwargs = False  # the loss is a mean: the Trainer shares it among accumulated batches

    def __init__(self, model: nn.Module, loss: TokenLoss) -> None:
        super().__init__()
        self.model = model
        self.loss = loss
        lend_block_classes(model, self)

    def forward(
        self, input_ids: Tensor, targets: Tensor | None = None, weights: Tensor | None = None
    ) -> dict[str, Tensor]:
        return {"loss": self.loss(input_ids, targets, weights)}


@dataclass(frozen=True)
class Lessons:
    """Sequences in the order in which they are learned: ``ids`` (L,) each, and ``targets`` (L,) where some tokens are
    not learned (-100)."""

    ids: Sequence[Tensor]
    targets: Sequence[Tensor] | None = None

    def rows(self, step: int) -> list[dict[str, Tensor]]:
        """Rows for the Trainer, ``step`` sequences an optimizer step.

        A step's sequences are dealt out to processes and to accumulated passes. So that every learned token has the
        same say wherever it lands, its weight is the step's sequences over the step's learned tokens.
        """
        if self.targets is None:
            return [{"input_ids": ids} for ids in self.ids]
        found = []
        for start in range(0, len(self.ids), step):
            targets = self.targets[start : start + step]
            learned = sum(int((t[1:] != -100).sum()) for t in targets)
            weight = torch.tensor(len(targets) / max(1, learned))
            found += [
                {"input_ids": ids, "targets": t, "weights": weight}
                for ids, t in zip(self.ids[start : start + step], targets, strict=True)
            ]
        return found


def _stacked(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    names = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    return {name: found if found.is_floating_point() else found.long() for name, found in names.items()}


def run_trainer(
    model: nn.Module,
    loss: TokenLoss,
    lessons: Lessons,
    work: Work,
    out: Path,
    progress: Progress | None,
    *,
    saving: bool,
) -> tuple[float, nn.Module | None]:
    """Train what wants gradients in ``model``; the sequences are used once each, in order.

    Returns the mean loss of the last tenth of the steps, and None; under FSDP instead of None a copy of
    the trained model on the CPU of the main process (its shards cannot be merged where they are).

    Raises:
        ConfigError: accelerate is missing, or the batch cannot be shared among the processes.
        ArtifactError: ``out`` holds the state of a fine-tune with other settings.
    """
    trainer_class, watch_class = _classes()
    device = next(model.parameters()).device
    arguments = _arguments(work, device, len(lessons.ids[0]), out, saving, _has_dropped(model))
    whole = _copy_for_shards(model)
    student = Student(model, loss)
    watch = watch_class(work, _key(model, work), progress)
    trainer = trainer_class(
        model=student,
        args=arguments,
        train_dataset=lessons.rows(work.settings.batch_size),
        data_collator=_stacked,
        callbacks=[watch],
    )
    trainer.watch, trainer.own_schedule = watch, None if work.plain else work.schedule
    with _quiet(trainer):
        trainer.train(resume_from_checkpoint=_checkpoint(out, watch.key) if saving else None)
    if whole is not None:
        state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
        if trainer.is_world_process_zero():
            whole.load_state_dict({n.removeprefix("model."): t for n, t in state.items()})
    model.to(device)
    return watch.mean, whole


def _classes() -> tuple[Any, Any]:
    """The Trainer and its callback; made here because transformers' Trainer takes a second to import."""
    try:
        import accelerate  # noqa: F401
        from transformers import Trainer, TrainerCallback
    except ImportError as error:
        raise ConfigError(
            "finish.steps: the fine-tune of a language model needs the package accelerate; "
            "install it with: pip install 'rlprune[language]'"
        ) from error

    class Watch(_Watch, TrainerCallback):  # type: ignore[misc]
        pass

    class TokenTrainer(_Watched, TrainedOnly, Trainer):  # type: ignore[misc]
        pass

    return TokenTrainer, Watch


class _Watched:
    """Shows every loss to a watch, and follows a schedule that transformers has no name for."""

    watch: Any
    own_schedule: Schedule | None
    lr_scheduler: Any

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> Any:
        own = self.own_schedule
        if own is None or optimizer is None or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)  # type: ignore[misc]
        self.lr_scheduler = LambdaLR(optimizer, lambda step: own.rate(step) / own.lr)
        return self.lr_scheduler

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], *args: object, **kwargs: object
    ) -> Any:
        loss = super().compute_loss(model, inputs, *args, **kwargs)  # type: ignore[misc]
        self.watch.see(loss[0] if isinstance(loss, tuple) else loss)
        return loss


class _Watch:
    """Shows the progress, marks whole checkpoints, and stops a run that diverged."""

    def __init__(self, work: Work, key: str, progress: Progress | None) -> None:
        self.work, self.key, self.progress = work, key, progress
        self._micro: list[Tensor] = []
        self._tail: list[float] = []
        self._last = time.monotonic()

    @property
    def mean(self) -> float:
        """Mean loss of the last tenth of the steps."""
        return sum(self._tail) / len(self._tail) if self._tail else math.nan

    def see(self, loss: Tensor) -> None:
        self._micro.append(loss.detach())

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        steps, done = self.work.steps, state.global_step
        ends = done > steps - max(1, steps // 10)
        if ends or time.monotonic() - self._last > _LOOK_SECONDS:
            now = float(torch.stack(self._micro).mean())
            self._last = time.monotonic()
            self._tail += [now] if ends or not math.isfinite(now) else []
            if self.progress is not None:
                self.progress(self.work.phase, done, steps, {"loss": now})
            control.should_training_stop |= not math.isfinite(now)
        self._micro.clear()

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if state.is_world_process_zero:
            mark = {"version": 1, "key": self.key, "tail": [x for x in self._tail if math.isfinite(x)]}
            write_json_atomic(Path(args.output_dir or "") / f"checkpoint-{state.global_step}" / MARK, mark)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        folder = Path(args.output_dir or "") / f"checkpoint-{state.global_step}"
        if (folder / MARK).is_file():
            self._tail = _tail_of(folder / MARK)


def _tail_of(mark: Path) -> list[float]:
    """The last losses before a checkpoint; ArtifactError where its mark is damaged."""
    kept = read_json(mark)
    tail = kept.get("tail") if isinstance(kept, dict) else None
    if not isinstance(tail, list) or not all(map(is_finite, tail)):
        raise ArtifactError(f"{mark}: damaged: the field 'tail' is not a list of numbers; delete the folder")
    return tail


def _arguments(work: Work, device: torch.device, length: int, out: Path, saving: bool, unused: bool) -> Any:
    from transformers import TrainingArguments

    micro, rounds = share_batch(work.settings.batch_size, length, device)
    bf16 = work.settings.mixed_precision and device.type == "cuda"
    bf16 = bf16 and torch.cuda.get_device_capability(device)[0] >= 8
    arguments = TrainingArguments(
        output_dir=str(out),
        max_steps=work.steps,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=rounds,
        learning_rate=work.lr,
        weight_decay=work.settings.weight_decay,
        lr_scheduler_type=work.settings.schedule if work.plain else "constant",
        warmup_steps=math.ceil(work.settings.warmup * work.steps) if work.plain else 0,
        optim="adamw_torch",
        seed=work.seed % 2**32,
        bf16=bf16,
        use_cpu=device.type == "cpu",
        save_strategy="steps" if saving else "no",
        save_steps=work.save_steps or max(1, math.ceil(work.steps / 10)),
        save_total_limit=2,
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=device.type == "cuda",
        ddp_find_unused_parameters=unused,
    )
    use_one_gpu(arguments)
    return arguments


def share_batch(batch_size: int, length: int, device: torch.device) -> tuple[int, int]:
    """Sequences of one pass and passes of one step, on each process; raises ConfigError where it does not fit.

    ``batch_size`` counts the sequences of one optimizer step over all processes that ``accelerate launch``
    started, so that the result does not depend on how many there are.
    """
    world = process_count()
    if batch_size % world:
        raise ConfigError(
            f"finish.batch_size: {batch_size} cannot be shared among {world} processes; use a multiple of {world}"
        )
    mine = batch_size // world
    limit = max(1, _TOKENS_AT_ONCE.get(device.type, _TOKENS_AT_ONCE["other"]) // length)
    micro = max(d for d in range(1, mine + 1) if mine % d == 0 and d <= limit)
    return micro, mine // micro


def _has_dropped(model: nn.Module) -> bool:
    """Whether a part was dropped: what fed it gets no gradient, which DDP has to be told."""
    return any(is_dropped(module) for module in model.modules())


def _copy_for_shards(model: nn.Module) -> nn.Module | None:
    """Under FSDP a copy of the model on the CPU for the trained weights; else None."""
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() not in ("true", "1"):
        return None
    import copy

    return copy.deepcopy(model).cpu()


def _key(model: nn.Module, work: Work) -> str:
    """Hash of what has to be equal for a checkpoint to fit: shapes and settings."""
    shapes = {n: list(p.shape) for n, p in model.named_parameters()}
    s = work.settings
    facts: list[object] = [s.rank, s.alpha, s.dropout, s.batch_size, s.weight_decay, s.distill, s.temperature]
    facts += [s.schedule, s.warmup, s.soft, s.adapters]
    return settings_key([shapes, work.method, work.steps, work.lr, work.seed, work.before, work.whole, facts])


def _checkpoint(out: Path, key: str) -> str | None:
    """The newest whole checkpoint of this very fine-tune, None without one; others are refused."""
    found = []
    for folder in out.glob("checkpoint-*"):
        step = folder.name.removeprefix("checkpoint-")
        if not step.isdigit() or not (folder / MARK).is_file():
            continue  # written halfway when the run was killed
        require_same(folder, read_json(folder / MARK), {"key": key})
        found.append((int(step), str(folder)))
    return max(found)[1] if found else None


@contextlib.contextmanager
def _quiet(trainer: Trainer) -> Iterator[None]:
    """No table of losses on standard output, no notes: the run shows its own bar."""
    from transformers.trainer_callback import PrinterCallback
    from transformers.utils import logging

    trainer.remove_callback(PrinterCallback)
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
