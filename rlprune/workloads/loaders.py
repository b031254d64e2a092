"""A user's model and data loaders as a workload, with no class to write."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler

from ..errors import DataError, near_miss
from ..utils.pytrees import Inputs, take, tensors, to_device
from .adapter import Tokenizer
from .base import SPLITS, Batch, ModelScore, SplitMetric, Workload
from .metrics import Targets, TorchMetric, by_name
from .tasks.base import Outputs, TaskType
from .tasks.outputs import Choice

Loader = Iterable[Any] | Callable[[], Iterable[Any]]
"""Gives (inputs, targets) batches each time it is gone through: a DataLoader, a list, or a function that makes one."""

BatchFunction = Callable[[Outputs, Targets], Tensor]
CALIBRATION_SAMPLES = 512
"""Training samples that stand in for the calibration split where none is given."""
_KEPT_BYTES = 1 << 30  # of the evaluation splits, kept as they were read first


class LoaderWorkload(Workload):
    """A model and its loaders.

    The calibration, validation and test splits are read in the loader's order, which has to be the same each time, and
    are kept in memory while they fit; an epoch of training is one pass through the train loader, whose shuffling and
    augmentation are its own.

    Args:
        model: dense and trained; put into eval mode. It is moved nowhere, and batches are moved to where it is.
        example_inputs: one sample: (1, ...), a tuple of arguments, or a dict of keyword arguments.
        loaders: {"train", "calibration", "validation", "test"} -> loader of (inputs, targets); without "calibration"
            the first 512 training samples stand in.
        task: what the outputs mean (``rlprune list tasks``); by default classification, or next tokens.
        output: which of several outputs the task reads, by name or number.
        loss: ``loss(outputs, targets)``, a scalar mean; by default the task's.
        metric: ``metric(outputs, targets)``, the sum over a batch; or one of torchmetrics over a whole split, by name
            ("mIoU", "mAP", "AUROC", "F1", "torchmetrics:CLASS"), as a `TorchMetric` or as an object; by default the
            task's.
        metric_fn: ``metric_fn(model, split)``: the metric of a whole split instead.
        score_fn: ``score_fn(model)``: what candidates are judged by, higher is better, instead of ``score.kind``.
        metric_name: how reports call the metric.
        tokenizer: saved next to a pruned language model.

    Raises DataError: a split is missing or unknown, shuffles, or gives something else than pairs (inputs, targets).
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Inputs,
        loaders: Mapping[str, Loader],
        *,
        task: str | TaskType | type[TaskType] | None = None,
        output: Choice | None = None,
        loss: BatchFunction | None = None,
        metric: BatchFunction | str | TorchMetric | object | None = None,
        metric_fn: SplitMetric | None = None,
        score_fn: ModelScore | None = None,
        metric_name: str | None = None,
        name: str | None = None,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        _check(loaders)
        self.model = model.eval()
        self.example_inputs = example_inputs
        self.tokenizer = tokenizer
        self.name = name or type(model).__name__
        self._loaders = dict(loaders)
        self.task, self.output = task, output
        self.metric_fn, self.score_fn = metric_fn, score_fn
        gathers = by_name(metric) is not None or hasattr(metric, "compute")
        self.split_metric = metric if gathers else None
        self._loss = loss
        self._metric = cast("BatchFunction | None", None if gathers else metric)
        if metric_name is not None:
            self.metric_name = metric_name
        self._kept: dict[str, list[Batch]] = {}

    def loss(self, outputs: Outputs, targets: Targets) -> Tensor:
        return super().loss(outputs, targets) if self._loss is None else self._loss(outputs, targets)

    def metric(self, outputs: Outputs, targets: Targets) -> Tensor:
        return super().metric(outputs, targets) if self._metric is None else self._metric(outputs, targets)

    @property
    def has_own_loss(self) -> bool:
        return self._loss is not None

    @property
    def has_own_metric(self) -> bool:
        return self._metric is not None

    def batches(self, split: str, limit: int | None = None) -> Iterator[Batch]:
        """Batches of one split on the model's device; those of the calibration split may be training samples."""
        if split == "calibration" and split not in self._loaders:
            return self._read("train", CALIBRATION_SAMPLES)
        if split == "train":
            return self._read(split, None)
        if split not in self._kept:
            ready = list(self._read(split, None))
            if sum(t.nbytes for batch in ready for t in tensors(batch)) > _KEPT_BYTES:
                return iter(ready)
            self._kept[split] = ready
        return iter(self._kept[split])

    def train_batches(self, generator: torch.Generator, batch_size: int | None = None) -> Iterator[Batch]:
        """One pass through the train loader; its draws follow ``generator``. The loader sets the batch size."""
        del batch_size
        yield from self._read("train", None, int(torch.randint(2**62, (), generator=generator)))

    def train_steps(self, batch_size: int | None = None) -> int:
        loader = self._loaders["train"]
        return len(loader) if isinstance(loader, Sized) else super().train_steps(batch_size)

    def _read(self, split: str, most: int | None, seed: int = 0) -> Iterator[Batch]:
        loader, device, seen = self._loaders[split], self.device, 0
        for batch in _seeded(loader() if callable(loader) else loader, seed):
            pair = tuple(batch) if isinstance(batch, (tuple, list)) else ()
            if len(pair) != 2:
                raise DataError(
                    f"loaders[{split!r}]: a batch must be (inputs, targets), got {_kind(batch)}; several inputs are a "
                    "tuple or a dict in the first place"
                )
            inputs, targets = (to_device(part, device) for part in pair)
            inputs = self._arguments(inputs)
            if next(tensors(inputs), None) is None:
                raise DataError(f"loaders[{split!r}]: the inputs hold no tensor, got {_kind(batch)}")
            count = self.samples_in(inputs, targets)
            if most is not None and seen + count > most:
                some = slice(most - seen)
                inputs, targets = take(inputs, some), take(targets, some)
            seen += count
            yield inputs, targets
            if most is not None and seen >= most:
                return

    def _arguments(self, inputs: Inputs) -> Inputs:
        """Inputs as arguments: a DataLoader makes lists of the tuples that its data set gives."""
        example = self.example_inputs
        several = isinstance(example, tuple) and isinstance(inputs, list) and len(inputs) == len(example)
        if several and not isinstance(example[0], list):
            return tuple(inputs)
        return inputs


