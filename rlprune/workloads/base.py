"""What a model is for: every workload gives a dense model, its data splits, and how models are judged and trained."""

from __future__ import annotations

import abc
import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..artifacts.safetensors import MAX_SHARD_SIZE
from ..config.config import FinishConfig, ModelConfig
from ..errors import DataError, near_miss
from ..pruning.compose import compose
from ..pruning.plan import Plan
from ..recovery.finetune import FitResult, Progress
from .adapter import ModelAdapter, Tokenizer, Tuned, TuneJob, adapter_of
from .judge import Judge

SPLITS = ("train", "calibration", "validation", "test")
"""The four disjoint parts of the data. A search reads the first three; "test" is read once, at the end."""

Batch = tuple[Tensor, Tensor]
"""Inputs (N, ...) and targets (N, ...), both on the workload's device."""


@dataclass(frozen=True)
class Quality:
    """How good a model is on one split: mean loss, mean metric (0..1 for accuracy), samples seen."""

    loss: float
    metric: float
    count: int


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


class _FromAdapter:
    """A field that the model's adapter knows; a subclass or an object may set its own."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, workload: Workload | None, owner: type) -> object:
        return self if workload is None else getattr(workload.adapter, self._name)


class Workload(abc.ABC):
    """A model to prune, the data that judge it, and its loss and metric.

    A subclass sets ``model`` and ``example_inputs`` and implements ``batches``; the rest has the defaults of the
    model's adapter: classification, or next tokens where the model is a causal language model of transformers (its
    batches are (input ids, targets), both (B, L); targets are the ids again, -100 where none is scored). To implement
    for an own model::

        class Mine(rlprune.Workload):
            def __init__(self):
                self.model = ...            # dense, in eval mode, never modified by rlprune
                self.example_inputs = ...   # (1, C, H, W)
            def batches(self, split, limit=None):
                yield inputs, targets       # fixed order, no augmentation, on self.device; limit may be ignored

    ``batches("test")`` raises DataError unless ``test_opened()`` is active, whatever the subclass does:
    a search cannot read the test split by mistake.
    """

    model: nn.Module
    example_inputs: Tensor
    metric_name: str = cast(str, _FromAdapter())
    """Name of the metric, as reports have it."""
    sample_noun: str = cast(str, _FromAdapter())
    """What a sample is called, in the plural."""
    name: str = ""
    tokenizer: Tokenizer | None = None
    """What turns raw input into the model's, saved beside a pruned model where its folder can hold it."""
    base: Mapping[str, object] = {"source": "given"}
    """How to rebuild the architecture; {"source": "given"} means that the user has to pass the model in."""
    cut_from: CutFrom | None = None
    """Set where ``model`` was pruned before: what is saved is then one plan against that first dense model."""

    _adapter: ModelAdapter | None = None
    _test_open: bool = False
    _sizes: dict[str, int] | None = None

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
                self._sizes[split] = sum(len(targets) for _, targets in self.batches(split))
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

    def loss(self, outputs: Any, targets: Tensor) -> Tensor:
        """Mean loss of a batch, a scalar tensor; by default the adapter's: cross-entropy of classes or next tokens."""
        return self.adapter.loss(outputs, targets)

    def metric(self, outputs: Any, targets: Tensor) -> Tensor:
        """Sum of the metric over a batch, a scalar tensor; by default the adapter's: the number of right classes."""
        return self.adapter.metric(outputs, targets)

    @property
    def has_own_task(self) -> bool:
        """Whether the loss or the metric is the workload's own instead of the adapter's."""
        kind = type(self)
        return kind.loss is not Workload.loss or kind.metric is not Workload.metric

    def judge(self, kind: str = "kl", limit: int | None = None, *, top_k: int = 256) -> Judge:
        """What scores candidates on the first ``limit`` validation samples by ``kind`` (see ScoreConfig).

        ``top_k`` is how many of the dense model's largest probabilities of a token are kept, where tokens are scored.
        """
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
    """Mean of the workload's own loss and metric over the first ``limit`` samples of a split."""
    was_training = model.training
    model.eval()
    losses: list[Tensor] = []
    metrics: list[Tensor] = []
    counts: list[int] = []
    try:
        with torch.no_grad():
            for inputs, targets in workload.batches(split, limit):
                outputs = model(inputs)
                losses.append(workload.loss(outputs, targets))
                metrics.append(workload.metric(outputs, targets))
                counts.append(len(targets))
    finally:
        model.train(was_training)
    count = sum(counts)
    if count == 0:
        raise DataError(f"workload {workload.name!r}: the split {split!r} is empty")
    weights = torch.tensor(counts, dtype=torch.float64)
    loss = torch.stack(losses).cpu().double()
    metric = torch.stack(metrics).cpu().double()
    return Quality(float((loss * weights).sum() / count), float(metric.sum() / count), count)


class TrainedWorkload(Workload):
    """A workload whose dense model rlprune can train: the shipped ones, from the settings."""

    @abc.abstractmethod
    def training_facts(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """All that the trained weights depend on beside the model and its settings: facts, and tensors of data."""

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
        return found if limit is None else _first(found, limit)

    return guard


def _first(batches: Iterable[Batch], limit: int) -> Iterator[Batch]:
    """The first ``limit`` samples, whether ``batches`` keeps to the limit itself or gives all of its split."""
    left = limit
    for inputs, targets in batches:
        count = len(targets)
        yield (inputs, targets) if count <= left else (inputs[:left], targets[:left])
        left -= count
        if left <= 0:
            return


def check_workload(workload: object) -> Workload:
    """Return ``workload`` when it is usable, else raise DataError naming what is missing.

    Checks: it is a Workload with a model and example inputs, its forward runs, and the train,
    calibration and validation splits are not empty.
    """
    if not isinstance(workload, Workload):
        raise DataError(f"expected a rlprune.Workload, got {type(workload).__name__}")
    for field, kind in (("model", nn.Module), ("example_inputs", Tensor)):
        if not isinstance(getattr(workload, field, None), kind):
            raise DataError(f"workload {workload.name!r} must set .{field} to a {kind.__name__}")
    for split in SPLITS[:3]:
        first = next(iter(workload.batches(split, 1)), None)
        if first is None or len(first[1]) == 0:
            raise DataError(f"workload {workload.name!r}: the split {split!r} is empty")
    quality = workload.evaluate(workload.model, "validation", 1)
    if math.isnan(quality.loss):
        raise DataError(f"workload {workload.name!r}: the dense model's loss is not a number")
    return workload
