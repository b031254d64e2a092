"""A user's own workload of every task: small models and made data, nothing is read."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.ssd import SSD
from torchvision.ops import MultiScaleRoIAlign

from rlprune.utils.pytrees import take
from rlprune.workloads.base import SPLITS, Workload

Data = tuple[Any, Any]


class Made(Workload):
    """A model on made data: each split is one (inputs, targets), read in batches."""

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        make: Callable[[torch.Generator, int], Data],
        *,
        size: int = 12,
        batch: int = 5,
        **settings: Any,
    ) -> None:
        self.model, self.example_inputs = model.eval(), example_inputs
        self.size_of_split, self.batch = size, batch
        self.parts = {s: make(torch.Generator().manual_seed(i), size) for i, s in enumerate(SPLITS)}
        for name, value in settings.items():
            setattr(self, name, value)

    def batches(self, split: str, limit: int | None = None) -> Iterator[Data]:
        inputs, targets = self.parts[split]
        for start in range(0, self.size_of_split, self.batch):
            part = slice(start, min(start + self.batch, self.size_of_split))
            yield take(inputs, part), take(targets, part)

    def train_batches(self, generator: torch.Generator, batch_size: int | None = None) -> Iterator[Data]:
        inputs, targets = self.parts["train"]
        order = torch.randperm(self.size_of_split, generator=generator)
        for index in order.split(min(batch_size or self.batch, self.size_of_split)):
            yield picked(inputs, index), picked(targets, index)

    def train_steps(self, batch_size: int | None = None) -> int:
        return -(-self.size_of_split // min(batch_size or self.batch, self.size_of_split))


def picked(value: Any, index: Tensor) -> Any:
    """Some samples of a nest, by their numbers."""
    if isinstance(value, Tensor):
        return value[index]
    if isinstance(value, list):
        return [value[i] for i in index.tolist()]
    if isinstance(value, dict):
        return {name: picked(part, index) for name, part in value.items()}
    return tuple(picked(part, index) for part in value)


class Trunk(nn.Module):
    """Two convolutions with batch norms over (N, 3, H, W); ``width`` channels come out."""

    def __init__(self, width: int = 8, stride: int = 1) -> None:
        super().__init__()
        self.first, self.norm1 = nn.Conv2d(3, width, 3, padding=1, stride=stride), nn.BatchNorm2d(width)
        self.second, self.norm2 = nn.Conv2d(width, width, 3, padding=1, stride=stride), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm1(self.first(x)))
        return torch.relu(self.norm2(self.second(x)))


class Head(nn.Module):
    """Images to ``outputs`` numbers each."""

    def __init__(self, outputs: int, width: int = 8) -> None:
        super().__init__()
        self.trunk, self.head = Trunk(width), nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.trunk(x).mean((2, 3)))


class Maps(nn.Module):
    """Images to class maps in a dict, with an auxiliary one beside them, as torchvision's segmentation models."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.trunk, self.head, self.other = Trunk(), nn.Conv2d(8, classes, 1), nn.Conv2d(8, classes, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.trunk(x)
        return {"out": self.head(features), "aux": self.other(features)}


class TwoInputs(nn.Module):
    """An image and a vector to classes, in a tuple with what lies before the last layer."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.trunk, self.side = Trunk(), nn.Linear(5, 8)
        self.hidden, self.head = nn.Linear(16, 12), nn.Linear(12, classes)

    def forward(self, image: Tensor, vector: Tensor) -> dict[str, Tensor]:
        joined = torch.cat([self.trunk(image).mean((2, 3)), torch.relu(self.side(vector))], dim=1)
        hidden = torch.relu(self.hidden(joined))
        return {"hidden": hidden, "logits": self.head(hidden)}


class Steps(nn.Module):
    """Images (N, 3, H, W) to a class for each column, (N, W, classes)."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.trunk, self.hidden, self.head = Trunk(), nn.Linear(8, 12), nn.Linear(12, classes)

    def forward(self, x: Tensor) -> Tensor:
        columns = self.trunk(x).mean(2).transpose(1, 2)
        return self.head(torch.relu(self.hidden(columns)))


def images(generator: torch.Generator, count: int, side: int = 8) -> Tensor:
    return torch.randn(count, 3, side, side, generator=generator)


def labelled(targets: Callable[[Tensor, torch.Generator], Any]) -> Callable[[torch.Generator, int], Data]:
    """Data of random images with targets that are made of them."""

    def make(generator: torch.Generator, count: int) -> Data:
        x = images(generator, count)
        return x, targets(x, generator)

    return make


