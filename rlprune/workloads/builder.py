"""How settings become a workload: one builder a wing, asked by the names of the model and of the data."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..artifacts.documents import PlanDocument
from ..config.config import Config
from .adapter import WINGS, ModelAdapter, adapter_named
from .base import TrainedWorkload, Workload


@dataclass(frozen=True)
class Inspected:
    """What `rlprune inspect` looks at: the model, an example input, and the workload where one was built."""

    model: nn.Module
    example_inputs: Any
    workload: Workload | None


class WorkloadBuilder(abc.ABC):
    """Builds the workloads of a wing from settings; holds no state."""

    wing: str
    data_noun: str
    """What the wing's data sets hold: "images"."""

    @property
    def adapter(self) -> ModelAdapter:
        return adapter_named(self.wing)

    @abc.abstractmethod
    def claims(self, model: str) -> bool:
        """Whether a model of this name (``model.name``) belongs to the wing."""

    @abc.abstractmethod
    def models(self) -> list[tuple[str, str]]:
        """(name, one line) of every model that can be named."""

    @abc.abstractmethod
    def data_sets(self) -> list[tuple[str, str]]:
        """(name, one line) of every data set that can be named."""

    def families(self) -> list[tuple[str, str]]:
        """(model type, one line) of the families whose parts are known by name; none where parts are traced."""
        return []

    @abc.abstractmethod
    def holds(self, data: str) -> bool:
        """Whether a data set of this name (``data.name``) belongs to the wing."""

    @abc.abstractmethod
    def wants(self) -> str:
        """What the wing's models need, after a model's name and where its data are another wing's: "reads images"."""

    def check_name(self, model: str) -> None:  # noqa: B027  (a builder may claim whole patterns of names)
        """ConfigError with the near miss for a model's name that nobody knows."""

    @abc.abstractmethod
    def build(self, config: Config, device: torch.device, checkpoint: str | Path | None) -> TrainedWorkload:
        """The workload with its dense model as it is before training; `build_workload` says what is raised."""

    def inspected(self, config: Config, device: torch.device) -> Inspected:
        """The model to look at, as cheaply as the wing can have it."""
        workload = self.build(config, device, None)
        return Inspected(workload.model, workload.example_inputs, workload)

    def cut_files(
        self, config: Config, checkpoint: Path | None, document: PlanDocument, source: Path, out: Path
    ) -> bool:
        """Apply a saved plan file by file, without the model in memory; False where the wing or the settings cannot."""
        return False


@cache
def builder_named(wing: str) -> WorkloadBuilder:
    """The builder of a wing, one of `WINGS`."""
    found = import_module(f"...{wing}.build", __name__).BUILDER
    assert isinstance(found, WorkloadBuilder)
    return found


def builders() -> list[WorkloadBuilder]:
    """The builders of all wings, in the order in which they are asked."""
    return [builder_named(wing) for wing in WINGS]


def builder_of(model: str) -> WorkloadBuilder:
    """The builder that a model's name belongs to."""
    return next(found for found in builders() if found.claims(model))
