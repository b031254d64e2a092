"""Metrics over a whole split: sums over batches, statistics that are gathered, and those of torchmetrics by name."""

from __future__ import annotations

import copy
import importlib
import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from ..errors import DataError, described, near_miss, one_line

Read = Any
"""What a task has read of a model's outputs for a batch."""
Targets = Any
"""The targets of a batch, as the data give them."""


class Meter(Protocol):
    """Gathers a metric batch by batch; those of consecutive parts of a split add up to that of the whole."""

    def update(self, read: Read, targets: Targets, count: int) -> None:
        """Take in a batch of ``count`` samples."""
        ...

    def add(self, other: Self) -> None:
        """Take in what another meter of the kind has gathered."""
        ...

    def value(self) -> float:
        """The metric of all that has been taken in."""
        ...


class SumMeter:
    """The mean over samples of a metric that is a sum over each batch."""

    def __init__(self, metric: Callable[[Read, Targets], Tensor]) -> None:
        self._metric = metric
        self._sums: list[Tensor] = []
        self._count = 0

    def update(self, read: Read, targets: Targets, count: int) -> None:
        found = self._metric(read, targets)
        self._sums.append(found if isinstance(found, Tensor) else torch.tensor(float(found)))
        self._count += count

    def add(self, other: SumMeter) -> None:
        self._sums += other._sums
        self._count += other._count

    def value(self) -> float:
        return float(torch.stack(self._sums).cpu().double().sum() / self._count)


@dataclass(frozen=True)
class TorchMetric:
    """A metric of torchmetrics: ``name`` as in SHORT, or a class of it ("torchmetrics:JaccardIndex").

    ``key`` picks one of several values that a metric returns (that of ``mAP`` is "map").
    """

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    key: str | None = None

    @property
    def label(self) -> str:
        """What reports call it."""
        return self.name.removeprefix("torchmetrics:")

    @property
    def picked(self) -> str | None:
        """Which of several values is meant, where that is known."""
        return self.key or SHORT.get(self.name, ("", None))[1]


Metric = Any
"""An object of torchmetrics, which is not a dependency."""
SHORT = {
    "mIoU": ("JaccardIndex", None),
    "mAP": ("detection:MeanAveragePrecision", "map"),
    "AUROC": ("AUROC", None),
    "F1": ("F1Score", None),
}
"""Metrics with short names: the class of torchmetrics and which of its values is meant."""
PREFIX = "torchmetrics:"


def by_name(metric: object) -> TorchMetric | None:
    """What a workload's ``metric`` names; None where it is a function. DataError for a name that is unknown."""
    if isinstance(metric, TorchMetric):
        metric_name = metric.name
    elif isinstance(metric, str):
        metric_name, metric = metric, TorchMetric(metric)
    else:
        return None
    if metric_name not in SHORT and not metric_name.startswith(PREFIX):
        allowed = ", ".join(SHORT)
        raise DataError(
            f"metric: unknown name {metric_name!r}{near_miss(metric_name, SHORT)}; allowed: {allowed}, "
            f"{PREFIX}CLASS, or a function metric(outputs, targets)"
        )
    return metric


def make(metric: TorchMetric, defaults: Mapping[str, Any]) -> Any:
    """An object of torchmetrics; ``defaults`` are arguments that the task knows, those of the metric go before.

    DataError in one line: the package is missing, no such class, or arguments that it refuses.
    """
    path = SHORT.get(metric.name, (metric.name.removeprefix(PREFIX), None))[0]
    module, _, name = path.rpartition(":")
    where = f"torchmetrics.{module}" if module else "torchmetrics"
    try:
        home = importlib.import_module(where)
    except ImportError as error:
        raise DataError(
            f"metric {metric.name!r}: needs torchmetrics ({described(error)}); pip install 'rlprune[metrics]'"
        ) from None
    kind = getattr(home, name, None)
    for further in ("detection", "segmentation"):
        if kind is None:
            kind = getattr(importlib.import_module(f"torchmetrics.{further}"), name, None)
    if kind is None:
        raise DataError(f"metric {metric.name!r}: {where} has no {name}{near_miss(name, dir(home))}")
    known = {name: value for name, value in defaults.items() if name in _arguments(kind)}
    try:
        return kind(**{**known, **metric.arguments})
    except Exception as error:
        package = "; pip install 'rlprune[metrics]'" if isinstance(error, ImportError) else ""
        raise DataError(f"metric {metric.name!r}: {one_line(error)}{package}") from None


def value_of(name: str, function: Callable[..., object], *arguments: object) -> float:
    """What a function of the user's gives, as a number; DataError naming the function where it is none."""
    found = function(*arguments)
    try:
        value = float(found)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{name}: must return a number, got {type(found).__name__} ({described(error)})"
        ) from None
    return value


class TorchMeter:
    """Gathers a metric of torchmetrics.

    Args:
        metric: an object of it, empty; it is copied.
        prepare: (read, targets) -> (predictions, targets) as the metric takes them.
        key: which of several values is meant.
        name: for messages.
    """

    def __init__(
        self,
        metric: Metric,
        prepare: Callable[[Read, Targets], tuple[object, object]],
        key: str | None,
        name: str,
    ) -> None:
        self._metric, self._prepare, self._key, self._name = copy.deepcopy(metric), prepare, key, name
        # Such metrics cannot be merged, so what they have seen is kept and gathered at the end.
        self._later: list[tuple[object, object]] | None = [] if metric.full_state_update else None

    @property
    def lower_is_better(self) -> bool:
        """Whether torchmetrics says so of the metric."""
        return getattr(self._metric, "higher_is_better", None) is False

    def update(self, read: Read, targets: Targets, count: int) -> None:
        prepared = self._prepare(read, targets)
        if self._later is None:
            self._gather([prepared])
        else:
            self._later.append(prepared)

    def add(self, other: TorchMeter) -> None:
        if self._later is not None and other._later is not None:
            self._later += other._later
        else:
            self._metric.merge_state(other._metric)

    def _gather(self, batches: Iterable[tuple[object, object]]) -> None:
        try:
            for predictions, targets in batches:
                self._metric.update(predictions, targets)
        except Exception as error:
            raise DataError(f"metric {self._name!r}: {one_line(error)}") from error

    def value(self) -> float:
        if self._later is not None:
            self._metric.reset()
            self._gather(self._later)
        with warnings.catch_warnings():
            # Said of a metric that has only taken in what others gathered.
            warnings.filterwarnings("ignore", "The ``compute`` method of metric")
            found = self._metric.compute()
        if isinstance(found, Mapping):
            if self._key is None or self._key not in found:
                raise DataError(
                    f"metric {self._name!r}: returns several values; choose one by key: {', '.join(found)}"
                )
            found = found[self._key]
        if found.numel() != 1:
            raise DataError(
                f"metric {self._name!r}: returns {found.numel()} values, one is needed (an average over classes)"
            )
        return float(found)


def _arguments(kind: Callable[..., object]) -> set[str]:
    """Names of the arguments that a class of torchmetrics takes; some are given to a factory in ``__new__``."""
    made = (kind.__new__, kind.__init__)  # type: ignore[misc]
    return {name for function in made for name in inspect.signature(function).parameters}
