"""A user's model and data loaders as a workload, with no class to write."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler

from ..errors import DataError, near_miss
from .adapter import Tokenizer
from .base import SPLITS, Batch, Workload

Loader = Iterable[Any] | Callable[[], Iterable[Any]]
"""Gives (inputs, targets) batches each time it is gone through: a DataLoader, a list, or a function that makes one."""

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
        example_inputs: one sample, (1, ...).
        loaders: {"train", "calibration", "validation", "test"} -> loader of (inputs, targets); without "calibration"
            the first 512 training samples stand in.
        loss: ``loss(outputs, targets)``, a scalar mean; by default the adapter's (cross-entropy of classes).
        metric: ``metric(outputs, targets)``, the sum over a batch; by default the number of right classes.
        metric_name: how reports call the metric.
        tokenizer: saved beside a pruned language model.

    Raises DataError: a split is missing or unknown, shuffles, or gives something else than pairs of tensors.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Tensor,
        loaders: Mapping[str, Loader],
        *,
        loss: Callable[[Any, Tensor], Tensor] | None = None,
        metric: Callable[[Any, Tensor], Tensor] | None = None,
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
        self._loss, self._metric = loss, metric
        if metric_name is not None:
            self.metric_name = metric_name
        self._kept: dict[str, list[Batch]] = {}

    def loss(self, outputs: Any, targets: Tensor) -> Tensor:
        return super().loss(outputs, targets) if self._loss is None else self._loss(outputs, targets)

    def metric(self, outputs: Any, targets: Tensor) -> Tensor:
        return super().metric(outputs, targets) if self._metric is None else self._metric(outputs, targets)

    @property
    def has_own_task(self) -> bool:
        return self._loss is not None or self._metric is not None

    def batches(self, split: str, limit: int | None = None) -> Iterator[Batch]:
        """Batches of one split on the model's device; those of the calibration split may be training samples."""
        if split == "calibration" and split not in self._loaders:
            return self._read("train", CALIBRATION_SAMPLES)
        if split == "train":
            return self._read(split, None)
        if split not in self._kept:
            ready = list(self._read(split, None))
            if sum(t.nbytes for batch in ready for t in batch) > _KEPT_BYTES:
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
            if len(pair) != 2 or not all(isinstance(part, Tensor) for part in pair):
                raise DataError(
                    f"loaders[{split!r}]: a batch must be (inputs, targets), two tensors, got {_kind(batch)}"
                )
            inputs, targets = (part.to(device, non_blocking=True) for part in pair)
            if most is not None:
                inputs, targets = inputs[: most - seen], targets[: most - seen]
            seen += len(targets)
            yield inputs, targets
            if most is not None and seen >= most:
                return


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
