"""Models of every task, trained, pruned and fine-tuned -> docs/tasks.md.

    python docs/scripts/tasks.py [--only vit crnn] [--seeds 1] [--evaluations 16]

Small models on made data: what the page shows is that score, metric and fine-tune do what they should for each kind
of output, not how far a network of that kind can be pruned. Finished kinds are kept in --out, so that a stopped run
goes on where it was.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from torchvision.models import ResNet
from torchvision.models.detection import ssdlite320_mobilenet_v3_large
from torchvision.models.resnet import BasicBlock
from torchvision.models.segmentation import lraspp_mobilenet_v3_large

import rlprune
from rlprune.evaluation import EvaluationLog
from rlprune.report import markdown_table
from rlprune.utils import Console, hardware, read_json
from rlprune.workloads import SPLITS

DOCS = Path(__file__).resolve().parents[1]
Data = tuple[Any, Any]
Make = Callable[[torch.Generator, int], Data]
EVALUATED = 64


def shapes(
    generator: torch.Generator, count: int, side: int
) -> tuple[Tensor, list[dict[str, Tensor]], Tensor]:
    """Noisy images with a square (class 1) or a bar (class 2) each, their boxes, and the class of each pixel."""
    images = 0.3 * torch.rand(count, 3, side, side, generator=generator)
    maps, boxes = torch.zeros(count, side, side, dtype=torch.int64), []
    for i in range(count):
        label = int(torch.randint(1, 3, (), generator=generator))
        wide, high = (side // 3, side // 3) if label == 1 else (side // 2, side // 5)
        left, top = (int(torch.randint(0, side - n, (), generator=generator)) for n in (wide, high))
        color = 0.3 + 0.6 * torch.rand(3, 1, 1, generator=generator)
        images[i, :, top : top + high, left : left + wide] += color
        maps[i, top : top + high, left : left + wide] = label
        box = torch.tensor([[left, top, left + wide, top + high]], dtype=torch.float32)
        boxes.append({"boxes": box, "labels": torch.tensor([label])})
    return images, boxes, maps


def stripes(generator: torch.Generator, count: int, side: int) -> tuple[Tensor, Tensor]:
    """Noise in which each of four bands is bright or not: images, and which of the bands are."""
    bright = (torch.rand(count, 4, generator=generator) > 0.5).float()
    images = torch.randn(count, 3, side, side, generator=generator)
    band = side // 4
    for i in range(4):
        images[:, i % 3, band * i : band * (i + 1)] += bright[:, i, None, None]
    return images, bright


def several_labels(generator: torch.Generator, count: int) -> Data:
    return stripes(generator, count, 16)


def four_classes(side: int, generator: torch.Generator, count: int) -> Data:
    """The class counts two of the bands."""
    images, bright = stripes(generator, count, side)
    return images, (bright[:, 0] + 2 * bright[:, 1]).long()


def numbers(generator: torch.Generator, count: int) -> Data:
    size = 2 * torch.rand(count, 1, 1, 1, generator=generator)
    return size * torch.randn(count, 3, 16, 16, generator=generator), 100 * size[:, 0, 0, 0]


def pixel_classes(generator: torch.Generator, count: int) -> Data:
    images, _, maps = shapes(generator, count, 64)
    return images, maps


def boxed(generator: torch.Generator, count: int) -> Data:
    images, boxes, _ = shapes(generator, count, 128)
    return list(images), boxes


def columns(generator: torch.Generator, count: int) -> Data:
    labels = torch.randint(3, (count, 16), generator=generator)
    images = 1.5 * torch.randn(count, 3, 8, 16, generator=generator)
    return images + nn.functional.one_hot(labels, 3).movedim(2, 1)[:, :, None].float(), labels


def image_and_vector(generator: torch.Generator, count: int) -> Data:
    images, labels = four_classes(16, generator, count)
    vector = torch.randn(count, 5, generator=generator) + labels[:, None] % 2
    return (images, vector), labels


class Trunk(nn.Sequential):
    def __init__(self, width: int = 32) -> None:
        parts: list[nn.Module] = []
        for before in (3, width, width):
            parts += [nn.Conv2d(before, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        super().__init__(*parts)


class Head(nn.Sequential):
    def __init__(self, outputs: int) -> None:
        super().__init__(Trunk(), nn.AdaptiveAvgPool2d((4, 1)), nn.Flatten(), nn.Linear(128, outputs))


class CRNN(nn.Module):
    """Convolutions, a bidirectional LSTM over the columns, a class for each of them."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = Trunk()
        self.lstm = nn.LSTM(32, 24, batch_first=True, bidirectional=True)
        self.head = nn.Linear(48, 3)

    def forward(self, images: Tensor) -> Tensor:
        hidden, _ = self.lstm(self.trunk(images).mean(2).transpose(1, 2))
        return self.head(hidden)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.side = Head(32), nn.Linear(5, 32)
        self.hidden, self.head = nn.Linear(64, 32), nn.Linear(32, 4)

    def forward(self, image: Tensor, vector: Tensor) -> Tensor:
        joined = torch.cat([self.trunk(image), self.side(vector)], dim=1).relu()
        return self.head(self.hidden(joined).relu())


