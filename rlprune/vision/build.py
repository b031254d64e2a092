"""From settings to a workload of images."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..config.config import Config, DataConfig
from ..errors import ConfigError
from ..workloads.base import Workload
from ..workloads.builder import WorkloadBuilder
from ..workloads.checks import check_finite, run_forward
from . import data as vision_data
from . import zoo
from .data import Request, VisionData, load_data
from .transforms import named_transform
from .workload import VisionWorkload
from .zoo import base_of, build_model


class VisionBuilder(WorkloadBuilder):
    """Named models of our zoo, torchvision and timm, or a user's function, over images."""

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
        data = _normalised_by(config.data, _load(config.data.name, _request(config.data)))
        settings = config.model
        base = base_of(settings.name, len(data.classes), data.channels, settings.arguments, settings.weights)
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
    shape = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
    if shape != (1, classes):
        raise ConfigError(
            f"model.name {name!r}: gives {shape} for one image, but the data has {classes} classes, "
            f"so (1, {classes}) is needed; see model.arguments"
        )


BUILDER = VisionBuilder()
