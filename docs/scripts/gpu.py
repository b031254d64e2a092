"""What a GPU does with rlprune, in under ten minutes -> docs/gpu.md.

    python docs/scripts/gpu.py --minutes 9                  # on a machine with a GPU, in a checkout of the source
    python docs/scripts/gpu.py --device cpu --rehearse      # the same steps, smaller, where there is none

First the contract tests run on the device (`tests/device`, against the CPU's numbers), then candidates of ResNet-56 and
of SmolLM2-135M at full size are scored: seconds of a candidate and of plain forward passes of the same cut models, in
turns, candidates a second, peak memory. Weights are drawn at random and data are made up where no --smollm is given:
the clock does not care what is on the images. Every step is kept (--record); the same command goes on where it was
stopped, and no step is begun that the last one's time says will not fit in --minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import rlprune
from rlprune.config import RecoveryConfig, ScoreConfig
from rlprune.report import markdown_table
from rlprune.utils import call, processor
from rlprune.vision import build_model

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "gpu.md"
BEGIN, END = "<!-- begin: docs/scripts/gpu.py -->", "<!-- end -->"
# The configuration of HuggingFaceTB/SmolLM2-135M.
SMOLLM = {
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True, "max_position_embeddings": 8192,
}  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """How much of everything."""

    candidates: int
    calibration: int
    validation: int
    sequences: int
    length: int
    evaluations: int
    blocks: int


FULL = Sizes(
    candidates=30, calibration=1024, validation=2000, sequences=16, length=128, evaluations=64, blocks=30
)
SMALL = Sizes(candidates=2, calibration=64, validation=64, sequences=2, length=32, evaluations=6, blocks=2)


class MadeImages(rlprune.Workload):
    """CIFAR-10's shapes, at random."""

    def __init__(self, model: nn.Module, sizes: Sizes, device: torch.device) -> None:
        draw = torch.Generator().manual_seed(0)
        self.model = model.to(device).eval()
        self.counts = {
            "train": 256,
            "calibration": sizes.calibration,
            "validation": sizes.validation,
            "test": 64,
        }
        self.images = torch.randn(max(self.counts.values()), 3, 32, 32, generator=draw).to(device)
        self.labels = torch.randint(10, (len(self.images),), generator=draw).to(device)
        self.example_inputs = self.images[:1]

    def batches(self, split: str, limit: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        count = min(self.counts[split], limit or self.counts[split])
        for first in range(0, count, 1000):
            yield self.images[first : min(first + 1000, count)], self.labels[first : min(first + 1000, count)]


class MadeTexts(rlprune.Workload):
    """Tokens, at random."""

    def __init__(self, model: nn.Module, sizes: Sizes, device: torch.device) -> None:
        draw = torch.Generator().manual_seed(0)
        self.model = model.to(device).eval()
        most: int = model.config.vocab_size  # type: ignore[union-attr, assignment]
        self.ids = torch.randint(2, most, (sizes.sequences, sizes.length), generator=draw).to(device)
        self.example_inputs = self.ids[:1]

    def batches(self, split: str, limit: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        yield self.ids[:limit], self.ids[:limit]


def smollm(source: str | None, sizes: Sizes, device: torch.device) -> nn.Module:
    """SmolLM2-135M of a folder or hub id, or the same shapes at random."""
    from transformers import AutoConfig, AutoModelForCausalLM

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if source is not None:
        return AutoModelForCausalLM.from_pretrained(source, dtype=dtype)  # type: ignore[no-any-return]
    config = AutoConfig.for_model("llama", **(SMOLLM | {"num_hidden_layers": sizes.blocks}))
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-any-return]


# Steps


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def candidates(
    workload: rlprune.Workload,
    recovery: RecoveryConfig,
    score: ScoreConfig,
    metric: str,
    count: int,
    importance: str,
) -> dict[str, Any]:
    """Candidates and plain forward passes of the same cut models in turns: seconds of each, and memory."""
    device = workload.device
    started = time.perf_counter()
    space = rlprune.trace(workload.model, workload.example_inputs)
    evaluator = rlprune.Evaluator(
        workload, space, importance=importance, recovery=recovery, score=score, metric=metric
    )
    evaluator.evaluate(space.widths)  # what is computed once is computed now
    wait(device)
    prepared = time.perf_counter() - started
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    draw, seconds, plain = np.random.default_rng(0), [], []
    for number in range(count + 1):
        widths = space.project(draw.random(len(space.groups)), 0.6, metric)
        slim = evaluator.build(widths, scoring=True)
        turns: list[tuple[list[float], Callable[[], object]]] = [
            (seconds, lambda widths=widths: evaluator.evaluate(widths)),
            (plain, lambda slim=slim: forward(workload, slim)),
        ]
        for kept, work in turns if number % 2 else turns[::-1]:
            wait(device)
            begun = time.perf_counter()
            work()
            wait(device)
            if number:  # the first one warms up
                kept.append(time.perf_counter() - begun)
    facts = {
        "prepare": prepared,
        "candidate": statistics.median(seconds),
        "forward": statistics.median(plain),
    }
    facts["ratio"] = statistics.median(a / b for a, b in zip(seconds, plain, strict=True))
    weights = sum(p.numel() * p.element_size() for p in workload.model.parameters())
    facts |= {"a second": 1 / facts["candidate"], "weights": weights / 2**20}
    if device.type == "cuda":
        facts["peak"] = torch.cuda.max_memory_allocated(device) / 2**20
    return facts


def forward(workload: rlprune.Workload, model: nn.Module) -> None:
    with torch.inference_mode():
        for inputs, _ in workload.batches("validation"):
            call(model, inputs)


def resnet(args: argparse.Namespace, sizes: Sizes) -> dict[str, Any]:
    workload = MadeImages(build_model("cifar_resnet56"), sizes, args.device)
    recovery = RecoveryConfig(steps=("reconstruct", "bn"))
    return candidates(workload, recovery, ScoreConfig(), "macs", sizes.candidates, "l1")


def language(args: argparse.Namespace, sizes: Sizes) -> dict[str, Any]:
    workload = MadeTexts(smollm(args.smollm, sizes, args.device), sizes, args.device)
    recovery = RecoveryConfig(steps=("reconstruct",), shrink=0.2)
    score = ScoreConfig(top_k=256)
    return candidates(workload, recovery, score, "block_params", sizes.candidates, "wanda_sp")


def search(args: argparse.Namespace, sizes: Sizes) -> dict[str, Any]:
    """A whole search of PPO on ResNet-56, its rules included, without the final fine-tune."""
    workload = MadeImages(build_model("cifar_resnet56"), sizes, args.device)
    started = time.perf_counter()
    settings = {
        "finish": {"epochs": 0, "rules": False},
        "search": {"baselines": [], "ppo": {"surrogate_steps": 512}},
    }
    found = rlprune.search(workload, budget=0.5, evaluations=sizes.evaluations, settings=settings)
    seconds = time.perf_counter() - started
    return {"prepare": None, "candidate": None, "evaluations": sizes.evaluations, "seconds": seconds,
            "cost": float(found.plan.space.cost(found.plan.widths, "macs"))}  # fmt: skip


def tests(args: argparse.Namespace, sizes: Sizes) -> dict[str, Any]:
    """The contract tests on the device, in a rehearsal a part of them; nothing where they do not end in time."""
    chosen = ["-k", "l1 and not twice or saved"] if args.rehearse else []
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/device", *chosen]
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"RLPRUNE_TEST_DEVICE": str(args.device), "PYTHONPATH": paths}
    started = time.perf_counter()
    limit = max(30.0, args.until - time.monotonic())
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=limit
        )
    except subprocess.TimeoutExpired:
        return {}
    lines = done.stdout.strip().splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return {
        "seconds": time.perf_counter() - started,
        "summary": lines[-1] if lines else done.stderr,
        "failed": failed,
    }


