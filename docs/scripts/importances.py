"""Two ways of ranking the units of a group, under the same methods -> docs/importances.md.

    rlprune benchmark digits --methods ppo,random,fisher,lamp,uniform,sensitivity --budgets 0.5 0.3 \\
        --seeds 3 --checkpoints 3 --evaluations 100 --set score.unlabelled=0 prune.importance=taylor \\
        --out runs/digits-taylor
    rlprune benchmark digits ... --set prune.importance=obs_fisher --out runs/digits-obs_fisher
    rlprune benchmark cifar10_resnet20 --budgets 0.5 --seeds 3 --evaluations 80 \\
        --methods ppo,random,fastnas,evopress,depgraph,sensitivity,fisher,lamp,global_taylor,uniform --set \\
        data.root=FOLDER model.checkpoint=FILE model.train.epochs=6 model.train.lr=0.01 data.train=3000 \\
        data.calibration=128 data.validation=1000 data.test=2000 score.samples=400 finish.candidates=3 \\
        finish.epochs=1 prune.importance=taylor --out runs/cifar-taylor
    rlprune benchmark cifar10_resnet20 ... prune.importance=obs_fisher --out runs/cifar-obs_fisher
    python docs/scripts/importances.py runs/digits-taylor:runs/digits-obs_fisher ...

FOLDER holds train/CLASS/*.jpg and test/CLASS/*.jpg of CIFAR-10, FILE the weights of a CIFAR ResNet-20. Each argument
names two runs of one workload that differ in `prune.importance` alone. Only what preparing takes is measured here,
where --state does not know it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from kept import Kept
from pairs import read, section, summary
from torch import Tensor
from torchvision.models import mobilenet_v2

from rlprune import Evaluator, Workload, load_config, trace
from rlprune.experiments import prepare_experiment
from rlprune.report import markdown_table
from rlprune.utils import hardware

DOCS = Path(__file__).resolve().parents[1]
RANKINGS = ("taylor", "obs_fisher")
TURNS = 3
SETTING = "prune.importance"


class Noise(Workload):
    """MobileNetV2 with random weights on random images of 224 pixels: only the time counts."""

    def __init__(self, images: int = 64) -> None:
        torch.manual_seed(0)
        self.model = mobilenet_v2(num_classes=1000).eval()
        self.images, self.labels = torch.randn(images, 3, 224, 224), torch.randint(1000, (images,))
        self.example_inputs = self.images[:1]

    def batches(self, split: str, limit: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        yield from zip(self.images[:limit].split(32), self.labels[:limit].split(32), strict=True)


def measured(make: Callable[[], Workload]) -> dict[str, list[float]]:
    """Seconds of preparing a workload with each ranking in turns: unit scores and the recovery's statistics."""
    workload = make()
    found: dict[str, list[float]] = {name: [] for name in RANKINGS}
    space = trace(workload.model, workload.example_inputs)
    for _ in range(TURNS):
        for name, taken in found.items():
            started = time.perf_counter()
            Evaluator(workload, space, importance=name)
            taken.append(time.perf_counter() - started)
    return found


def preparing(kept: Kept) -> str:
    """A table of what preparing takes."""
    digits = load_config("digits", ["threads=1"])
    workloads: dict[str, Callable[[], Workload]] = {
        f"digits, ResNet-20 of width 16, {digits.data.calibration} images": lambda: (
            prepare_experiment(digits).workload
        ),
        "MobileNetV2, 64 images of 224 pixels": Noise,
    }
    torch.set_num_threads(1)
    table = []
    for name, make in workloads.items():
        taken = kept.ask(f"preparing {name}", partial(measured, make))
        middle = [statistics.median(taken[ranking]) for ranking in RANKINGS]
        ratio = statistics.median(b / a for a, b in zip(*(taken[r] for r in RANKINGS), strict=True))
        table.append([name, *(f"{value:.2f}" for value in middle), f"{ratio:.1f}"])
    return markdown_table(["model", *(f"{name}, s" for name in RANKINGS), "ratio"], table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN:RUN")
    parser.add_argument("--state", default="runs/importances.json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    machine = hardware()
    pairs = [*map(read, arguments.runs)]
    parts = [section(pair, SETTING) for pair in pairs]
    text = PAGE.format(
        processor=machine["processor"],
        torch=machine["libraries"]["torch"],
        parts="\n".join(parts),
        preparing=preparing(Kept(arguments.state)),
        turns=TURNS,
        summary="\n".join(summary(pair, SETTING) for pair in pairs),
    )
    (DOCS / "importances.md").write_text(text, encoding="utf-8")


PAGE = """# How units are ranked

Written by `python docs/scripts/importances.py` from runs of `rlprune benchmark` (the commands are at its head): one
thread of an {processor}, no GPU, torch {torch}, other programs on the cores.

`prune.importance` says which units of a group go first; every method of a run uses the same ranking. `taylor` sums
|w g| over all that is cut with a unit, and was the default of models of images; `obs_fisher` removes the unit whose
loss costs the fewest expected nats, one after another ([expected-curves.md](expected-curves.md)). `auto`, the default,
takes `obs_fisher` where that can be measured and `taylor` elsewhere: for detectors and other tasks that do not say what
small changes of their outputs cost, for models with a group whose readers are not called as layers (attention of
torchvision's transformers), and where the matrices of the gradients would take more than 2 GB.

Scores are minus the divergence from the dense model (higher is better), losses those of the test split before and after
the same fine-tune. Differences are paired by seed, the second ranking minus the first (lower is better), with a 95% BCa
interval and the seeds on which the second is lower. Rows of one seed share a dense model, so intervals over all rows
are narrower than they should be; with one dense model in all a rule's plan is the same on every seed, and its loss
before the fine-tune has no interval.

{summary}

So `obs_fisher` is the default: before the fine-tune every method is better with it on both workloads, after one epoch
on CIFAR-10 too; after six epochs on digits there is no difference. These losses of the test split have made that
choice: for it they are no held-out figures.

## What preparing takes

Seconds of making what all candidates share, unit scores and the statistics of the recovery (`reconstruct` and `bn`), in
turns, median of {turns}. `obs_fisher` uses the Gram matrices that `reconstruct` needs anyway; the elimination itself is
cubic in the width of a layer.

{preparing}

{parts}
Not measured here: other tasks than classification, networks of ImageNet after a fine-tune
([imagenet-sample.md](imagenet-sample.md) has one before it), longer fine-tunes on CIFAR-10, GPUs.
"""

if __name__ == "__main__":
    main()