def boxes(generator: torch.Generator, count: int, side: int = 64) -> Data:
    """Images with one bright square (class 1) or bar (class 2) each, as lists; and their boxes."""
    pictures, targets = [], []
    for _ in range(count):
        label = int(torch.randint(1, 3, (), generator=generator))
        wide, high = (side // 3, side // 3) if label == 1 else (side // 2, side // 5)
        left, top = (int(torch.randint(0, side - n, (), generator=generator)) for n in (wide, high))
        picture = 0.1 * torch.rand(3, side, side, generator=generator)
        picture[label - 1, top : top + high, left : left + wide] += 0.8
        pictures.append(picture)
        box = torch.tensor([[left, top, left + wide, top + high]], dtype=torch.float32)
        targets.append({"boxes": box, "labels": torch.tensor([label])})
    return pictures, targets


class _Features(nn.Sequential):
    """Features of an eighth of the size, as detectors take them."""

    def __init__(self, width: int = 8) -> None:
        super().__init__(Trunk(8, stride=2), nn.Conv2d(8, width, 3, stride=2, padding=1), nn.ReLU())
        self.out_channels: Any = width


def ssd() -> SSD:
    anchors = DefaultBoxGenerator([[2]], scales=[0.3, 0.6])
    features = _Features()
    features.out_channels = [8]
    return SSD(features, anchors, (64, 64), 3, score_thresh=0.05)


def anchors() -> AnchorGenerator:
    return AnchorGenerator(((16, 32),), ((0.5, 1.0),))


def retinanet() -> RetinaNet:
    return RetinaNet(_Features(), 3, min_size=64, max_size=64, anchor_generator=anchors(), score_thresh=0.0)


def fcos() -> FCOS:
    generator = AnchorGenerator(((16,),), ((1.0,),))
    return FCOS(_Features(32), 3, min_size=64, max_size=64, anchor_generator=generator, score_thresh=0.0)


def faster_rcnn() -> FasterRCNN:
    pool = MultiScaleRoIAlign(["0"], 3, 2)
    return FasterRCNN(
        _Features(), 3, min_size=64, max_size=64, rpn_anchor_generator=anchors(), box_roi_pool=pool,
        rpn_pre_nms_top_n_test=20, rpn_post_nms_top_n_test=10, box_score_thresh=0.0,
    )  # fmt: skip


EXAMPLE = torch.zeros(1, 3, 8, 8)


def classification(**settings: Any) -> Made:
    data = labelled(lambda x, g: torch.randint(4, (len(x),), generator=g))
    return Made(Head(4), EXAMPLE, data, **settings)


def multilabel(**settings: Any) -> Made:
    data = labelled(lambda x, g: (torch.rand(len(x), 5, generator=g) > 0.5).float())
    return Made(Head(5), EXAMPLE, data, task="multilabel", **settings)


def regression(**settings: Any) -> Made:
    data = labelled(lambda x, g: 100 * x.mean((1, 2, 3)))
    return Made(Head(1), EXAMPLE, data, task="regression", **settings)


def segmentation(**settings: Any) -> Made:
    def maps(x: Tensor, generator: torch.Generator) -> Tensor:
        found = (x[:, 0] > 0).long() + (x[:, 1] > 0.5).long()
        found[:, 0] = 255
        return found

    return Made(Maps(), EXAMPLE, labelled(maps), task="segmentation", **settings)


def sequence(**settings: Any) -> Made:
    data = labelled(lambda x, g: (x.mean((1, 2)) > 0).long() + (x.mean((1, 2)) > 0.2).long())
    return Made(Steps(), EXAMPLE, data, task="sequence", **settings)


def embedding(**settings: Any) -> Made:
    data = labelled(lambda x, g: F.normalize(torch.randn(len(x), 6, generator=g), dim=1))
    return Made(Head(6), EXAMPLE, data, task="embedding", **settings)


def detection(model: nn.Module | None = None, **settings: Any) -> Made:
    # A batch of one image, as a tensor: the detector goes through it like through a list.
    example = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(9))
    return Made(model or ssd(), example, boxes, task="detection", **settings)


def two_inputs(**settings: Any) -> Made:
    def make(generator: torch.Generator, count: int) -> Data:
        inputs = (images(generator, count), torch.randn(count, 5, generator=generator))
        return inputs, torch.randint(4, (count,), generator=generator)

    return Made(TwoInputs(), (EXAMPLE, torch.zeros(1, 5)), make, **settings)


def named_inputs(**settings: Any) -> Made:
    def make(generator: torch.Generator, count: int) -> Data:
        inputs = {"vector": torch.randn(count, 5, generator=generator), "image": images(generator, count)}
        return inputs, torch.randint(4, (count,), generator=generator)

    return Made(TwoInputs(), {"image": EXAMPLE, "vector": torch.zeros(1, 5)}, make, **settings)


TASKS: dict[str, Callable[..., Made]] = {
    "classification": classification,
    "multilabel": multilabel,
    "regression": regression,
    "segmentation": segmentation,
    "sequence": sequence,
    "embedding": embedding,
    "detection": detection,
    "two inputs": two_inputs,
    "named inputs": named_inputs,
}


def made(kind: str, **settings: Any) -> Made:
    """A workload of a kind; the same weights and data each time, batch norms that have seen its images."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        workload = TASKS[kind](**settings)
        seen(workload)
    return workload


def seen(workload: Made) -> None:
    """Give the batch norms of a workload's model statistics of its own, and weights that are not their defaults."""
    model = workload.model
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = None
            norm.reset_running_stats()
            norm.train()
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.uniform_(norm.bias, -0.3, 0.3)
    with torch.no_grad(), contextlib.suppress(StopIteration):
        for inputs, _ in workload.batches("train"):
            workload.task_type.forward(model, inputs)
    model.eval()
