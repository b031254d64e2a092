"""The shipped PPO search with one change at a time, on three workloads -> docs/ablation.md.

    python docs/scripts/ablation.py [--evaluations 120] [--workloads digits tiny_llama] [--only NAME ...] [--write]

Each search of a workload has its own seed and, where WORKLOADS says so, its own dense model; every change meets the
same ones. What a search has found is scored with the shipped settings on the validation split, whatever it was
searched with; the test split is not read. Finished searches are kept in --out; --write writes the page from them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlprune import load_config
from rlprune.evaluation import EvaluationLog
from rlprune.experiments import Experiment, prepare_experiment, run_agent
from rlprune.report import markdown_table
from rlprune.utils import hardware

DOCS = Path(__file__).resolve().parents[1]
# Workload: budget, whether each seed has a dense model of its own.
WORKLOADS = {
    "digits": ("0.3", True),
    "tiny_llama": ("0.5", True),
    "fashion_mnist_resnet20": ("0.3", False),
}
SHIPPED = "as shipped"


@dataclass(frozen=True)
class Change:
    """What is set differently, and the agent that searches."""

    about: str
    settings: tuple[str, ...] = ()
    agent: str = "ppo"


CHANGES = {
    SHIPPED: Change("PPO's steps on the process of the logits"),
    "untrained policy": Change("no step of PPO between two batches", ("search.ppo.surrogate_steps=0",)),
    "four times the steps": Change("of PPO between two batches", ("search.ppo.surrogate_steps=4096",)),
    "scores modelled": Change("a process of the scores", ("search.ppo.surrogate=scores",)),
    "scores modelled, untrained": Change(
        "and no step of PPO", ("search.ppo.surrogate=scores", "search.ppo.surrogate_steps=0")
    ),
    "no surrogate": Change("every step of PPO is an evaluation", ("search.mode=direct",)),
    "no surrogate, one vector": Change(
        "a plain network for the whole distribution instead of one shared by the groups",
        ("search.sb3.algorithm=PPO",),
        "sb3",
    ),
    "uniform base": Change(
        "action 0 is the uniform plan, not the best rule's", ("search.base_rule=uniform",)
    ),
    "no exploration in the reward": Change("the surrogate's mean alone", ("search.ppo.kappa=0",)),
    "more exploration in the reward": Change("its mean and two standard deviations", ("search.ppo.kappa=2",)),
    "narrow first policy": Change("a deviation of exp(-2), not exp(-1)", ("search.ppo.log_std_init=-2",)),
    "smaller batches": Change("three evaluations between two fits, not six", ("search.batch=3",)),
    "shared weights alone": Change("no bias of a group's own", ("search.ppo.group_bias=false",)),
    "reward: loss": Change("labels instead of the dense model's outputs", ("score.kind=loss",)),
    "two stages": Change("prune, recover, prune again; each an evaluation", (), "ppo_stages"),
}


def found(shipped: Experiment, change: Change, settings: list[str], name: str, seed: int) -> dict[str, Any]:
    """One search and its best plan's score under the shipped settings."""
    config = load_config(name, [*settings, *change.settings])
    experiment = replace(shipped, config=config, evaluator=shipped.evaluator.fork())
    if any(setting.startswith("score.") for setting in change.settings):
        experiment = prepare_experiment(config, model_seed=shipped.config.model.seed)
    outcome = run_agent(change.agent, [experiment], EvaluationLog(), seed=seed)
    score = outcome.best.score
    if experiment.config.score != shipped.config.score:
        score = shipped.evaluator.evaluate(np.array(outcome.history[-1])).score
    return {"score": score, "spent": outcome.account.spent}


