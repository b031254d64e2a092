"""Small trained workloads of many kinds, which `rlprune train` takes as `workload: helpers.task_runs:NAME`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import ResNet
from torchvision.models.detection import ssdlite320_mobilenet_v3_large
from torchvision.models.resnet import BasicBlock
from torchvision.models.segmentation import lraspp_mobilenet_v3_large

from helpers.tasks import Data, Head, Made, Trunk, TwoInputs, boxes
from rlprune.recovery.batch_norm import recalibrate
from rlprune.recovery.finetune import Schedule, fit


def trained(workload: Made, steps: int = 60, lr: float = 0.02) -> Made:
    """The workload, its model trained for a few seconds."""
    if steps:
        fit(
            workload.model,
            workload.train_batches,
            workload.loss_of,
            Schedule(steps, lr),
            forward=workload.outputs_for_loss,
        )
        # So few steps leave the statistics far behind the weights.
        recalibrate(workload.model, workload.batches("train"))
    return workload


def run_of(make: Callable[[], Made]) -> Callable[[], Made]:
    """The same weights each time, whatever was drawn before."""

    def build() -> Made:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return make()

    return build


def pictures(generator: torch.Generator, count: int, side: int = 16) -> tuple[Tensor, Tensor]:
    """Noise with bright stripes: the class is where they are, 0 to 3."""
    labels = torch.randint(4, (count,), generator=generator)
    x = 0.5 * torch.randn(count, 3, side, side, generator=generator)
    for i, label in enumerate(labels.tolist()):
        start = label * side // 4
        x[i, label % 3, start : start + side // 4] += 1.5
    return x, labels


def _classes(generator: torch.Generator, count: int, side: int = 16) -> Data:
    return pictures(generator, count, side)


def _labels(generator: torch.Generator, count: int) -> Data:
    wanted = (torch.rand(count, 4, generator=generator) > 0.5).float()
    x = 0.5 * torch.randn(count, 3, 16, 16, generator=generator)
    for label in range(4):
        x[:, label % 3, 4 * label : 4 * label + 4] += 1.5 * wanted[:, label, None, None]
    return x, wanted


def _numbers(generator: torch.Generator, count: int) -> Data:
    x = torch.randn(count, 3, 16, 16, generator=generator)
    size = torch.rand(count, 1, 1, 1, generator=generator) * 2
    return x * size, 100 * size[:, 0, 0, 0]


def _maps(generator: torch.Generator, count: int, side: int = 32) -> Data:
    """Squares (class 1) and bars (class 2) on noise, and the class of every pixel."""
    x, where = boxes(generator, count, side)
    maps = torch.zeros(count, side, side, dtype=torch.int64)
    for i, found in enumerate(where):
        left, top, right, bottom = found["boxes"][0].int().tolist()
        maps[i, top:bottom, left:right] = int(found["labels"])
    maps[:, 0] = 255
    return torch.stack(x), maps


def _columns(generator: torch.Generator, count: int) -> Data:
    """Images whose columns are bright in one of three channels, which is the column's class."""
    labels = torch.randint(3, (count, 12), generator=generator)
    x = 0.5 * torch.randn(count, 3, 8, 12, generator=generator)
    return x + torch.nn.functional.one_hot(labels, 3).movedim(2, 1)[:, :, None].float(), labels


class CRNN(nn.Module):
    """Convolutions over an image, a bidirectional LSTM over its columns, a class for each of them."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.trunk = Trunk(12)
        self.lstm = nn.LSTM(12, 10, batch_first=True, bidirectional=True)
        self.head = nn.Linear(20, classes)

    def forward(self, x: Tensor) -> Tensor:
        columns = self.trunk(x).mean(2).transpose(1, 2)
        return self.head(self.lstm(columns)[0])


def _both(generator: torch.Generator, count: int) -> Data:
    x, labels = pictures(generator, count)
    vector = torch.randn(count, 5, generator=generator) + labels[:, None]
    return (x, vector), labels


EXAMPLE = torch.zeros(1, 3, 16, 16)


@run_of
def multilabel() -> Made:
    return trained(
        Made(Head(4, 12), EXAMPLE, _labels, task="multilabel", split_metric="F1", size=32, batch=16)
    )


@run_of
def regression() -> Made:
    return trained(Made(Head(1, 12), EXAMPLE, _numbers, task="regression", size=32, batch=16), lr=1e-4)


@run_of
def segmentation() -> Made:
    model = lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=3)
    workload = Made(model, torch.zeros(1, 3, 32, 32), _maps, task="segmentation", size=8, batch=8)
    return trained(workload, 8)


@run_of
def detection() -> Made:
    model = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=3)
    model.transform.min_size, model.transform.max_size = (128,), 128
    model.transform.fixed_size = (128, 128)
    picture = torch.rand(3, 128, 128, generator=torch.Generator().manual_seed(0))
    workload = Made(model, ([picture],), partial(boxes, side=128), task="detection", size=8, batch=8)
    return trained(workload, 4)


@run_of
def crnn() -> Made:
    return trained(Made(CRNN(), torch.zeros(1, 3, 8, 12), _columns, task="sequence", size=32, batch=16))


@run_of
def group_norm() -> Made:
    model = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=4, norm_layer=lambda width: nn.GroupNorm(8, width))
    data = partial(_classes, side=32)
    return trained(Made(model, torch.zeros(1, 3, 32, 32), data, size=16, batch=16), 8)


@run_of
def vit() -> Made:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=16,
        patch_size=4, num_labels=4,
    )  # fmt: skip
    return trained(Made(ViTForImageClassification(config), EXAMPLE, _classes, size=32, batch=16), 40)


@run_of
def two_inputs() -> Made:
    return trained(Made(TwoInputs(), (EXAMPLE, torch.zeros(1, 5)), _both, size=32, batch=16))


RUNS: dict[str, dict[str, Any]] = {
    "multilabel": {"task": "multilabel", "metric": "F1"},
    "regression": {"task": "regression", "metric": "R2"},
    "segmentation": {"task": "segmentation", "metric": "mIoU"},
    "detection": {"task": "detection", "metric": "mAP"},
    "crnn": {"task": "sequence", "metric": "step accuracy"},
    "group_norm": {"task": "classification", "metric": "accuracy"},
    "vit": {"task": "classification", "metric": "accuracy"},
    "two_inputs": {"task": "classification", "metric": "accuracy"},
}
