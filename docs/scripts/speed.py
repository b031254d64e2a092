"""Speed of building, projecting and scoring candidates -> docs/speed.md.

    python docs/scripts/speed.py [--threads 1]

All times are medians of interleaved rounds: the things compared take turns, so that a change of the machine's
load hits them alike; the ratios are medians of the rounds' own ratios.
"""

from __future__ import annotations

import argparse
import copy
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torch_pruning
from torch import nn

import rlprune
from rlprune import Evaluator
from rlprune.config import RecoveryConfig
from rlprune.report import markdown_table
from rlprune.utils import in_turns
from rlprune.vision import build_model

DOCS = Path(__file__).resolve().parents[1]
Line = tuple[str, str, str]


def ratio(seconds: dict[str, list[float]], slow: str, fast: str) -> float:
    """Median over the rounds of one time divided by the other."""
    return statistics.median(a / b for a, b in zip(seconds[slow], seconds[fast], strict=True))


def milliseconds(values: list[float]) -> str:
    return f"{1e3 * statistics.median(values):.1f} ms"


def building(rounds: int) -> list[Line]:
    """ResNet-50 at 224 x 224, half of the MACs, uniform: ours against a copy and Torch-Pruning's pruner."""
    model = build_model("resnet50", classes=1000)
    inputs = torch.randn(1, 3, 224, 224)
    start = time.perf_counter()
    space = rlprune.trace(model, inputs)
    traced = time.perf_counter() - start
    importance = rlprune.importance.magnitude(model, space)
    uniform = np.ones(len(space.groups))
    plan = rlprune.make_plan(space, importance=importance, distribution=uniform, budget=0.5)
    kept = [tensor.detach() for tensor in rlprune.prune(model, plan).state_dict().values()]

    def torch_pruning_pruner() -> nn.Module:
        twin = copy.deepcopy(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pruner = torch_pruning.pruner.MagnitudePruner(
                twin, inputs, torch_pruning.importance.MagnitudeImportance(p=1),
                pruning_ratio=0.3, ignored_layers=[twin.fc],
            )  # fmt: skip
            pruner.step()
        return twin

    calls = {
        "plan": lambda: rlprune.make_plan(space, importance=importance, distribution=uniform, budget=0.5),
        "build": lambda: rlprune.prune(model, plan),
        "copy": lambda: [tensor.clone() for tensor in kept],
        "pruner": torch_pruning_pruner,
    }
    seconds = in_turns(calls, rounds, warmup=1)
    megabytes = sum(tensor.numel() * tensor.element_size() for tensor in kept) / 1e6
    faster, copies = ratio(seconds, "pruner", "build"), ratio(seconds, "build", "copy")
    return [
        ("trace ResNet-50 with its proof in float64, once per checkpoint", f"{traced:.1f} s", ""),
        ("ResNet-50: distribution -> plan (projection and ranking)", milliseconds(seconds["plan"]), ""),
        ("ResNet-50: plan -> model (`prune`)", milliseconds(seconds["build"]), ""),
        ("deepcopy and Torch-Pruning's pruner", milliseconds(seconds["pruner"]),
         f"{faster:.1f} times slower than `prune` (required: at least 8)"),
        (f"copying the kept {megabytes:.0f} MB", milliseconds(seconds["copy"]),
         f"`prune` takes {copies:.1f} times as long (required: at most 6)"),
    ]  # fmt: skip


def projecting(rounds: int, count: int = 10_000) -> list[Line]:
    """10,000 random distributions on MobileNetV2, half of the MACs, one call."""
    space = rlprune.trace(build_model("mobilenet_v2", classes=1000), torch.randn(1, 3, 224, 224))
    distributions = np.random.default_rng(0).random((count, len(space.groups)))
    call = {"project": lambda: space.project(distributions, 0.5, metric="macs")}
    seconds = in_turns(call, rounds, warmup=1)["project"]
    worst = max(seconds)
    name = f"projecting {count:,} distributions on MobileNetV2 ({len(space.groups)} groups)"
    note = f"slowest round {worst:.2f} s (required: under 2 s)"
    return [(name, f"{statistics.median(seconds):.2f} s", note)]


class RandomImages(rlprune.Workload):
    """CIFAR-sized noise: the clock does not care what is on the images."""

    def __init__(self, model: nn.Module, calibration: int = 512, validation: int = 1024) -> None:
        generator = torch.Generator().manual_seed(0)
        self.model = model
        self.example_inputs = torch.randn(1, 3, 32, 32, generator=generator)
        self.counts = {"calibration": calibration, "validation": validation, "train": 256, "test": 256}
        self.images = torch.randn(max(self.counts.values()), 3, 32, 32, generator=generator)
        self.labels = torch.randint(10, (len(self.images),), generator=generator)

    def batches(self, split: str, limit: int | None = None) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        count = min(self.counts[split], limit or self.counts[split])
        for first in range(0, count, 256):
            last = min(first + 256, count)
            yield self.images[first:last], self.labels[first:last]


def scoring(rounds: int) -> list[Line]:
    """A candidate's build, recovery and score against plain forward passes of it over the same images."""
    workload = RandomImages(build_model("cifar_resnet20"))
    space = rlprune.trace(workload.model, workload.example_inputs)
    rng = np.random.default_rng(0)
    evaluators = {
        "bn": Evaluator(workload, space, importance="l1", recovery=RecoveryConfig(steps=("bn",))),
        "reconstruct + bn": Evaluator(workload, space, importance="l1", recovery=RecoveryConfig()),
    }
    for evaluator in evaluators.values():
        evaluator.evaluate(space.widths)  # the dense model's outputs and the Gram matrices are cached now

    seconds: dict[str, list[float]] = {name: [] for name in ["forward", *evaluators]}
    for done in range(rounds + 1):
        widths = space.project(rng.random(len(space.groups)), 0.5, metric="macs")
        slim = evaluators["bn"].build(widths)
        calls = {"forward": lambda slim=slim: forward(workload, slim)}
        for name, evaluator in evaluators.items():
            calls[name] = lambda evaluator=evaluator, widths=widths: evaluator.evaluate(widths)
        turn = in_turns(dict(list(calls.items())[:: 1 if done % 2 else -1]), 1, warmup=0)
        if done:  # the first round warms up
            for name, values in turn.items():
                seconds[name] += values
    images = workload.counts["calibration"] + workload.counts["validation"]
    bn, both = (ratio(seconds, name, "forward") for name in evaluators)
    return [
        (f"ResNet-20 (CIFAR), plain forward passes of a cut model over {images} images",
         milliseconds(seconds["forward"]), ""),
        ("building, recovering (`bn`) and scoring a candidate, same images", milliseconds(seconds["bn"]),
         f"{bn:.2f} times the forward passes (required: at most 1.5)"),
        ("the same with `reconstruct` and `bn`", milliseconds(seconds["reconstruct + bn"]),
         f"{both:.2f} times; the closed form adds {both - bn:.2f}"),
    ]  # fmt: skip


def forward(workload: RandomImages, model: nn.Module) -> None:
    """Inference over the calibration and the validation images."""
    model.eval()
    with torch.no_grad():
        for split in ("calibration", "validation"):
            for inputs, _ in workload.batches(split):
                model(inputs)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    lines = [line for part in (building, projecting, scoring) for line in part(arguments.rounds)]
    for line in lines:
        print("  ".join(line))
    text = PAGE.format(
        table=markdown_table(["what", "median", "ratio"], lines), threads=arguments.threads,
        rounds=arguments.rounds, torch=torch.__version__, python=platform.python_version(),
        machine=f"{platform.machine()}, {processor()}", tp=version("torch-pruning"),
    )  # fmt: skip
    (DOCS / "speed.md").write_text(text, encoding="utf-8")
    return 0


def processor() -> str:
    """The CPU's name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown CPU"
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "unknown CPU"


PAGE = """# Speed

Written by `python docs/scripts/speed.py --threads {threads} --rounds {rounds}`: one run, {threads} thread(s),
on {machine}; torch {torch}, Torch-Pruning {tp}, Python {python}, float32.
Medians of {rounds} interleaved rounds (the things compared take turns); a ratio is the median of the rounds'
ratios.

{table}

Tracing, importances, Gram matrices and the dense model's outputs are computed once per checkpoint and are in
none of the per-candidate figures.
"""

if __name__ == "__main__":
    sys.exit(main())