def some(value: Any, index: Tensor) -> Any:
    """Some samples of a nest of tensors and lists, by their numbers."""
    if isinstance(value, Tensor):
        return value[index]
    if isinstance(value, list):
        return [value[i] for i in index.tolist()]
    return tuple(some(part, index) for part in value)


class Made(rlprune.Workload):
    """A model on made data: training samples, and `EVALUATED` of each other split."""

    def __init__(
        self, name: str, model: nn.Module, example: Any, make: Make, train: int, task: str | None
    ) -> None:
        self.name, self.model, self.example_inputs, self.task = name, model.eval(), example, task
        self.sizes = {s: train if s == "train" else EVALUATED for s in SPLITS}
        self.parts = {s: make(torch.Generator().manual_seed(i), self.sizes[s]) for i, s in enumerate(SPLITS)}

    def batches(self, split: str, limit: int | None = None) -> Iterator[Data]:
        inputs, targets = self.parts[split]
        for index in torch.arange(self.sizes[split]).split(32):
            yield some(inputs, index), some(targets, index)

    def train_batches(self, generator: torch.Generator, batch_size: int | None = None) -> Iterator[Data]:
        inputs, targets = self.parts["train"]
        for index in torch.randperm(self.sizes["train"], generator=generator).split(32):
            yield some(inputs, index), some(targets, index)

    def train_steps(self, batch_size: int | None = None) -> int:
        return -(-self.sizes["train"] // 32)

    def learn(self, epochs: int, lr: float) -> None:
        """Train the model, before it is pruned."""
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=lr)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, epochs * self.train_steps())
        generator = torch.Generator().manual_seed(0)
        for module in self.model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.1  # that of MobileNet is for trainings of many more steps
        self.model.train()
        for _ in range(epochs):
            for inputs, targets in self.train_batches(generator):
                optimizer.zero_grad()
                self.batch_loss(self.model, inputs, targets).backward()
                optimizer.step()
                schedule.step()
        self.model.eval()


@dataclass(frozen=True)
class Kind:
    """A model, its data and task, and how it is trained, pruned and fine-tuned."""

    about: str
    model: Callable[[], nn.Module]
    example: Any
    make: Make
    task: str | None = None
    train: int = 512
    epochs: int = 20
    lr: float = 2e-3
    budget: str = "50%"
    finish_lr: float = 0.005


def detector() -> nn.Module:
    model = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=3)
    model.transform.min_size, model.transform.max_size = (128,), 128
    model.transform.fixed_size = (128, 128)
    return model


def transformer() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128}
    return ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=4, num_labels=4))


IMAGE = torch.zeros(1, 3, 16, 16)
KINDS = {
    "multilabel": Kind("three convolutions", partial(Head, 4), IMAGE, several_labels, "multilabel"),
    "regression": Kind("three convolutions", partial(Head, 1), IMAGE, numbers, "regression", lr=1e-2, finish_lr=1e-5),
    "segmentation": Kind(
        "torchvision's lraspp_mobilenet_v3_large", partial(lraspp_mobilenet_v3_large, weights=None,
        weights_backbone=None, num_classes=3), torch.zeros(1, 3, 64, 64), pixel_classes, "segmentation", train=256,
        epochs=15, budget="70%",
    ),
    "detection": Kind(
        "torchvision's ssdlite320_mobilenet_v3_large", detector, ([torch.zeros(3, 128, 128)],), boxed, "detection",
        train=256, epochs=20, budget="80%", finish_lr=0.002,
    ),
    "crnn": Kind("convolutions and an LSTM", CRNN, torch.zeros(1, 3, 8, 16), columns, "sequence", budget="60%"),
    "group_norm": Kind(
        "a ResNet with GroupNorm", partial(ResNet, BasicBlock, [1, 1, 1, 1], num_classes=4,
        norm_layer=partial(nn.GroupNorm, 8)), torch.zeros(1, 3, 32, 32), partial(four_classes, 32), epochs=6,
    ),
    "vit": Kind("transformers' ViT", transformer, IMAGE, partial(four_classes, 16), epochs=30, budget="60%"),
    "two_inputs": Kind("an image and a vector", TwoInputs, (IMAGE, torch.zeros(1, 5)), image_and_vector),
}  # fmt: skip


