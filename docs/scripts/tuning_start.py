"""Where the final fine-tune starts: the closed form, statistics alone, or what a few steps say -> docs/tuning-start.md.

    python docs/scripts/tuning_start.py [--cases digits-6 ...] [--cifar FOLDER --checkpoint FILE] [--seeds 3]

FOLDER of CIFAR-10 holds train/CLASS/*.jpg and test/CLASS/*.jpg, FILE the weights of a CIFAR ResNet-20. What has been
measured is kept in --state; the page is written from all of it.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlprune.config import load_config
from rlprune.experiments import prepare_experiment
from rlprune.experiments.tuning_start import trial_steps, tuning_start
from rlprune.report import markdown_table
from rlprune.utils import hardware
from rlprune.workloads.adapter import TuneJob

DOCS = Path(__file__).resolve().parents[1]
STARTS = ("recovered", "statistics", "auto")


@dataclass(frozen=True)
class Case:
    """A config with its settings, and the epochs of the fine-tune."""

    title: str
    config: str
    epochs: int
    settings: tuple[str, ...] = ()


_CIFAR = (
    *("model.train.epochs=3", "model.train.lr=0.01", "data.train=3000", "data.calibration=128"),
    *("data.validation=500", "data.test=2000"),
)
CASES = {
    "digits-6": Case("digits, ResNet-20 of width 16", "digits", 6),
    "digits-30": Case("digits, ResNet-20 of width 16", "digits", 30),
    "cifar-1": Case("CIFAR-10 (JPEG), ResNet-20", "cifar10_resnet20", 1, _CIFAR),
    "cifar-5": Case("CIFAR-10 (JPEG), ResNet-20", "cifar10_resnet20", 5, _CIFAR),
}


def measured(case: Case, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Test loss and accuracy of the plan of the rule `fisher` at 50% of the MACs, fine-tuned from each start."""
    settings = [*case.settings, "threads=1", f"finish.epochs={case.epochs}", f"model.seed={seed}"]
    settings += [f"data.seed={seed}", "prune.importance=obs_fisher"]
    if case.config.startswith("cifar10"):
        settings += [f"data.root={arguments.cifar}", f"model.checkpoint={arguments.checkpoint}"]
    experiment = prepare_experiment(load_config(case.config, settings))
    workload, plan = experiment.workload, experiment.evaluator.plan(experiment.rule_widths("fisher"))
    found: dict[str, Any] = {"trial": trial_steps(experiment)}

    def after(start: str) -> list[float]:
        finish = replace(experiment.config.finish, start=start)
        one = replace(experiment, config=replace(experiment.config, finish=finish))
        model, facts = tuning_start(one, experiment.evaluator.build(plan.widths), plan, seed)
        if start == "auto":
            found["chosen"], found["losses"] = facts["start"], facts["start_losses"]
            return list(found[facts["start"]])  # the same start, seed and batches: the same model
        model = workload.fine_tune(model, finish, TuneJob(seed)).model
        with workload.test_opened():
            quality = workload.evaluate(model, "test")
        return [quality.loss, quality.metric]

    for start in STARTS:
        found[start] = after(start)
    return found


def page(cells: dict[str, Any], seeds: int) -> str:
    rows = []
    for name, case in CASES.items():
        known = [cells[f"{name} {s}"] for s in range(seeds) if f"{name} {s}" in cells]
        if not known:
            continue
        row = [case.title, str(case.epochs), str(known[0]["trial"])]
        row += [
            f"{np.mean([k[s][0] for k in known]):.4f} / {np.mean([k[s][1] for k in known]):.4f}"
            for s in STARTS
        ]
        right = sum(k["chosen"] == min(STARTS[:2], key=lambda s: k[s][0]) for k in known)
        row += [", ".join(k["chosen"] for k in known), f"{right} of {len(known)}"]
        rows.append(row)
    head = [
        "workload",
        "epochs",
        "steps of a trial",
        *STARTS,
        "chosen (seed 0, 1, ...)",
        "the better one on test",
    ]
    machine = hardware()
    left = [n for n in CASES if not any(k.startswith(f"{n} ") for k in cells)]
    return PAGE.format(
        processor=machine["processor"], torch=machine["libraries"]["torch"], table=markdown_table(head, rows),
        left=f"\nNot measured: {', '.join(left)}.\n" if left else "",
    )  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", nargs="*", choices=CASES, default=[])
    parser.add_argument("--cifar", type=Path)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--state", type=Path, default=Path("runs/tuning-start.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cells = json.loads(arguments.state.read_text()) if arguments.state.exists() else {}
    for name in arguments.cases:
        for seed in range(arguments.seeds):
            if f"{name} {seed}" not in cells:
                cells[f"{name} {seed}"] = measured(CASES[name], seed, arguments)
                print(name, seed, cells[f"{name} {seed}"], flush=True)
                arguments.state.parent.mkdir(parents=True, exist_ok=True)
                arguments.state.write_text(json.dumps(cells, indent=1))
    (DOCS / "tuning-start.md").write_text(page(cells, arguments.seeds), encoding="utf-8")
    return 0


PAGE = """# Where the final fine-tune starts

Written by `python docs/scripts/tuning_start.py` (as its head says): one thread of an {processor}, torch {torch}. Each
seed has a dense model and splits of its own. The plan is that of the rule `fisher` with the ranking `obs_fisher` at
half of the MACs. Test loss / accuracy, means over the seeds, after the fine-tune of the config. `finish.start: auto`
trains both starts for a tenth of the steps (10 at least, 200 at most) with a rate that falls to zero, and takes the one
with the lower validation loss. The default is `recovered`.

{table}
{left}"""

if __name__ == "__main__":
    sys.exit(main())
