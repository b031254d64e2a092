"""Image classification as a workload: tensors on the device, normalised and augmented there."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config.config import ModelConfig
from ..errors import ArtifactError, DataError
from ..recovery.finetune import FitResult, Progress, Schedule, Watch, fit
from ..workloads.base import SPLITS, Batch, TrainedWorkload, check_split
from ..workloads.tasks.outputs import find_output
from .data import Augment, Split, VisionData
from .transforms import Transform, transformed

_CACHE_BYTES = {"cpu": 1 << 30, "cuda": 16 << 30}
_EVALUATION_PIXELS = {"cpu": 1 << 19, "cuda": 1 << 22}


class VisionWorkload(TrainedWorkload):
    """A classifier and a data set.

    Images are kept as uint8 on the device while all of them fit into ``cache_bytes`` (in host memory
    otherwise) and normalised batch by batch. Splits whose normalised float images fit as well are
    normalised once, so that reading an evaluation batch is a slice.

    Args:
        model: dense classifier, (N, C, H, W) -> (N, classes); moved to ``device``, put into eval mode.
        data: splits and statistics.
        batch_size: least images in an evaluation batch; small images are read in larger ones.
        augment: whether ``train_batches`` uses the data set's augmentation.
        base: how to rebuild the architecture, see ``Workload.base``.
        transform: for every image of every split, before the model; see `Transform`.
        train_transform: for the images of ``train_batches`` instead of ``transform`` and the augmentation, drawn from
            its generator.
    """

    repeats_training = True

    def __init__(
        self,
        model: nn.Module,
        data: VisionData,
        *,
        name: str = "",
        batch_size: int = 256,
        device: torch.device | str = "cpu",
        augment: bool = True,
        base: Mapping[str, object] | None = None,
        cache_bytes: int | None = None,
        transform: Transform | None = None,
        train_transform: Transform | None = None,
    ) -> None:
        place = torch.device(device)
        self.model = model.to(place).eval()
        self.name = name or data.name
        self.data = data
        self.base = base or {"source": "given"}
        self._place = place
        self._augment = data.augment if augment and train_transform is None else None
        self._transform, self._train_transform = transform, train_transform
        pixels = data.shape[1] * data.shape[2]
        most = _EVALUATION_PIXELS.get(place.type, _EVALUATION_PIXELS["cpu"])
        self._batch = max(batch_size, min(1000, most // pixels)) if pixels < 4096 else batch_size
        self._budget = (
            _CACHE_BYTES.get(place.type, _CACHE_BYTES["cpu"]) if cache_bytes is None else cache_bytes
        )
        self._mean = torch.tensor(data.mean, device=place).view(1, -1, 1, 1) * 255
        self._scale = 1 / (torch.tensor(data.std, device=place).view(1, -1, 1, 1) * 255)
        self._splits = self._placed()
        self._floats: dict[str, Tensor] = {}
        first = data.splits["train"].images[:1]
        self.normalises = any(
            images.dtype == torch.uint8 for images in (self._seen(first), self._trained(first, 0))
        )
        """Whether the data's mean and std are used: not where the transforms give floats."""
        self.example_inputs = self._normalise(self._seen(first))

    @property
    def device(self) -> torch.device:
        return self._place

    @property
    def augmentation(self) -> Augment | None:
        """What ``train_batches`` does to the images, None for nothing."""
        return self._augment

    def size(self, split: str) -> int:
        """Number of images of a split."""
        check_split(split)
        return len(self._splits[split].labels)

    def batches(self, split: str, limit: int | None = None) -> Iterator[Batch]:
        """Normalised images (N, C, H, W) and labels (N,), in the split's order."""
        part = self._splits[split]
        count = len(part.labels) if limit is None else min(limit, len(part.labels))
        floats = self._cached(split)
        for start in range(0, count, self._batch):
            end = min(start + self._batch, count)
            labels = part.labels[start:end].to(self._place)
            if floats is not None:
                yield floats[start:end], labels
            else:
                yield self._normalise(self._seen(part.images[start:end])), labels

    def train_batches(self, generator: torch.Generator, batch_size: int | None = None) -> Iterator[Batch]:
        """One shuffled epoch, augmented; the last incomplete batch is left out unless it is the only one."""
        part = self._splits["train"]
        size = self._batch if batch_size is None else batch_size
        order = torch.randperm(len(part.labels), generator=generator)
        for start in range(0, self.train_steps(size) * size, size):
            index = order[start : start + size]
            # Drawn on the CPU, so that every device sees the same epoch.
            draw = self._augment and _draw(len(index), self._augment, generator)
            seed = 0 if self._transform is None and self._train_transform is None else _seed(generator)
            index = index.to(part.images.device)
            images = part.images[index].to(self._place)
            if self._augment and draw:
                images = crop_and_flip(images, self._augment.padding, *draw)
            yield self._normalise(self._trained(images, seed)), part.labels[index].to(self._place)

    def train_steps(self, batch_size: int | None = None) -> int:
        """Number of batches of one epoch of ``train_batches``."""
        size = self._batch if batch_size is None else batch_size
        return max(1, len(self._splits["train"].labels) // size)

    def training_facts(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        train = self.data.splits["train"]
        facts = {"mean": self.data.mean, "std": self.data.std, "augment": self.augmentation}
        tensors = {"images": train.images, "labels": train.labels}
        if self._transform is not None or self._train_transform is not None:
            # The code of a transform cannot be hashed; what it does to a few images tells one from another.
            tensors |= {"seen": self._seen(train.images[:4]), "trained": self._trained(train.images[:4], 0)}
        return facts, tensors

    def train(self, settings: ModelConfig, state: Path, progress: Progress | None) -> FitResult:
        """SGD on the train split; a killed training goes on from ``state``."""
        options = settings.train

        def loss(outputs: object, targets: Tensor) -> Tensor:
            logits = find_output(outputs, self.output)
            return F.cross_entropy(logits, targets, label_smoothing=options.label_smoothing)

        run = functools.partial(
            fit,
            self.model,
            lambda generator: self.train_batches(generator, options.batch_size),
            loss,
            Schedule(
                options.epochs * self.train_steps(options.batch_size),
                options.lr,
                options.momentum,
                options.weight_decay,
                mixed_precision=True,
            ),
            watch=Watch(progress, "dense training", state, save_seconds=30.0),
        )
        try:
            return run(generator=torch.Generator().manual_seed(settings.seed))
        except ArtifactError:
            state.unlink(missing_ok=True)  # left by a kill in the middle of another version's run
            return run(generator=torch.Generator().manual_seed(settings.seed))

    def _placed(self) -> dict[str, Split]:
        total = sum(self.data.splits[s].images.numel() for s in SPLITS)
        place = self._place if total <= self._budget else torch.device("cpu")
        placed = {}
        for split in SPLITS:
            part = self.data.splits[split]
            if len(part.labels) == 0:
                raise DataError(f"data.{split}: the split is empty")
            placed[split] = Split(part.images.to(place), part.labels.to(place))
        return placed

    def _cached(self, split: str) -> Tensor | None:
        """The whole split normalised on the device, None where that is too large."""
        if split not in self._floats:
            images = self._splits[split].images
            used = sum(t.numel() * 4 for t in self._floats.values())
            if images.numel() * 4 + used > self._budget // 2:
                return None
            self._floats[split] = self._normalise(self._seen(images))
        return self._floats[split]

    def _seen(self, images: Tensor) -> Tensor:
        """Images as the model is to see them in an evaluation, but for the normalisation."""
        if self._transform is None:
            return images.to(self._place)
        return transformed(self._transform, images, 0, "data.transform").to(self._place)

    def _trained(self, images: Tensor, seed: int) -> Tensor:
        """Augmented images as the model is to see them in a training, but for the normalisation."""
        if self._train_transform is not None:
            return transformed(self._train_transform, images, seed, "data.train_transform").to(self._place)
        if self._transform is not None:
            return transformed(self._transform, images, seed, "data.transform").to(self._place)
        return images

    def _normalise(self, images: Tensor) -> Tensor:
        return (images.float() - self._mean) * self._scale if images.dtype == torch.uint8 else images


def _seed(generator: torch.Generator) -> int:
    return int(torch.randint(2**62, (), generator=generator))


def _draw(count: int, augment: Augment, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Offsets down and right (0 .. 2 padding), and which images to flip; each of shape (count,)."""
    span = 2 * augment.padding + 1
    down = torch.randint(span, (count,), generator=generator)
    right = torch.randint(span, (count,), generator=generator)
    flip = torch.rand(count, generator=generator) < (0.5 if augment.flip else 0.0)
    return down, right, flip


def crop_and_flip(images: Tensor, padding: int, down: Tensor, right: Tensor, flip: Tensor) -> Tensor:
    """Crop every image of (N, C, H, W) at its own offset after zero padding, then mirror some of them.

    All images are cut by one gather: pixel (h, w) of image n comes from row ``down[n] + h`` and column
    ``right[n] + w`` (counted from the right where ``flip[n]``) of the padded image.
    """
    count, channels, height, width = images.shape
    device = images.device
    padded = F.pad(images, (padding,) * 4)
    rows = down.to(device)[:, None] + torch.arange(height, device=device)
    columns = torch.arange(width, device=device).expand(count, width)
    columns = torch.where(flip.to(device)[:, None], columns.flip(1), columns) + right.to(device)[:, None]
    flat = rows[:, :, None] * (width + 2 * padding) + columns[:, None, :]
    flat = flat.view(count, 1, height * width).expand(count, channels, height * width)
    return padded.flatten(2).gather(2, flat).view(count, channels, height, width)
