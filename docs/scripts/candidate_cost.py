"""What a candidate of a model of images costs compared with a plain forward pass, and which format ranks plans alike.

    git worktree add ../before f31af48
    python docs/scripts/candidate_cost.py --before ../before --cifar cifar10-jpeg --checkpoint FILE

Both sides run in one call, in turns, each in a process of its own; seconds are those of the processor, so that other
programs count for little. What has been measured is kept in --state, and the same command goes on from there.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from kept import Kept
from scipy.stats import spearmanr

import rlprune
from rlprune import Evaluator
from rlprune.config import ScoreConfig, load_config
from rlprune.experiments import prepare_experiment
from rlprune.report import markdown_table
from rlprune.utils import hardware
from rlprune.vision import build_model

DOCS = Path(__file__).resolve().parents[1]
MODELS = ("mobilenet_v2", "resnet50")
# In the proportion of the shipped config image_folder_mobilenet_v2 (512 to 2,000).
# A ResNet-50 takes its time: with half of the images, what a candidate costs apart from its passes counts twice.
IMAGES = {"calibration": 100, "validation": 400}
BATCH = 64
PLANS = 24


class Noise(rlprune.Workload):
    """Random images for a model with random weights: the clock does not care what is on them."""

    def __init__(self, name: str, pixels: int = 224, images: dict[str, int] | None = None) -> None:
        torch.manual_seed(0)
        self.known: rlprune.workloads.Judge | None = None
        self.counts = images or IMAGES
        self.model = build_model(name, classes=1000).eval()
        self.example_inputs = torch.randn(1, 3, pixels, pixels)
        self.images = torch.randn(max(self.counts.values()), 3, pixels, pixels)
        self.labels = torch.randint(1000, (len(self.images),))

    def judge(
        self, kind: str = "kl", limit: int | None = None, *, top_k: int = 256
    ) -> rlprune.workloads.Judge:
        """One judge for all evaluators, so that the dense model's outputs are computed once."""
        if self.known is None:
            self.known = super().judge(kind, limit, top_k=top_k)
        return self.known

    def batches(self, split: str, limit: int | None = None) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        count = min(self.counts.get(split, 1), limit or 10**9)
        for first in range(0, count, BATCH):
            last = min(first + BATCH, count)
            yield self.images[first:last], self.labels[first:last]


def seconds(call: Callable[[], object]) -> float:
    started = time.process_time()
    call()
    return time.process_time() - started


def forward(workload: Noise, model: torch.nn.Module) -> None:
    """Plain inference over the images that a candidate reads."""
    model.eval()
    with torch.no_grad():
        for split in workload.counts:
            for inputs, _ in workload.batches(split):
                model(inputs)


def widths_of(space: rlprune.PruningSpace, count: int) -> np.ndarray:
    return space.project(np.random.default_rng(0).random((count, len(space.groups))), 0.5, metric="macs")