def measure(arguments: argparse.Namespace) -> None:
    """Run what is missing; one file a search."""
    for name in arguments.workloads:
        budget, own_models = WORKLOADS[name]
        settings = [f"budget.target={budget}", f"search.evaluations={arguments.evaluations}", "threads=1"]
        for seed in range(arguments.seeds):
            shipped: Experiment | None = None
            for label in arguments.only or CHANGES:
                record = path(arguments.out, name, arguments.evaluations, label, seed)
                if record.exists():
                    continue
                if shipped is None:
                    config = load_config(name, settings)
                    shipped = prepare_experiment(
                        config, model_seed=config.model.seed + (seed if own_models else 0)
                    )
                result = found(shipped, CHANGES[label], settings, name, seed)
                record.parent.mkdir(parents=True, exist_ok=True)
                record.write_text(json.dumps(result), encoding="utf-8")
                print(name, label, seed, {k: round(v, 4) for k, v in result.items()}, flush=True)


def path(out: Path, workload: str, evaluations: int, label: str, seed: int) -> Path:
    slug = label.replace(" ", "-").replace(":", "").replace(",", "")
    return out / f"{workload}-{evaluations}" / f"{slug}-{seed}.json"


def table(arguments: argparse.Namespace, name: str) -> str:
    """One line a change: mean score, paired difference to the shipped search."""
    records: dict[str, list[Mapping[str, float]]] = {}
    for label in CHANGES:
        files = [
            path(arguments.out, name, arguments.evaluations, label, seed) for seed in range(arguments.seeds)
        ]
        if all(file.exists() for file in files):
            records[label] = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    if SHIPPED not in records:
        return "Not measured."
    shipped = [r["score"] for r in records[SHIPPED]]
    lines = []
    for label, rows in sorted(records.items(), key=lambda item: -np.mean([r["score"] for r in item[1]])):
        scores = [r["score"] for r in rows]
        gap = float(np.mean(scores) - np.mean(shipped))
        better = sum(a > b for a, b in zip(scores, shipped, strict=True))
        lines.append(
            [
                label,
                CHANGES[label].about,
                f"{np.mean(scores):.4f}",
                "–" if label == SHIPPED else f"{gap:+.4f} ({better}/{len(scores)})",
                ", ".join(f"{s:.4f}" for s in scores),
            ]
        )
    header = ["change", "", "mean score", "− shipped (seeds ahead)", "of each seed"]
    lacking = ", ".join(f'"{label}"' for label in CHANGES if label not in records)
    return markdown_table(header, lines) + (f"\n\nNot run: {lacking}." if lacking else "")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workloads", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--only", nargs="+", choices=list(CHANGES), help="changes (default: all)")
    parser.add_argument("--evaluations", type=int, default=120, help="of each search")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--write", action="store_true", help="write the page from what is there")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if not arguments.write:
        measure(arguments)
        return 0
    parts = [
        f"## {name}, {100 * float(budget):.0f}% of the {load_config(name).budget.metric}\n\n"
        f"{'Each seed prunes a dense model of its own.' if own else 'All seeds prune one dense model.'}\n\n"
        f"{table(arguments, name)}\n"
        for name, (budget, own) in WORKLOADS.items()
    ]
    text = PAGE.format(
        evaluations=arguments.evaluations, seeds=arguments.seeds, torch=torch.__version__,
        processor=hardware()["processor"], parts="\n".join(parts),
    )  # fmt: skip
    (DOCS / "ablation.md").write_text(text, encoding="utf-8")
    return 0


PAGE = """# One change at a time

Measured by `python docs/scripts/ablation.py --evaluations {evaluations} --seeds {seeds}
--workloads WORKLOAD --only CHANGE ...` (torch {torch}, {processor}, 1 thread; seeds from 0), written by
`python docs/scripts/ablation.py --evaluations {evaluations} --seeds {seeds} --write`.

The shipped PPO search and the same with one setting changed; each search may have {evaluations} plans scored and starts
from the same rules. Scores are −KL to the dense model on the validation split (nats, higher is better), by the shipped
settings whatever a search was given. Differences are paired by seed; so few seeds tell large differences from none and
little more. The test split was not read.

{parts}"""

if __name__ == "__main__":
    sys.exit(main())
