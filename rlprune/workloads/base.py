"""What a model is for: every workload gives a dense model, its data splits, and how models are judged and trained."""

from __future__ import annotations

import abc
import contextlib
import copy
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..artifacts.safetensors import MAX_SHARD_SIZE
from ..config.config import ModelConfig
from ..config.training import FinishConfig
from ..errors import DataError, near_miss
from ..pruning.compose import compose
from ..pruning.plan import Plan
from ..recovery.finetune import DistillTargets, FitResult, Progress
from ..utils.modes import evaluating
from ..utils.pytrees import Inputs, take
from .adapter import ModelAdapter, Tokenizer, Tuned, TuneJob, adapter_of
from .judge import Judge, WholeJudge
from .metrics import Meter, SumMeter, Targets, TorchMeter, TorchMetric, by_name, make, value_of
from .outcomes import Outcomes, SampleMeter
from .tasks.base import Outputs, TaskType, find_task
from .tasks.guess import guessed
from .tasks.outputs import Choice

SPLITS = ("train", "calibration", "validation", "test")
"""The four disjoint parts of the data. A search reads the first three; "test" is read once, at the end."""

Batch = tuple[Inputs, Targets]
"""Inputs and targets of some samples, on the workload's device: tensors (N, ...), or nests of them (see
`rlprune.utils.pytrees`): a tuple of inputs is several arguments, a dict keyword arguments, a list one argument."""
ModelScore = Callable[[nn.Module], float]
SplitMetric = Callable[[nn.Module, str], float]


@dataclass(frozen=True)
class Quality:
    """How good a model is on one split: mean loss, mean metric (0..1 for accuracy), samples seen.

    ``outcomes`` is the quality of each sample, of the test split and where there is one.
    """

    loss: float
    metric: float
    count: int
    outcomes: Outcomes | None = None


@dataclass(frozen=True)
class CutFrom:
    """Where a model that is pruned already came from: the dense model, of which only the architecture counts, and the
    plan that was cut from it."""

    model: nn.Module
    plan: Plan


def check_split(split: str) -> None:
    """Raise DataError when ``split`` is not one of SPLITS."""
    if split not in SPLITS:
        raise DataError(f"unknown split {split!r}: use one of {', '.join(SPLITS)}{near_miss(split, SPLITS)}")


class _Known:
    """A field that the workload's model or task knows; a subclass or an object may set its own."""

    def __init__(self, value: Callable[[Workload], object]) -> None:
        self._value = value

    def __get__(self, workload: Workload | None, owner: type) -> object:
        return self if workload is None else self._value(workload)


