"""From settings to a workload of images."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import torch

from ..config.config import Config, DataConfig
from ..errors import ConfigError
from ..workloads.base import Workload
from ..workloads.builder import Inspected, WorkloadBuilder
from ..workloads.checks import check_finite, run_forward
from ..workloads.tasks.outputs import find_output
from . import data as vision_data
from . import zoo
from .data import Request, VisionData, load_data
from .torchvision_models import TASKS
from .transforms import named_transform
from .workload import VisionWorkload
from .zoo import base_of, build_model, example_for, task_of

_CLASSES = 10
"""Number of classes where no data says it and nothing depends on it."""


class VisionBuilder(WorkloadBuilder):
    """Named models of our zoo, torchvision, timm and transformers, or a user's function, over images."""

    wing = "vision"
    data_noun = "images"

    def claims(self, model: str) -> bool:
        return True

    def models(self) -> list[tuple[str, str]]:
        return zoo.list_models()

    def data_sets(self) -> list[tuple[str, str]]:
        return vision_data.list_data()

    def holds(self, data: str) -> bool:
        return data in [name for name, _ in vision_data.list_data()]

    def wants(self) -> str:
        return "reads images"

    def check_name(self, model: str) -> None:
        base_of(model, 2)

    def build(self, config: Config, device: torch.device, checkpoint: str | Path | None) -> VisionWorkload:
        settings = config.model
        _refuse_other_task(settings.name, config.data.name)
        data = _normalised_by(config.data, _load(config.data.name, _request(config.data)))
        side = data.shape[-1]
        base = base_of(
            settings.name, len(data.classes), data.channels, settings.arguments, settings.weights, side
        )
        model = build_model(
            settings.name,
            len(data.classes),
            data.channels,
            arguments=settings.arguments,
            weights=None if checkpoint else settings.weights,
            checkpoint=checkpoint or settings.checkpoint,
            checkpoint_key=settings.checkpoint_key,
            trained=checkpoint is None and settings.train.epochs > 0,
            seed=settings.seed,
            side=side,
        )
        check_finite(model, settings.name)
        workload = VisionWorkload(
            model,
            data,
            name=f"{settings.name.replace(':', '.')} on {data.name}",
            batch_size=config.data.batch_size,
            device=device,
            augment=config.data.augment,
            base=base,
            transform=named_transform(config.data.transform, "data.transform"),
            train_transform=named_transform(config.data.train_transform, "data.train_transform"),
        )
        for field in ("mean", "std"):
            if getattr(config.data, field) and not workload.normalises:
                raise ConfigError(
                    f"data.{field}: the transforms give floats, which are taken as they are, so it is not used"
                )
        _check_forward(workload, settings.name, len(data.classes))
        return workload

    def inspected(self, config: Config, device: torch.device) -> Inspected:
        """A model of another task without data, which none of the shipped data sets would fit."""
        settings = config.model
        task = _other_task(settings.name)
        if task is None:
            return super().inspected(config, device)
        if config.budget.metric == "latency":
            raise ConfigError(
                f"budget.metric: latency of {settings.name!r} ({task}) needs a workload of your own "
                "(workload: module:name)"
            )
        base = base_of(settings.name, _CLASSES, arguments=settings.arguments, weights=settings.weights)
        model = build_model(
            settings.name,
            _CLASSES,
            arguments=settings.arguments,
            weights=settings.weights,
            checkpoint=settings.checkpoint,
            seed=settings.seed,
        )
        return Inspected(model, example_for(base, config.data.image_size), None)


def _other_task(name: str) -> str | None:
    """The task of a named model that gives something else than a class for an image."""
    task = task_of(base_of(name, _CLASSES))
    return None if task == "classification" else task


def _refuse_other_task(name: str, data: str) -> None:
    task = _other_task(name)
    if task is not None:
        raise ConfigError(
            f"model.name {name!r}: gives {TASKS[task]} ({task}), but data.name {data!r} holds one class for each "
            "image; write a Workload with this model and your data (workload: module:name, docs/write-your-own.md)"
        )


@functools.lru_cache(maxsize=2)
def _load(name: str, request: Request) -> VisionData:
    """Several checkpoints of one data set share its tensors."""
    return load_data(name, request)


def _normalised_by(settings: DataConfig, data: VisionData) -> VisionData:
    """The data set with the mean and std of the settings, where they give any."""
    for field in ("mean", "std"):
        values = getattr(settings, field)
        if values and len(values) != data.channels:
            raise ConfigError(
                f"data.{field}: needs a number for each of the {data.channels} channels of {data.name}, "
                f"got {list(values)}"
            )
    return replace(data, mean=settings.mean or data.mean, std=settings.std or data.std)


def _request(data: DataConfig) -> Request:
    return Request(
        root=Path(data.root).expanduser() if data.root is not None else None,
        download=data.download,
        image_size=data.image_size,
        sizes=(data.train, data.calibration, data.validation, data.test),
        seed=data.seed,
        resize=data.resize,
        skip_corrupt=data.skip_corrupt,
    )


def _check_forward(workload: Workload, name: str, classes: int) -> None:
    outputs = run_forward(workload, name)
    shape = tuple(find_output(outputs, workload.output).shape)
    if shape != (1, classes):
        raise ConfigError(
            f"model.name {name!r}: gives {shape} for one image, but the data has {classes} classes, "
            f"so (1, {classes}) is needed; see model.arguments"
        )


BUILDER = VisionBuilder()