STEPS: dict[str, Callable[[argparse.Namespace, Sizes], dict[str, Any]]] = {
    "contract tests": tests,
    "ResNet-56": resnet,
    "SmolLM2-135M": language,
    "search on ResNet-56": search,
}


# The page


def number(value: float | None, unit: str = "") -> str:
    return "" if value is None else f"{value:,.3g}{unit}" if value < 100 else f"{value:,.0f}{unit}"


def table(found: dict[str, dict[str, Any]]) -> str:
    """Markdown of all steps that are done."""
    rows = []
    for name in ("ResNet-56", "SmolLM2-135M"):
        if name in found:
            f = found[name]
            rows.append(
                [
                    name,
                    number(f["prepare"], " s"),
                    number(1e3 * f["forward"], " ms"),
                    number(1e3 * f["candidate"], " ms"),
                    f"{f['ratio']:.2f}",
                    number(f["a second"]),
                    number(f["weights"], " MiB"),
                    number(f.get("peak"), " MiB"),
                ]
            )
    head = [
        "model",
        "prepared in",
        "plain forwards",
        "candidate",
        "ratio",
        "candidates a second",
        "weights",
        "peak",
    ]
    parts = [markdown_table(head, rows)] if rows else []
    if "contract tests" in found:
        one = found["contract tests"]
        parts.append("\n".join([f"Contract tests: {one['summary'].strip('= ')}.", *one["failed"]]))
    if "search on ResNet-56" in found:
        one = found["search on ResNet-56"]
        parts.append(
            f"A search of PPO on ResNet-56: {one['evaluations']} evaluations in {one['seconds']:.1f} s."
        )
    return "\n\n".join(parts)


