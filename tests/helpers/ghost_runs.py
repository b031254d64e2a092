"""What `tests/evaluation/test_other_device.py` looks at: the candidate path on a device that is not there.

    python -m helpers.ghost_runs

prints one JSON line a case: what it gave on the CPU and on the device, how often it waited for the device and where.
It is a process of its own, since the device pretends to be CUDA to everything that runs beside it.
"""

from __future__ import annotations

import json
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from helpers import ghost
from helpers.lm import tiny_lm
from helpers.nets import build
from rlprune.api import trace
from rlprune.config.config import ScoreConfig
from rlprune.config.training import FinishConfig, RecoveryConfig
from rlprune.evaluation.evaluator import Evaluator
from rlprune.language.text import TextData, TextSplit
from rlprune.language.workload import LanguageWorkload
from rlprune.vision.data import VisionData
from rlprune.vision.image_source import Augment, Split
from rlprune.vision.workload import VisionWorkload
from rlprune.workloads.adapter import TuneJob
from rlprune.workloads.base import Workload

LENGTH = 12
IMAGE_IMPORTANCES = ("l1", "l2", "bn_scale", "taylor", "taylor_vector", "saap", "auto", "random")
TEXT_IMPORTANCES = ("l1", "taylor", "saap", "wanda_sp", "flap", "obs", "obs_fisher")
IMAGE_RECOVERIES = {
    "none": RecoveryConfig(steps=("none",)),
    "bn": RecoveryConfig(steps=("bn",)),
    "reconstruct + bn": RecoveryConfig(steps=("reconstruct", "bn")),
    "all": RecoveryConfig(steps=("reconstruct", "bn", "finetune"), finetune_steps=2),
}
TEXT_RECOVERIES = {
    "none": RecoveryConfig(steps=("none",)),
    "bias": RecoveryConfig(steps=("bias",)),
    "reconstruct": RecoveryConfig(steps=("reconstruct",)),
    "all": RecoveryConfig(steps=("reconstruct", "finetune"), finetune_steps=2, distill=False),
}
Case = Callable[[Workload, ghost.Watch | None], tuple[list[float], Counter[str]]]


def images(device: torch.device | str) -> VisionWorkload:
    """A small ResNet, on 50 images in two batches."""
    draw = torch.Generator().manual_seed(0)

    def part(count: int) -> Split:
        shape = (count, 3, 16, 16)
        pixels = torch.randint(0, 256, shape, generator=draw).to(torch.uint8)
        return Split(pixels, torch.randint(0, 10, (count,), generator=draw))

    splits = {"train": part(64), "calibration": part(32), "validation": part(50), "test": part(32)}
    data = VisionData("noise", splits, tuple("0123456789"), (0.5,) * 3, (0.25,) * 3, Augment(2, True))
    return VisionWorkload(build("cifar_resnet20", torch.float32), data, device=device, batch_size=32)


def texts(device: torch.device | str) -> LanguageWorkload:
    """A tiny Llama and sequences in which every token comes twice."""
    drawn = torch.randint(2, 30, (44 * LENGTH,), generator=torch.Generator().manual_seed(0))
    stream = drawn.repeat_interleave(2)

    def part(start: int, count: int) -> TextSplit:
        first, last = start * LENGTH, (start + count) * LENGTH
        return TextSplit("echo", stream, tuple(range(first, last, LENGTH)), LENGTH, 0)

    counts = {"train": (0, 48), "calibration": (48, 8), "validation": (56, 8), "test": (64, 8)}
    splits = {name: part(*each) for name, each in counts.items()}
    model = tiny_lm("llama-mha-tied", seed=7)
    return LanguageWorkload(model, None, TextData("echo", splits), name="echo", device=device)


def score(recovery: RecoveryConfig, kind: str, metric: str) -> Case:
    """A candidate's score, loss and metric, after the dense model's were taken; waits are those of the candidate."""

    def case(workload: Workload, watch: ghost.Watch | None) -> tuple[list[float], Counter[str]]:
        space = trace(workload.model, workload.example_inputs)
        found = evaluator(workload, space, recovery, kind, metric)
        widths = space.project(np.ones(len(space.groups)), 0.6, metric)
        found.evaluate(space.widths)
        found.evaluate(space.project(np.ones(len(space.groups)), 0.8, metric))
        before = Counter() if watch is None else Counter(watch.waits)
        one = found.evaluate(widths)
        waits = Counter() if watch is None else watch.waits - before
        return [one.score, one.loss, one.metric, one.error], waits

    return case


def evaluator(workload: Workload, space: Any, recovery: RecoveryConfig, kind: str, metric: str) -> Evaluator:
    dtype = ScoreConfig(kind=kind, dtype="float32")
    return Evaluator(workload, space, importance="l1", recovery=recovery, score=dtype, metric=metric)


def importance(name: str) -> Case:
    def case(workload: Workload, watch: ghost.Watch | None) -> tuple[list[float], Counter[str]]:
        space = trace(workload.model, workload.example_inputs)
        plain = RecoveryConfig(steps=("none",))
        found = Evaluator(workload, space, importance=name, recovery=plain).importance
        return [float(v) for scores in found for v in scores], Counter()

    return case


def fine_tune(workload: Workload, watch: ghost.Watch | None) -> tuple[list[float], Counter[str]]:
    """Two epochs of the final fine-tune of a cut model, and the loss afterwards."""
    space = trace(workload.model, workload.example_inputs)
    found = evaluator(workload, space, RecoveryConfig(steps=("bn",)), "kl", "macs")
    slim = found.build(space.project(np.ones(len(space.groups)), 0.6))
    before = Counter() if watch is None else Counter(watch.waits)
    settings = FinishConfig(epochs=2, batch_size=16, mixed_precision=False)
    workload.fine_tune(slim, settings, TuneJob(0))
    waits = Counter() if watch is None else watch.waits - before
    quality = workload.evaluate(slim, "validation")
    return [quality.loss, quality.metric], waits


def cases() -> Iterator[tuple[str, Callable[..., Workload], Case]]:
    for name in IMAGE_IMPORTANCES:
        yield f"images, importance {name}", images, importance(name)
    for name in TEXT_IMPORTANCES:
        yield f"texts, importance {name}", texts, importance(name)
    for name, recovery in IMAGE_RECOVERIES.items():
        for kind in ("kl", "loss", "accuracy") if name == "bn" else ("kl",):
            yield f"images, {name}, {kind}", images, score(recovery, kind, "macs")
    for name, recovery in TEXT_RECOVERIES.items():
        for kind in ("kl", "loss") if name == "reconstruct" else ("kl",):
            yield f"texts, {name}, {kind}", texts, score(recovery, kind, "block_params")
    yield "images, fine-tune", images, fine_tune


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    wanted = {name: case(make("cpu"), None)[0] for name, make, case in cases()}
    for name, make, case in cases():
        facts: dict[str, Any] = {"case": name, "wanted": wanted[name]}
        with ghost.watched() as watch:
            try:
                facts["found"], waits = case(make(ghost.DEVICE), watch)
                facts["waits"] = dict(waits)
            except Exception as error:
                lines = [f for f in traceback.extract_tb(error.__traceback__) if ghost.OURS in f.filename]
                where = f"{lines[-1].filename.removeprefix(ghost.OURS)}:{lines[-1].lineno}" if lines else ""
                facts["error"] = f"{type(error).__name__}: {error} ({where})"
        print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    main()