class Workload(abc.ABC):
    """A model to prune, the data that judge it, and what its outputs mean.

    A subclass sets ``model`` and ``example_inputs`` and implements ``batches``; the rest follows from ``task``, which
    is that of the model's adapter unless it is stated: classification, or next tokens where the model is a causal
    language model of transformers (its batches are (input ids, targets), both (B, L); targets are the ids again, -100
    where none is scored). To implement for an own model::

        class Mine(rlprune.Workload):
            task = "regression"             # see `rlprune list tasks`; classification without it
            def __init__(self):
                self.model = ...            # dense, in eval mode, never modified by rlprune
                self.example_inputs = ...   # (1, C, H, W), or a tuple of arguments, or a dict of them
            def batches(self, split, limit=None):
                yield inputs, targets       # fixed order, no augmentation, on self.device; limit may be ignored

    ``batches("test")`` raises DataError unless ``test_opened()`` is active, whatever the subclass does:
    a search cannot read the test split by mistake.
    """

    model: nn.Module
    example_inputs: Inputs
    task: str | TaskType | type[TaskType] | None = None
    """What the outputs mean: a name (``rlprune list tasks``) or a TaskType; None for the adapter's default."""
    output: Choice | None = None
    """Which of several outputs the task reads: a name, or a number in a tuple."""
    repeats_training: bool = False
    """Whether ``batches("train")`` is known to give the same samples in the same order each time and in every process,
    so that plans can be compared on them (``score.unlabelled``)."""
    score_fn: ModelScore | None = None
    """``score_fn(model)``: a number for a whole model, higher is better, instead of ``score.kind``."""
    metric_fn: SplitMetric | None = None
    """``metric_fn(model, split)``: the metric over a whole split, instead of ``metric``."""
    split_metric: str | TorchMetric | object | None = None
    """A metric of torchmetrics over a whole split: a name ("mIoU", "mAP", "AUROC", "F1", "torchmetrics:CLASS"), a
    `TorchMetric` with arguments, or an object of torchmetrics."""
    metric_name: str = cast(str, _Known(lambda workload: workload._metric_label()))
    """Name of the metric, as reports have it."""
    higher_is_better: bool = cast(bool, _Known(lambda workload: workload._metric_rises()))
    """Whether a larger metric is a better one."""
    sample_noun: str = cast(str, _Known(lambda workload: workload.adapter.sample_noun))
    """What a sample is called, in the plural."""
    name: str = ""
    tokenizer: Tokenizer | None = None
    """What turns raw input into the model's, saved next to a pruned model where its folder can hold it."""
    base: Mapping[str, object] = {"source": "given"}
    """How to rebuild the architecture; {"source": "given"} means that the user has to pass the model in."""
    cut_from: CutFrom | None = None
    """Set where ``model`` was pruned before: what is saved is then one plan against that first dense model."""

    _adapter: ModelAdapter | None = None
    _reference: nn.Module | None = None
    _test_open: bool = False
    _sizes: dict[str, int] | None = None
    _guess: TaskType | None = None
    _torch_metric: object | None = None

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        if "batches" in cls.__dict__:
            setattr(cls, "batches", _guarded(cls.__dict__["batches"]))  # noqa: B010
        if not cls.name:
            cls.name = cls.__name__

    @property
    def device(self) -> torch.device:
        """The device of the model's first parameter."""
        parameter = next(self.model.parameters(), None)
        return torch.device("cpu") if parameter is None else parameter.device

    @property
    def architecture(self) -> nn.Module:
        """The dense model that plans on disk are made against: ``model``, or what it was cut from."""
        return self.model if self.cut_from is None else self.cut_from.model

    def before_any_cut(self) -> Workload:
        """The workload of the dense model: itself, or a copy whose model is what its own was cut from."""
        if self.cut_from is None:
            return self
        dense = copy.copy(self)
        dense.model, dense.cut_from = self.architecture, None
        return dense

    @property
    def reference(self) -> nn.Module:
        """The model that scores are measured from: ``model``, or what `around` was asked of."""
        return self.model if self._reference is None else self._reference

    def around(self, model: nn.Module) -> Workload:
        """A copy whose model is a later one, cut and trained; its scores stay those against this workload's own."""
        other = copy.copy(self)
        other.model, other._reference = model, self.reference
        setattr(other, "judge", self.judge)  # noqa: B010  (a method for one object)
        return other

    @abc.abstractmethod
    def batches(self, split: str, limit: int | None = None) -> Iterator[Batch]:
        """Batches of one split in a fixed order, without augmentation; what goes beyond ``limit`` is cut off."""

    def size(self, split: str) -> int:
        """Number of samples of a split; by default counted once by reading it."""
        check_split(split)
        if self._sizes is None:
            self._sizes = {}
        if split not in self._sizes:
            with self.test_opened():
                self._sizes[split] = sum(self.samples_in(*batch) for batch in self.batches(split))
        return self._sizes[split]

    def train_batches(self, generator: torch.Generator, batch_size: int | None = None) -> Iterator[Batch]:
        """One shuffled epoch of the train split; by default its batches in random order, unaugmented."""
        del batch_size  # the default keeps the batches that the subclass makes
        ready = list(self.batches("train"))
        order = torch.randperm(len(ready), generator=generator, device=generator.device)
        for i in order.tolist():
            yield ready[i]

    def train_steps(self, batch_size: int | None = None) -> int:
        """Number of batches that ``train_batches`` gives; by default counted by reading the split."""
        del batch_size
        return sum(1 for _ in self.batches("train"))

    @property
    def adapter(self) -> ModelAdapter:
        """What the model is: how it is traced, repaired, trained and saved. Found once, from the model."""
        if self._adapter is None:
            self._adapter = adapter_of(self.model)
        return self._adapter

    # -- what the outputs mean --------------------------------------------------------------------------------------

    @property
    def task_type(self) -> TaskType:
        """The task: the stated one, or the adapter's; with a loss of the workload's own, what its data can mean."""
        if self.task is not None or not (self.has_own_loss and self.adapter.guesses_task):
            return self._stated()
        if self._guess is None:
            self._guess = self._guessed()
        return self._guess

    def samples_in(self, inputs: Inputs, targets: Targets) -> int:
        """Samples in a batch."""
        return self._stated().count(inputs, targets)

    def loss(self, outputs: Outputs, targets: Targets) -> Tensor:
        """Mean loss of a batch, a scalar tensor; by default the task's."""
        task = self._stated()
        return task.loss(task.read(outputs, self.output), targets)

    def metric(self, outputs: Outputs, targets: Targets) -> Tensor:
        """Sum of the metric over a batch, a scalar tensor; by default the task's, which may be more than a sum over
        a whole split."""
        task = self.task_type
        return task.metric(task.read(outputs, self.output), targets)

    @property
    def has_own_loss(self) -> bool:
        """Whether the loss is the workload's own instead of the task's."""
        return type(self).loss is not Workload.loss

    @property
    def has_own_metric(self) -> bool:
        """Whether the metric of a batch is the workload's own instead of the task's."""
        return type(self).metric is not Workload.metric

    @property
    def exp_of_loss(self) -> bool:
        """Whether the metric is the exponential of the loss, as the perplexity is."""
        own = self.metric_fn is not None or self.split_metric is not None or self.has_own_metric
        return self.task_type.exp_of_loss and not own

    @property
    def has_own_task(self) -> bool:
        """Whether anything of the task is another than the adapter's default."""
        others = self.metric_fn is not None or self.split_metric is not None
        stated = self.task is not None and self._stated().name != self.adapter.task
        return stated or others or self.has_own_loss or self.has_own_metric

    def batch_loss(
        self, model: nn.Module, inputs: Inputs, targets: Targets, outputs: Outputs | None = None
    ) -> Tensor:
        """The mean loss of a batch from its inputs on; ``outputs`` are those of the task's `forward`, where known."""
        if outputs is None or self.task_type.own_pass:
            outputs = self.outputs_for_loss(model, inputs, targets)
        return self.loss(self.task_type.plain(outputs), targets)

    def outputs_for_loss(
        self, model: nn.Module, inputs: Inputs, targets: Targets, like: Outputs | None = None
    ) -> Outputs:
        """What a loss, or a distillation (``like`` are the teacher's), reads of a model in the mode that it is in."""
        return self.task_type.forward_for_loss(model, inputs, targets, like)

    def loss_of(self, outputs: Outputs, targets: Targets) -> Tensor:
        """The loss of what `outputs_for_loss` gave."""
        return self.loss(self.task_type.plain(outputs), targets)

    def drawn_loss(
        self, model: nn.Module, inputs: Inputs, targets: Targets, generator: torch.Generator
    ) -> Tensor:
        """A scalar tensor whose gradient tells what small changes of a batch's outputs cost (`TaskType.drawn_loss`).

        Where the task knows none, the loss of the batch's targets, in sum.
        """
        drawn = self.unlabelled_loss(model, inputs, generator)
        if drawn is not None:
            return drawn
        loss = self.loss_of(self.outputs_for_loss(model, inputs, targets), targets)
        return loss * self.samples_in(inputs, targets)

    def unlabelled_loss(self, model: nn.Module, inputs: Inputs, generator: torch.Generator) -> Tensor | None:
        """`drawn_loss` of a task that needs no targets for it; None for the others."""
        task = self.task_type
        if task.own_pass:
            return None
        return task.drawn_loss(task.read(task.forward(model, inputs), self.output), generator)

    def distillation(self, outputs: Outputs, teacher: Outputs, temperature: float) -> Tensor:
        """The loss of imitating a teacher's outputs, both as `outputs_for_loss` gives them; a scalar tensor."""
        task = self.task_type
        return task.distillation(
            task.read(outputs, self.output), task.read(teacher, self.output), temperature
        )

    def distill_targets(
        self, teacher: nn.Module | None, temperature: float = 2.0, soft: float = 0.75
    ) -> DistillTargets | None:
        """Settings of a distillation; None where the task has none."""
        if not self.task_type.compares:
            return None
        return DistillTargets(teacher, temperature, soft, self.distillation)

    def logit_rows(self, model: nn.Module, inputs: Inputs) -> Tensor | None:
        """Rows of logits (N * R, C) of a model in eval mode, by which searches compare plans; None where the task has
        none."""
        task = self.task_type
        return task.rows(task.read(task.forward(model, inputs), self.output))

    def whole_score(self, kind: str) -> str | None:
        """What judges a model by a split as a whole, so that a part of it has no score; None where samples have one."""
        if self.score_fn is not None:
            return "score_fn"
        if kind == "accuracy" and not isinstance(self.new_meter(), SumMeter):
            return "the metric"
        return None

    def whole_metric(self, model: nn.Module, split: str) -> float | None:
        """What ``metric_fn`` says of a model on a split; None without one."""
        return None if self.metric_fn is None else value_of("metric_fn", self.metric_fn, model, split)

    def new_meter(self) -> Meter | None:
        """What gathers the metric over a split; None where ``metric_fn`` measures it."""
        if self.metric_fn is not None:
            return None
        if self.split_metric is not None:
            return self._torch_meter()
        return SumMeter(self.metric) if self.has_own_metric else self.task_type.meter()

    def feed_meter(self, meter: Meter, outputs: Outputs, targets: Targets, count: int) -> None:
        """Let a meter of `new_meter` take in what the task's `forward` gave for a batch of ``count`` samples."""
        own = self.has_own_metric and self.split_metric is None
        task = self.task_type
        meter.update(task.plain(outputs) if own else task.read(outputs, self.output), targets, count)

    def _stated(self) -> TaskType:
        return find_task(self.adapter.task if self.task is None else self.task)

    def _guessed(self) -> TaskType:
        first = next(iter(self.batches("validation", 1)), None)
        if first is None:
            raise DataError(f"workload {self.name!r}: the split 'validation' is empty")
        with torch.no_grad(), evaluating(self.model):
            return guessed(self._stated().forward(self.model, first[0]), first[1], self.output)

    def _metric_label(self) -> str:
        named = by_name(self.split_metric)
        if named is not None:
            return named.label
        if self.split_metric is not None:
            return type(self.split_metric).__name__
        return (self._stated() if self.has_own_metric or self.metric_fn else self.task_type).metric_name

    def _metric_rises(self) -> bool:
        if self.split_metric is not None:
            meter = self._torch_meter()
            return not (isinstance(meter, TorchMeter) and meter.lower_is_better)
        own = self.has_own_metric or self.metric_fn is not None
        return own or self.task_type.higher_is_better

    def _torch_meter(self) -> Meter:
        named, task = by_name(self.split_metric), self.task_type
        if named is None:
            return TorchMeter(self.split_metric, task.for_metric, None, type(self.split_metric).__name__)
        if self._torch_metric is None:
            inputs, _ = next(iter(self.batches("validation", 1)))
            with torch.no_grad(), evaluating(self.model):
                read = task.read(task.forward(self.model, inputs), self.output)
            self._torch_metric = make(named, task.metric_arguments(read))
        return TorchMeter(self._torch_metric, task.for_metric, named.picked, named.name)

    def judge(self, kind: str = "kl", limit: int | None = None, *, top_k: int = 256) -> Judge:
        """What scores candidates on the first ``limit`` validation samples by ``kind`` (see ScoreConfig).

        ``top_k`` is how many of the dense model's largest probabilities of a token are kept, where tokens are scored.
        A ``score_fn`` takes the place of the default kind.
        """
        if self.score_fn is not None and kind == "kl":
            return WholeJudge(self)
        return self.adapter.judge(self, kind, limit, top_k)

    def fine_tune(self, model: nn.Module, settings: FinishConfig, job: TuneJob) -> Tuned:
        """The final fine-tune of a pruned model by section ``finish``, in place where it fits on one device."""
        return self.adapter.fine_tune(self, model, settings, job)

    def save(self, slim: nn.Module, plan: Plan, directory: str | Path) -> None:
        """Write a pruned model of this workload into a folder (see `rlprune.save`)."""
        before = None if self.cut_from is None else self.cut_from.plan
        if before is not None and plan.space.fingerprint != before.space.fingerprint:
            plan = compose(before, plan)
        self.adapter.save(
            slim,
            plan,
            Path(directory),
            base=self.base,
            tokenizer=self.tokenizer,
            max_shard_size=MAX_SHARD_SIZE,
        )

    def scored(self, split: str) -> int:
        """What a score counts in one sample of a split: 1, or the tokens of a sequence."""
        check_split(split)
        return 1

    def protocol(self) -> dict[str, Any]:
        """What the figures of this workload mean, for results.json; empty where its name says it."""
        return {}

    def test_facts(self, count: int) -> dict[str, Any]:
        """What a row says of a metric on ``count`` scored things of the test split."""
        del count
        return {}

    @contextlib.contextmanager
    def test_opened(self) -> Iterator[None]:
        """While active, ``batches("test")`` and ``evaluate(model, "test")`` are allowed."""
        before = self._test_open
        self._test_open = True
        try:
            yield
        finally:
            self._test_open = before

    def evaluate(self, model: nn.Module, split: str, limit: int | None = None) -> Quality:
        """Mean loss and metric of ``model`` on the first ``limit`` samples of a split.

        The model is put into eval mode for the time and gets its mode back. Raises DataError when the
        split has no sample.
        """
        return self.adapter.evaluate(self, model, split, limit)


