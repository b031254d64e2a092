"""One training loop for dense training, the short recovery of a candidate, and the final fine-tune.

SGD with Nesterov momentum, linear warm-up and, unless told otherwise, a cosine to zero (Loshchilov & Hutter 2017, arXiv
1608.03983), optional distillation (Hinton et al. 2015, arXiv 1503.02531), optional private state that a
killed run goes on from. On a CPU with a fixed number of threads the result depends on the generator
alone, and a resumed run gives the bits of an uninterrupted one.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import RlpruneError
from ..utils.checkpoints import StateFile, settings_key
from ..utils.launched import is_main_process
from ..utils.pytrees import Inputs, call, map_tensors
from .processes import Team, shared_statistics

Outputs = Any
Targets = Any
Item = tuple[Any, ...]
"""(inputs, targets), or (inputs, targets, teacher's outputs) where these are cached; all of them nests."""
Batches = Callable[[torch.Generator], Iterable[Item]]
"""Gives one epoch."""
Loss = Callable[[Outputs, Targets], Tensor]
Forward = Callable[..., Outputs]
"""``forward(model, inputs, targets, teacher's outputs or None)``: what the loss reads of a model."""
Progress = Callable[[str, int, int, dict[str, float]], None]
"""Called as progress(phase, done, total, values) a few times a second."""

_LOOK_SECONDS = 0.25
_LOOK_STEPS = 10


def softmax_distillation(outputs: Tensor, logits: Tensor, temperature: float) -> Tensor:
    """T^2 * KL(teacher || student), mean over all but the last dimension; shapes (..., classes)."""
    t = temperature
    student = F.log_softmax(outputs.float() / t, dim=-1).flatten(0, -2)
    teacher = F.log_softmax(logits.float() / t, dim=-1).flatten(0, -2)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * t * t


def plain_forward(model: nn.Module, inputs: Inputs, targets: Targets, like: Outputs = None) -> Outputs:
    """Call a model on its inputs alone."""
    return call(model, inputs)


@dataclass(frozen=True)
class DistillTargets:
    """Learn a teacher's outputs in addition to the labels.

    The loss is (1 - soft) * hard loss + soft * ``divergence(outputs, teacher's, T)`` at temperature T, by default
    T^2 * KL(teacher || student). Without a ``teacher`` every batch has to carry the teacher's outputs as a third part.
    """

    teacher: nn.Module | None = None
    temperature: float = 2.0
    soft: float = 0.75
    divergence: Callable[[Outputs, Outputs, float], Tensor] = softmax_distillation

    def loss(self, outputs: Outputs, teacher: Outputs) -> Tensor:
        """The loss of imitating the teacher's outputs, a scalar."""
        return self.divergence(outputs, teacher, self.temperature)


@dataclass(frozen=True)
class Schedule:
    """Optimizer settings: ``steps`` in all, peak ``lr``, the share of steps that warm up.

    ``weight_decay`` is an L2 penalty on tensors of two and more dimensions (no biases, no norms).
    ``mixed_precision`` is bfloat16 autocast, on CUDA devices that compute in it; ignored elsewhere.
    ``shape`` says how the rate falls after the warm-up (``finish.schedule``). A training that is one of several under
    one schedule begins at step ``before`` of ``whole`` steps in all; None: it has the schedule to itself.
    """

    steps: int
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warmup: float = 0.05
    mixed_precision: bool = False
    shape: str = "cosine"
    before: int = 0
    whole: int | None = None

    def rate(self, step: int) -> float:
        """Learning rate of step 0, 1, ...: linear warm-up, then what ``shape`` says."""
        steps = self.steps if self.whole is None else self.whole
        step += self.before
        warm = math.ceil(self.warmup * steps)
        if step < warm:
            return self.lr * (step + 1) / (warm + 1)
        return self.lr * _fallen(self.shape, (step - warm) / max(1, steps - warm), step / steps)


def _fallen(shape: str, share: float, of_all: float) -> float:
    """The rate as a share of its peak, when a share of the steps after the warm-up, or of all, is done."""
    if shape == "cosine":
        return 0.5 * (1 + math.cos(math.pi * share))
    if shape == "linear":
        return 1 - share
    if shape == "step":
        return 1.0 if share < 0.6 else 0.1 if share < 0.8 else 0.01
    # Warm-up, stable, decay (Hu et al. 2024, arXiv 2404.06395).
    return 1.0 if of_all < 0.9 else 1 - 0.9 * (of_all - 0.9) / 0.1


@dataclass(frozen=True)
class Watch:
    """Who follows a training: ``progress(phase, done, total, values)`` is called a few times a second.

    ``checkpoint`` is the file of the private state; where it exists, training goes on from there. It is written at
    most every ``save_seconds``, and at the end.
    """

    progress: Progress | None = None
    phase: str = "fine-tune"
    checkpoint: str | Path | None = None
    save_seconds: float = 60.0


@dataclass(frozen=True)
class FitResult:
    """Steps done, mean loss of the last epoch (NaN or infinite when it diverged), seconds of this call."""

    steps: int
    loss: float
    seconds: float


class _Content(TypedDict):
    """The private state of a training."""

    model: dict[str, Tensor]
    optimizer: dict[str, Any]
    step: int
    epoch_start: Tensor
    epoch_batches: int
    generator: Tensor
    sum: Tensor
    mean: float
    torch_random: Tensor
    cuda_random: NotRequired[Tensor]


class _State(StateFile):
    """What a killed run needs: model, optimizer, random states and counters, written every so many seconds."""

    def __init__(self, path: str | Path, key: str, seconds: float) -> None:
        super().__init__(path, {"key": key})
        self.seconds = seconds
        self.last = time.monotonic()

    def due(self) -> bool:
        return time.monotonic() - self.last >= self.seconds

    def save(self, content: Mapping[str, object]) -> None:
        super().save(content)
        self.last = time.monotonic()


def fit(
    model: nn.Module,
    batches: Batches,
    loss: Loss,
    schedule: Schedule,
    *,
    distill: DistillTargets | None = None,
    forward: Forward = plain_forward,
    generator: torch.Generator | None = None,
    watch: Watch | None = None,
    team: Team | None = None,
) -> FitResult:
    """Train ``model`` in place with SGD; it is left in eval mode.

    Args:
        batches: ``batches(generator)`` gives one epoch; it is called again until the steps are done.
        loss: ``loss(outputs, targets)``, a scalar mean.
        forward: how a model is called for its loss, see ``Forward``.
        generator: CPU generator of every draw, dropout included (seed 0 without one). It is advanced.
        watch: who is told of the progress, and where the private state lies.
        team: the processes that train this model together, each in this function; None for one alone. The first of
            them writes the state.

    Raises RlpruneError for no data, ArtifactError for an unwritable state or one of another run.
    """
    started = time.monotonic()
    if schedule.steps < 1:
        raise RlpruneError("fine-tuning: at least one step is needed (is the train split empty?)")
    generator = generator or torch.Generator().manual_seed(0)
    watch = watch or Watch()
    state = None
    if watch.checkpoint is not None:
        state = _State(watch.checkpoint, _key(model, schedule, distill), watch.save_seconds)
    device = _device(model)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        autocast = _autocast(device, schedule.mixed_precision)
        loop = _Loop(model, batches, loss, forward, schedule, distill, autocast, generator, team)
        shared = contextlib.nullcontext() if team is None else shared_statistics(model)
        with torch.enable_grad(), shared:
            mean = loop.run(state, watch.progress, watch.phase)
    model.eval()
    return FitResult(loop.step, mean, time.monotonic() - started)


class _Loop:
    """One training run: what changes from step to step, and how to save and restore it."""

    def __init__(
        self,
        model: nn.Module,
        batches: Batches,
        loss: Loss,
        forward: Forward,
        schedule: Schedule,
        distill: DistillTargets | None,
        autocast: Callable[[], torch.autocast],
        generator: torch.Generator,
        team: Team | None,
    ) -> None:
        self.team = team
        self.model, self.batches, self.hard_loss, self.forward = model, batches, loss, forward
        self.schedule, self.distill, self.autocast = schedule, distill, autocast
        self.generator = generator
        self.optimizer = _optimizer(model, schedule)
        self.device = _device(model)
        self.step = 0
        self.epoch_start = generator.get_state()  # the epoch in progress is drawn again from here
        self.epoch_batches = 0
        self.sum = torch.zeros((), dtype=torch.float64, device=self.device)  # of this epoch's losses
        self.mean = math.nan

    def run(self, state: _State | None, progress: Progress | None, phase: str) -> float:
        """All remaining steps; returns the mean loss of the last epoch."""
        saved = state.load() if state else None
        if saved is not None:
            self._restore(cast("_Content", saved))
        self.model.train()
        if self.distill is not None and self.distill.teacher is not None:
            self.distill.teacher.eval()
        last = time.monotonic()
        total = self.schedule.steps
        for batch in self._stream():
            self._one(batch)
            finished = self.step == total
            if finished or self._looks(last):
                self.mean = float(self.sum) / self.epoch_batches
                if progress is not None:
                    progress(phase, self.step, total, {"loss": self.mean})
                last = time.monotonic()
                if not math.isfinite(self.mean):
                    break
            if state is not None and is_main_process() and (finished or state.due()):
                state.save(self._content())
        return self.mean

    def _looks(self, last: float) -> bool:
        """Whether the loss is looked at after this step: by the clock, and in a team all at the same step."""
        return time.monotonic() - last > _LOOK_SECONDS if self.team is None else self.step % _LOOK_STEPS == 0

    def _stream(self) -> Iterator[Item]:
        """The batches that are left, epoch after epoch; a resumed epoch skips what it had done."""
        skip = self.epoch_batches
        while self.step < self.schedule.steps:
            self.generator.set_state(self.epoch_start)
            seen = 0
            for batch in self.batches(self.generator):
                seen += 1
                if seen <= skip:
                    continue
                self.epoch_batches = seen
                yield batch
                if self.step >= self.schedule.steps:
                    return
            if seen == 0:
                raise RlpruneError("fine-tuning: the train split gives no batch")
            skip = 0
            self.epoch_start = self.generator.get_state()
            self.epoch_batches = 0
            self.sum.zero_()

    def _one(self, batch: Item) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.rate(self.step)
        share = 1.0
        if self.team is not None:
            batch, share = self.team.share(batch)
        inputs, targets = batch[0], batch[1]
        self.optimizer.zero_grad(set_to_none=True)
        teacher = self._teacher(batch) if self.distill is not None and self.distill.soft > 0 else None
        with self.autocast():
            outputs = self.forward(self.model, inputs, targets, teacher)
        loss = self.hard_loss(map_tensors(_whole_precision, outputs), targets)
        if self.distill is not None and self.distill.soft > 0:
            soft = self.distill.loss(outputs, teacher)
            loss = (1 - self.distill.soft) * loss + self.distill.soft * soft
        if self.team is None:
            loss.backward()
        else:
            (loss * share).backward()
            loss = self.team.sum_gradients(self.model, loss * share)
        self.optimizer.step()
        self.sum += loss.detach()
        self.step += 1

    def _teacher(self, batch: Item) -> Outputs:
        assert self.distill is not None
        if self.distill.teacher is None:
            if len(batch) < 3:
                raise RlpruneError("distillation without a teacher needs its outputs as a batch's third part")
            return batch[2]
        with torch.no_grad(), self.autocast():
            return self.forward(self.distill.teacher, batch[0], batch[1], None)

    def _content(self) -> _Content:
        content: _Content = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "epoch_start": self.epoch_start,
            "epoch_batches": self.epoch_batches,
            "generator": self.generator.get_state(),
            "sum": self.sum,
            "mean": self.mean,
            "torch_random": torch.get_rng_state(),
        }
        if self.device.type == "cuda":
            content["cuda_random"] = torch.cuda.get_rng_state(self.device)
        return content

    def _restore(self, content: _Content) -> None:
        self.model.load_state_dict(content["model"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.step, self.mean = content["step"], content["mean"]
        self.epoch_start, self.epoch_batches = content["epoch_start"], content["epoch_batches"]
        self.generator.set_state(content["generator"])
        self.sum.copy_(content["sum"])
        torch.set_rng_state(content["torch_random"])
        if "cuda_random" in content and self.device.type == "cuda":
            torch.cuda.set_rng_state(content["cuda_random"], self.device)


def _whole_precision(tensor: Tensor) -> Tensor:
    """Losses are taken of float32 at least."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def _optimizer(model: nn.Module, schedule: Schedule) -> torch.optim.SGD:
    """SGD whose weight decay leaves biases and norm weights alone."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": schedule.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.SGD(
        [g for g in groups if g["params"]],
        lr=schedule.lr,
        momentum=schedule.momentum,
        nesterov=schedule.momentum > 0,
    )


def _autocast(device: torch.device, wanted: bool) -> Callable[[], torch.autocast]:
    # Older GPUs emulate bfloat16 and would be slower than in float32.
    capable = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8
    return lambda: torch.autocast(device.type, dtype=torch.bfloat16, enabled=wanted and capable)


def _device(model: nn.Module) -> torch.device:
    parameter = next(model.parameters(), None)
    if parameter is None:
        raise RlpruneError("fine-tuning: the model has no parameters")
    return parameter.device


def _key(model: nn.Module, schedule: Schedule, distill: DistillTargets | None) -> str:
    """Hash of what has to be equal for a state to fit: shapes and settings."""
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    soft = None if distill is None else [distill.temperature, distill.soft, distill.teacher is None]
    optimizer = asdict(schedule)
    del optimizer["mixed_precision"]  # a number format that a state does not depend on
    return settings_key([shapes, optimizer, soft])