def _seeded(loader: Iterable[object], seed: int) -> Iterator[object]:
    """Go through a loader whose shuffling and augmentation draw from torch's global state, which is left as it was."""
    iterator, state = None, None
    while True:
        with torch.random.fork_rng(devices=[]):
            if iterator is None or state is None:
                torch.manual_seed(seed)
                iterator = iter(loader)
            else:
                torch.set_rng_state(state)
            try:
                batch = next(iterator)
            except StopIteration:
                return
            state = torch.get_rng_state()
        yield batch


def _check(loaders: Mapping[str, Loader]) -> None:
    for split in loaders:
        if split not in SPLITS:
            raise DataError(
                f"loaders: unknown split {split!r}{near_miss(str(split), SPLITS)}; allowed: {', '.join(SPLITS)}"
            )
    for split in ("train", "validation", "test"):
        if split not in loaders:
            raise DataError(f"loaders: the split {split!r} is missing; needed: train, validation, test")
    for split in ("calibration", "validation", "test"):
        loader = loaders.get(split)
        if isinstance(loader, DataLoader) and isinstance(loader.sampler, RandomSampler):
            raise DataError(
                f"loaders[{split!r}]: shuffles; candidates are compared on the same samples: shuffle=False"
            )


def _kind(batch: object) -> str:
    if isinstance(batch, (tuple, list)):
        return f"{type(batch).__name__} of {', '.join(type(part).__name__ for part in batch)}"
    return type(batch).__name__