def evaluate_outputs(workload: Workload, model: nn.Module, split: str, limit: int | None = None) -> Quality:
    """Mean of the workload's own loss and its metric over the first ``limit`` samples of a split."""
    losses: list[Tensor] = []
    counts: list[int] = []
    meter, task = workload.new_meter(), workload.task_type
    samples = SampleMeter(workload, meter) if split == "test" else None
    with torch.no_grad(), evaluating(model):
        for inputs, targets in workload.batches(split, limit):
            outputs, count = task.forward(model, inputs), workload.samples_in(inputs, targets)
            losses.append(workload.batch_loss(model, inputs, targets, outputs))
            if meter is not None:
                workload.feed_meter(meter, outputs, targets, count)
            if samples is not None:
                samples.update(outputs, targets, count)
            counts.append(count)
        count = sum(counts)
        if count == 0:
            raise DataError(f"workload {workload.name!r}: the split {split!r} is empty")
        whole = workload.whole_metric(model, split)
    weights = torch.tensor(counts, dtype=torch.float64)
    loss = torch.stack(losses).cpu().double()
    if whole is None:
        assert meter is not None
        whole = meter.value()
    mean = float((loss * weights).sum() / count)
    return Quality(mean, whole, count, None if samples is None else samples.outcomes(mean, whole))