def worker(name: str, side: str) -> None:
    """One side: reads the number of a plan from each line, answers with the seconds of all that is timed."""
    torch.set_num_threads(1)
    workload = Noise(name)
    space = rlprune.trace(workload.model, workload.example_inputs)
    formats = ("float32", "bfloat16") if side == "now" else ("auto",)
    evaluators = {
        dtype: Evaluator(workload, space, importance="l1", score=ScoreConfig(dtype=dtype))
        for dtype in formats
    }
    plans = widths_of(space, 8)
    for evaluator in evaluators.values():
        evaluator.build(plans[-1])  # the factors are there now
    workload.judge()(workload.model, 0, 1)  # and the dense model's outputs
    print("ready", flush=True)
    for line in sys.stdin:
        if line.strip() == "auto":
            print(json.dumps(str(Evaluator(workload, space, importance="l1").settle_format(0.5))), flush=True)
            continue
        widths = plans[int(line)]
        found: dict[str, float] = {}
        for dtype, evaluator in evaluators.items():
            found[f"candidate {dtype}"] = seconds(lambda e=evaluator, w=widths: e.evaluate(w))
        if side == "now":
            plain = evaluators["float32"].build(widths).to(memory_format=torch.channels_last)
            found["plain float32"] = seconds(lambda plain=plain: forward(workload, plain))
            with torch.autocast("cpu", torch.bfloat16):
                found["plain bfloat16"] = seconds(lambda plain=plain: forward(workload, plain))
        found["MiB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps(found), flush=True)


def started(name: str, side: str, code: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(code), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--worker", name, "--side", side]
    return subprocess.Popen(
        command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )


def told(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise SystemExit("a worker has ended")
    return line.strip()


def costs(state: Kept, name: str, before: Path, rounds: int) -> None:
    """Seconds of all that is timed of one model, plan by plan, both sides in turns."""
    wanted = [i for i in range(rounds) if f"cost {name} {i}" not in state.cells]
    if not wanted and f"auto {name}" in state.cells:
        return
    sides = {"now": DOCS.parent, "before": before}
    processes = {side: started(name, side, code) for side, code in sides.items()}
    try:
        for process in processes.values():
            while told(process) != "ready":
                pass
        for i in wanted:
            found = {}
            for side in list(processes)[:: 1 if i % 2 else -1]:
                stdin = processes[side].stdin
                assert stdin is not None
                print(i, file=stdin, flush=True)
                found[side] = json.loads(told(processes[side]))
            state.keep(f"cost {name} {i}", found)
        stdin = processes["now"].stdin
        assert stdin is not None
        print("auto", file=stdin, flush=True)
        state.keep(f"auto {name}", json.loads(told(processes["now"])))
    finally:
        for process in processes.values():
            process.kill()


def fidelity(
    state: Kept, label: str, prepared: Callable[[], tuple[rlprune.Workload, rlprune.PruningSpace]]
) -> None:
    """Scores of random plans in float32 and in bfloat16, and what a trial decides."""
    if f"ranks {label}" in state.cells:
        return
    workload, space = prepared()
    scores = {}
    for dtype in ("float32", "bfloat16"):
        evaluator = Evaluator(workload, space, importance="taylor", score=ScoreConfig(dtype=dtype))
        scores[dtype] = [evaluator.evaluate(widths).score for widths in widths_of(space, PLANS)]
    evaluator = Evaluator(workload, space, importance="taylor")
    trial = evaluator.settle_format(0.5)
    decided = "float32: too small for a trial" if trial is None else str(trial)
    state.keep(f"ranks {label}", {"scores": scores, "decided": decided})


def configured(name: str, *overrides: str) -> tuple[rlprune.Workload, rlprune.PruningSpace]:
    config = load_config(name, [*overrides, "threads=1"])
    experiment = prepare_experiment(config)
    return experiment.workload, experiment.space


def noise(name: str) -> tuple[rlprune.Workload, rlprune.PruningSpace]:
    workload = Noise(name, 64, {"calibration": 32, "validation": 96, "train": 1})
    return workload, rlprune.trace(workload.model, workload.example_inputs)


def cost_rows(cells: dict[str, Any], name: str) -> list[list[str]]:
    rounds = [value for key, value in cells.items() if key.startswith(f"cost {name} ")]

    def ratio(over: tuple[str, str], under: tuple[str, str]) -> float:
        return statistics.median(r[over[0]][over[1]] / r[under[0]][under[1]] for r in rounds)

    was = ("before", "candidate auto")
    seconds_before = f"{statistics.median(r[was[0]][was[1]] for r in rounds):.1f}"
    found = [[name, "f31af48, float32", seconds_before, "", "", "1.0"]]
    for dtype in ("float32", "bfloat16"):
        ours, plain = ("now", f"candidate {dtype}"), ("now", f"plain {dtype}")
        took = [f"{statistics.median(r['now'][which[1]] for r in rounds):.1f}" for which in (ours, plain)]
        found.append([name, f"now, {dtype}", *took, f"{ratio(ours, plain):.2f}", f"{ratio(was, ours):.1f}"])
    for side, row in (("before", 0), ("now", 1)):
        found[row].append(f"{statistics.median(r[side]['MiB'] for r in rounds):,.0f}")
    found[2].append("the same process")
    return found


def decisions(cells: dict[str, Any]) -> str:
    """What a user gets who leaves the format to the trial, a line for each model."""
    return "\n".join(f"- {name}: {cells[f'auto {name}']}" for name in MODELS if f"auto {name}" in cells)


def rank_rows(cells: dict[str, Any]) -> list[list[str]]:
    rows = []
    for key, value in cells.items():
        if key.startswith("ranks "):
            sure, rough = (np.array(value["scores"][d]) for d in ("float32", "bfloat16"))
            change = rough - sure
            gap = np.abs(change - change.mean()).max() / sure.std()
            rank = float(spearmanr(sure, rough).statistic)
            rows.append([key.removeprefix("ranks "), f"{rank:.4f}", f"{gap:.3f}", value["decided"]])
    return rows


def page(cells: dict[str, Any], rounds: int) -> str:
    machine = hardware()
    head = ["model", "code and format", "candidate, s", "plain forward, s", "candidate / plain forward",
            "f31af48 / this", "peak MiB of the process"]  # fmt: skip
    measured = [name for name in MODELS if any(key.startswith(f"cost {name} ") for key in cells)]
    costs = markdown_table(head, [row for name in measured for row in cost_rows(cells, name)])
    for name in MODELS:
        if name not in measured:
            costs += f"\n\nNot measured yet: {name}; the command at the top goes on there."
    ranks = markdown_table(["workload", "Spearman", "largest change", "what `auto` says"], rank_rows(cells))
    return PAGE.format(
        rounds=rounds, decisions=decisions(cells), plans=PLANS, costs=costs, ranks=ranks,
        processor=machine["processor"], torch=machine["libraries"]["torch"], python=machine["python"],
    )  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--before", type=Path, help="a checkout of f31af48")
    parser.add_argument("--cifar", type=Path, help="a folder with train/CLASS/*.jpg and test/CLASS/*.jpg")
    parser.add_argument("--checkpoint", type=Path, help="weights of a CIFAR ResNet-20")
    parser.add_argument("--models", nargs="*", default=MODELS, choices=MODELS)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--state", type=Path, default=Path("runs/candidate-cost.json"))
    parser.add_argument("--worker", choices=MODELS)
    parser.add_argument("--side", choices=("now", "before"))
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.worker, arguments.side)
        return 0
    torch.set_num_threads(1)
    state = Kept(arguments.state)
    if arguments.before is not None:
        for name in arguments.models:
            costs(state, name, arguments.before, arguments.rounds)
    fidelity(state, "digits, ResNet-20, trained", lambda: configured("digits"))
    if arguments.cifar is not None:
        few = ("model.train.epochs=0", "data.calibration=128", "data.validation=400", "data.test=100")
        given = (f"data.root={arguments.cifar}", f"model.checkpoint={arguments.checkpoint}")
        fidelity(
            state, "CIFAR-10 (JPEG), ResNet-20, trained", lambda: configured("cifar10_resnet20", *given, *few)
        )
    fidelity(state, "noise at 64 px, ResNet-50, random weights", lambda: noise("resnet50"))
    if any(key.startswith("cost") for key in state.cells):
        (DOCS / "candidate-cost.md").write_text(page(state.cells, arguments.rounds), encoding="utf-8")
    return 0


PAGE = """# What a candidate of a model of images costs

Written by `python docs/scripts/candidate_cost.py --before F31AF48 --cifar cifar10-jpeg --checkpoint FILE` (FILE is
a CIFAR ResNet-20): one thread of an {processor}, no GPU, torch {torch}, Python {python}, seeds 0, other programs
on the cores at times. Seconds are those of the processor; a ratio is the median of the ratios of {rounds} plans at half
of the MACs, both sides in one call, in turns, each in a process of its own.

A candidate is built, repaired (`reconstruct`, `bn`) and scored (`kl`) on 100 calibration and 400 validation images of
224 x 224 pixels in batches of 64. A
plain forward is inference of the same cut model over the same images, in the same format and layout, batch norms not
folded. What is made once for a checkpoint (trace, importances, Gram matrices, their factors, the dense model's
outputs) is in neither.

{costs}

What `score.dtype: auto`, the default, decides for them, and so what is used:

{decisions}

Where the time went:

- glibc maps every block above 32 MiB anew and the system clears its pages; now the process keeps them
  (`keep_large_blocks`), so that plain forwards are faster too. That takes memory: see the peaks (of today's process,
  which holds two evaluators). With any `MALLOC_` variable in the environment glibc's settings are left alone.
- Convolutions' weights lie channels last.
- Batch norms are folded into convolutions for the judge, in float32.
- All plans of a ranking share one factor of the closed form (`rlprune/recovery/prefixes.py`).
- bfloat16, by `score.dtype`, in convolutions and matrix products. There batch norms are not folded: their offsets
  would be rounded alike for every image, and ranks suffered (Spearman 0.986 instead of 0.993 over 12 plans of a
  MobileNetV2 with random weights).

Ranks of {plans} random plans at half of the MACs, scored in float32 and in bfloat16 on the same images. The largest
change is that of a score, the mean change apart, over the standard deviation of the scores. `score.dtype: auto` asks
for 1.3 times the speed and for Spearman 0.99 in a trial of 12 plans on 112 images or more.

{ranks}

Batch statistics and score are not one pass: they read different splits, so that no image is read twice and nothing
would be saved but calls; and statistics of several batches are averaged before the first image is scored.
"""

if __name__ == "__main__":
    sys.exit(main())
