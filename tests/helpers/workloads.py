"""Small workloads of image models, made up: no data are read."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from helpers.nets import example
from rlprune.workloads.base import Workload


class Images(Workload):
    """Random images whose labels are what a network says."""

    def __init__(self, model: nn.Module, size: int = 48, dtype: torch.dtype = torch.float32) -> None:
        self.model = model.to(dtype).eval()
        self.example_inputs = example(dtype)[:1]
        images = torch.randn(4 * size, 3, 16, 16, generator=torch.Generator().manual_seed(3), dtype=dtype)
        with torch.no_grad():
            labels = self.model(images).argmax(1)
        parts = [(images[i * size : (i + 1) * size], labels[i * size : (i + 1) * size]) for i in range(4)]
        self.parts = dict(zip(("train", "calibration", "validation", "test"), parts, strict=True))

    def batches(self, split, limit=None):
        images, labels = self.parts[split]
        for start in range(0, min(limit or len(labels), len(labels)), 16):
            yield images[start : start + 16], labels[start : start + 16]


class Noise(Workload):
    """Random images, labelled by the model itself, so that every cut costs loss."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.example_inputs = torch.zeros(1, 1, 8, 8)
        self.images = torch.randn(48, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            self.labels = model(self.images).argmax(1)

    def batches(self, split: str, limit: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        yield self.images[:limit], self.labels[:limit]