class TrainedWorkload(Workload):
    """A workload whose dense model rlprune can train: the shipped ones, from the settings."""

    @abc.abstractmethod
    def training_facts(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """All that the trained weights depend on apart from the model and its settings: facts, and tensors of data."""

    @abc.abstractmethod
    def train(self, settings: ModelConfig, state: Path, progress: Progress | None) -> FitResult:
        """Train the workload's own model in place by ``settings.train``; ``state`` is a file to go on from."""


def _guarded(batches: Callable[..., Iterator[Batch]]) -> Callable[..., Iterator[Batch]]:
    """Wrap a subclass's ``batches``: unknown splits, bad limits and a closed test split raise at the call."""

    @functools.wraps(batches)
    def guard(self: Workload, split: str, limit: int | None = None) -> Iterator[Batch]:
        check_split(split)
        if limit is not None and limit < 1:
            raise DataError(f"limit must be at least 1 or None, not {limit}")
        if split == "test" and not self._test_open:
            raise DataError(
                "the test split is closed during a search; read it inside 'with workload.test_opened():'"
            )
        found = batches(self, split, limit)
        return found if limit is None else _first(found, limit, self.samples_in)

    return guard


def _first(batches: Iterable[Batch], limit: int, count: Callable[[Inputs, Targets], int]) -> Iterator[Batch]:
    """The first ``limit`` samples, whether ``batches`` keeps to the limit itself or gives all of its split."""
    left = limit
    for inputs, targets in batches:
        size = count(inputs, targets)
        some = slice(left)
        yield (inputs, targets) if size <= left else (take(inputs, some), take(targets, some))
        left -= size
        if left <= 0:
            return