def built(name: str) -> Made:
    """The workload of a kind, its model trained."""
    kind = KINDS[name]
    torch.manual_seed(0)
    workload = Made(name, kind.model(), kind.example, kind.make, kind.train, kind.task)
    workload.learn(kind.epochs, kind.lr)
    return workload


def ran(name: str, seed: int, evaluations: int, out: Path) -> dict[str, Any]:
    """The results of a kind's run, from its folder where it is finished."""
    folder, kind = out / f"{name}-{seed}", KINDS[name]
    if not (folder / "results.json").is_file():
        settings = {
            "search": {"baselines": [], "ppo": {"surrogate_steps": 512}},
            "finish": {"epochs": 5, "lr": kind.finish_lr, "rules": False, "candidates": 2},
            "recovery": {"samples": 32},
            "device": "cpu",
        }
        rlprune.search(
            built(name), budget=kind.budget, evaluations=evaluations, seed=seed, settings=settings, out=folder,
            resume=(folder / "config.yaml").is_file(), callback=Console(True),
        )  # fmt: skip
    found: dict[str, Any] = read_json(folder / "results.json")
    return found


def agreement(ledger: Path) -> tuple[float, int]:
    """Spearman's rank correlation of score and minus the loss over the plans that were scored, and their number."""
    plans = {str(row["widths"]): row for row in EvaluationLog(ledger).rows}.values()
    found = spearmanr([row["score"] for row in plans], [-row["loss"] for row in plans])
    return float(found.statistic), len(plans)


def line(name: str, runs: list[dict[str, Any]], out: Path) -> list[str]:
    """A row of the table: means over the seeds."""
    dense = next(row for row in runs[0]["rows"] if row["kind"] == "dense")
    ours = [next(row for row in run["rows"] if row["kind"] == "agent") for run in runs]

    def average(field: str) -> float:
        return mean(float(row[field]) for row in ours)

    workload = runs[0]["workload"]
    left = average("macs") / dense["macs"]
    agrees, plans = agreement(out / f"{name}-0" / "ledger.jsonl")
    return [
        KINDS[name].about, workload["task"], f"{left:.1%}", f"{average('score'):.2g}", workload["metric"],
        f"{dense['test']:.3f}", f"{average('test'):.3f}", f"{average('test_finetuned'):.3f}",
        f"{dense['test_finetuned']:.3f}", f"{agrees:.2f} ({plans})",
    ]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(KINDS), default=list(KINDS), metavar="KIND")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--evaluations", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/tasks"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = {
        name: [ran(name, seed, options.evaluations, options.out) for seed in range(options.seeds)]
        for name in options.only
    }
    head = [
        "model", "task", "MACs left", "score", "metric", "dense", "after the cut", "fine-tuned", "dense, fine-tuned",
        "score against loss",
    ]  # fmt: skip
    text = PAGE.format(
        command=f"--seeds {options.seeds} --evaluations {options.evaluations} --threads {options.threads}",
        seeds=options.seeds,
        evaluations=options.evaluations,
        samples=EVALUATED,
        machine=machine(),
        table=markdown_table(head, [line(name, runs, options.out) for name, runs in found.items()]),
    )
    print(text)
    if set(options.only) == set(KINDS):
        (DOCS / "tasks.md").write_text(text, encoding="utf-8")
    return 0


def machine() -> str:
    facts = hardware()
    return f"{facts['processor']}, {facts['threads']} thread(s), torch {facts['libraries']['torch']}"


PAGE = """# Tasks

Written by `python docs/scripts/tasks.py {command}` on {machine}.

Small models on made data, one for each kind of output that a [workload](workloads.md) can have, through the same
search: {evaluations} evaluations of `ppo`, then a fine-tune of 5 epochs; {seeds} seed(s). Scores are minus the
divergence from the dense model on the validation split, 0 for the dense model itself; metrics are on the test split
({samples} samples each), higher is better. The fine-tune of the dense model is shown next to that of the pruned one:
what it gains, training longer gains. The last column is Spearman's rank correlation of the score with minus the
validation loss, over all plans that the rules and the search had scored (their number in brackets).

{table}

What each divergence and each metric is stands in [workloads.md](workloads.md).
"""

if __name__ == "__main__":
    sys.exit(main())