def machine(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{processor()}, no GPU"
    versions = ", ".join(f"{package} {version(package)}" for package in ("torch", "transformers"))
    return f"{name}; {versions}, Python {platform.python_version()}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1 or cpu")
    parser.add_argument(
        "--minutes", type=float, default=9.0, help="begin no step that will not end in so many minutes"
    )
    parser.add_argument(
        "--smollm", help="folder or hub id of SmolLM2-135M; random weights of its shapes without"
    )
    parser.add_argument("--rehearse", action="store_true", help="everything small, to see that all steps run")
    parser.add_argument("--record", type=Path, default=Path("runs/gpu.json"), help="what is done")
    parser.add_argument(
        "--out", type=Path, help="file for the table; standard output without, docs/gpu.md with --write"
    )
    parser.add_argument("--write", action="store_true", help="put the table into docs/gpu.md")
    args = parser.parse_args(argv)
    warnings.filterwarnings("ignore", "the lowest budget of")
    args.device = torch.device(args.device)
    args.until = time.monotonic() + 60 * args.minutes
    sizes = SMALL if args.rehearse else FULL
    done = json.loads(args.record.read_text()) if args.record.is_file() else {}
    key = f"{machine(args.device)}{', rehearsal' if args.rehearse else ''}"
    found = done.setdefault(key, {})
    expected = {
        "contract tests": 150.0,
        "ResNet-56": 60.0,
        "SmolLM2-135M": 120.0,
        "search on ResNet-56": 60.0,
    }
    for name, step in STEPS.items():
        if name in found:
            continue
        if time.monotonic() + (0 if args.rehearse else expected[name]) > args.until:
            print(f"{name}: left for the next call, {args.minutes:g} minutes are over", flush=True)
            continue
        started = time.perf_counter()
        facts = step(args, sizes)
        if not facts:
            print(f"{name}: did not end in time; left for the next call", flush=True)
            continue
        found[name] = facts
        print(f"{name}: {time.perf_counter() - started:.1f} s", flush=True)
        args.record.parent.mkdir(parents=True, exist_ok=True)
        fresh = args.record.with_suffix(".new")
        fresh.write_text(json.dumps(done, indent=1))
        fresh.replace(args.record)
    text = f"On {key}:\n\n{table(found)}\n"
    if args.out is not None:
        args.out.write_text(text, encoding="utf-8")
    elif args.write:
        page = PAGE.read_text(encoding="utf-8")
        fresh_page = re.sub(f"{BEGIN}.*?{END}", lambda _: f"{BEGIN}\n{text}\n{END}", page, flags=re.S)
        PAGE.write_text(fresh_page, encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()
