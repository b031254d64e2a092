"""What a data set of images is before it is split, and the registration of those of others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..config.names import DATA_SETS
from ..errors import DataError
from ..utils.registry import Named
from ..workloads.base import SPLITS
from .image_folder import FolderSource


@dataclass(frozen=True)
class Augment:
    """Random crop after zero padding of ``padding`` pixels, and horizontal flip of half of the images."""

    padding: int
    flip: bool


@dataclass(frozen=True)
class Split:
    """Images (N, C, H, W) uint8 and labels (N,) int64."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Request:
    """What is asked of a data set; sizes are images, None for the default (train, test: all that are left)."""

    root: Path | None = None
    download: bool = False
    image_size: int | None = None
    sizes: tuple[int | None, int | None, int | None, int | None] = (None, None, None, None)
    seed: int = 0
    resize: int | None = None
    skip_corrupt: bool = False

    def size(self, split: str) -> int | None:
        return self.sizes[SPLITS.index(split)]


@dataclass(frozen=True)
class Source:
    """A data set before it is split: train part, official test part (or None), and defaults."""

    name: str
    train: Split | FolderSource
    test: Split | FolderSource | None
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: Augment
    validation: int
    calibration: int
    held_out: int = 0  # size of the test split where none is official


@dataclass(frozen=True)
class ImageSource:
    """What a registered data set gives: images (N, C, H, W) uint8 with labels (N,), whole numbers from 0.

    Without an official ``test`` part a fifth of ``train`` is held out for it. ``classes`` are "0", "1", ... where
    they are not named; ``mean`` and ``std`` of each channel of images / 255 are those of ``train``.
    """

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor] | None = None
    classes: tuple[str, ...] = ()
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    augment: Augment = Augment(0, False)


Read = Callable[[Request], ImageSource]


def data_set(summary: str, *, name: str | None = None) -> Callable[[Read], Read]:
    """Register a data set of images (a name for ``data.name``) under the name of the function below.

    The function takes a `Request` (``root``, ``download``, ``seed``) and returns an `ImageSource`, which is split
    and scaled as ``data`` says.

    Args:
        summary: one line for ``rlprune list data``.
        name: instead of the function's own.

    Raises (when applied):
        ConfigError: the name is taken, or the summary is missing.
    """
    return DATA_SETS.decorator(
        "data_set", summary, lambda own, function: Named(own, summary, function, "vision"), name
    )


def completed(name: str, given: object, request: Request) -> Source:
    """A registered data set with all that it leaves open; DataError naming it where it is none."""
    if not isinstance(given, ImageSource):
        raise DataError(f"data_set {name!r}: must return a rlprune.ImageSource, got {type(given).__name__}")
    train = _checked(name, "train", given.train, request.image_size)
    test = None if given.test is None else _checked(name, "test", given.test, request.image_size)
    if test is not None and test.images.shape[1:] != train.images.shape[1:]:
        raise DataError(
            f"data_set {name!r}: test must have images of the shape {tuple(train.images.shape[1:])} of train"
        )
    highest = max(int(part.labels.max()) for part in (train, test) if part is not None)
    classes = given.classes or tuple(str(i) for i in range(highest + 1))
    if highest >= len(classes):
        raise DataError(f"data_set {name!r}: holds label {highest}, but only {len(classes)} classes")
    pixels = train.images.double().flatten(2) / 255
    mean = given.mean or tuple(pixels.mean(dim=(0, 2)).tolist())
    std = given.std or tuple(pixels.std(dim=(0, 2)).clamp_min(1e-6).tolist())
    return Source(name, train, test, classes, mean, std, given.augment, **shares(len(train.labels)))


def _checked(name: str, part: str, given: tuple[Tensor, Tensor], size: int | None) -> Split:
    images, labels = given
    if images.ndim != 4 or images.dtype != torch.uint8 or labels.shape != images.shape[:1] or not len(labels):
        raise DataError(
            f"data_set {name!r}: {part} must be images (N, C, H, W) of torch.uint8 with labels (N,), got "
            f"{tuple(images.shape)} of {images.dtype} with {tuple(labels.shape)}"
        )
    if labels.is_floating_point() or int(labels.min()) < 0:
        raise DataError(f"data_set {name!r}: labels of {part} must be whole numbers from 0")
    return Split(resized(images, size), labels.long())


def shares(count: int) -> dict[str, int]:
    """Default sizes of the splits of a data set of any size."""
    return {
        "validation": min(5000, count // 10),
        "calibration": min(1000, count // 10),
        "held_out": count // 5,
    }


def resized(images: Tensor, size: int | None) -> Tensor:
    """Scale uint8 images (N, C, H, W) to ``size`` x ``size`` (bilinear, antialiased); None keeps theirs."""
    if size is None or images.shape[-2:] == (size, size):
        return images
    chunks = [
        torch.nn.functional.interpolate(c.float(), (size, size), mode="bilinear", antialias=True)
        for c in images.split(1000)
    ]
    return torch.cat([c.round().clamp(0, 255).to(torch.uint8) for c in chunks])
