"""What the model of the score costs a search, before and after -> docs/surrogate-cost.md.

    git worktree add ../before f31af48
    python docs/scripts/surrogate_cost.py --before ../before [--only costs whole searches] [--write]

Every measurement is a process of its own and is kept in --out, so that a stopped run goes on; the two versions take
turns. Seconds are the processor's, of one thread. Three things are measured:

- `costs`: the process of the logits alone, by groups G and plans N: a fit that adapts its hyperparameters (20 steps
  where there is a fixed number of them) and the predictions of one batch of six evaluations;
- `whole`: everything that a real search does between two candidates, PPO and projections included, in its first batch
  after N scored plans, on a chain of linear layers;
- `searches`: PPO on digits, 300 evaluations, five seeds of dense model and search, two budgets: best score, and the
  share of the time that candidates take.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import rlprune
from rlprune import Evaluator, load_config
from rlprune.agents import SearchRequest, make_agent
from rlprune.config import RecoveryConfig, SearchConfig
from rlprune.envs import Task
from rlprune.evaluation import EvaluationBudget, EvaluationLog
from rlprune.experiments import prepare_experiment, run_agent
from rlprune.report import markdown_table
from rlprune.surrogates import LogitGP
from rlprune.utils import hardware

DOCS = Path(__file__).resolve().parents[1]
COSTS = ((12, 300), (54, 300), (120, 300), (120, 1000), (300, 1000))
WANTED = {(120, 300): 0.5, (300, 1000): 2.0}
WHOLE = ((12, 300), (120, 300), (300, 1000))
BUDGETS, SEEDS, EVALUATIONS = ("0.5", "0.3"), 5, 300
# A batch: evaluations, climbs of so many rounds over about so many plans, steps of PPO with so many plans, a pool.
BATCH, ROUNDS, CLIMBED, STEPS, STEPPED, POOL = 6, 36, 56, 32, 17, 340
IMAGES, CLASSES = 400, 10
DENSE = (64, 128, 256, 512)


def cost(groups: int, known: int) -> dict[str, float]:
    """Seconds of a fit that adapts and of a batch's predictions; logits as many as digits has, and nearly additive."""
    random, noise = np.random.default_rng(0), torch.Generator().manual_seed(0)
    widths = np.array([DENSE[4 * g // groups] for g in range(groups)])
    dense = 4.0 * torch.randn(IMAGES, CLASSES, generator=noise)
    effects = torch.randn(groups, IMAGES * CLASSES, generator=noise) / groups**0.5
    best = widths * random.uniform(0.4, 0.9, size=groups)

    def around(count: int) -> np.ndarray:
        """Small changes of a good plan: a few groups, or all of them."""
        scale = widths * np.exp(random.uniform(np.log(0.01), np.log(0.2), size=(count, 1)))
        touched = random.random((count, groups)) < random.choice([1.5, 3.0, groups], size=(count, 1)) / groups
        moved = best + scale * touched * random.normal(size=(count, groups)) + random.normal(size=(count, 1))
        return np.clip(moved, 1, widths).astype(np.int64)

    model = LogitGP(widths, dense)
    for plan in around(known - 1):
        change = (torch.from_numpy(1.0 - plan / widths).float() @ effects).reshape(IMAGES, CLASSES)
        model.learn(plan, dense + change + 0.05 * torch.randn(IMAGES, CLASSES, generator=noise))
    model.state = [known / 1.2, *model.state[1:]]  # adapted before, not for so many plans
    start = time.process_time()
    model.fit()
    fitted = time.process_time() - start
    pools = (
        [around(CLIMBED) for _ in range(ROUNDS)] + [around(STEPPED) for _ in range(STEPS)] + [around(POOL)]
    )
    start = time.process_time()
    for pool in pools:
        model.expected(pool)
    model.correlation(pools[-1])
    return {"fit": fitted, "predict": time.process_time() - start}


class Chain(rlprune.Workload):
    """A chain of linear layers with G groups, and a few numbers to run through it."""

    def __init__(self, groups: int) -> None:
        torch.manual_seed(0)
        sizes = [16, *[32] * groups, CLASSES]
        layers: list[nn.Module] = []
        for wide, narrow in itertools.pairwise(sizes):
            layers += [nn.Linear(wide, narrow), nn.ReLU()]
        self.model = nn.Sequential(*layers[:-1]).eval()
        # Deep and not trained: without this nothing of the input would be left at its end.
        for layer in self.model:
            if isinstance(layer, nn.Linear):
                nn.init.orthogonal_(layer.weight, gain=2**0.5)
        self.example_inputs = torch.randn(1, 16)
        self.inputs = torch.randn(IMAGES, 16)

    def batches(self, split: str, limit: int | None = None) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        count = IMAGES if split == "validation" else 16
        yield self.inputs[:count], torch.zeros(count, dtype=torch.int64)


def whole(groups: int, known: int) -> dict[str, float]:
    """Seconds of everything but the candidates in the first batch of a search that N scored plans start."""
    recovery = RecoveryConfig(steps=("none",))
    evaluator = Evaluator(Chain(groups), importance="l1", recovery=recovery)
    task = Task(evaluator, 0.5)
    account = EvaluationBudget(evaluator, EvaluationLog(), method="ppo", seed=0, limit=known + BATCH)
    random = np.random.default_rng(0)
    shares = np.exp(random.normal(size=(known, groups)) * np.exp(random.uniform(-3.0, 0.0, size=(known, 1))))
    starts = [list(task.space.project(shares, 0.5, task.metric))]
    clock: list[float] = []
    request = SearchRequest(
        [task], [account], starts=starts, seed=0, progress=lambda told: clock.append(time.process_time())
    )
    make_agent("ppo", SearchConfig()).search(request)
    steps = np.diff(clock)
    # The batch's first candidate is told of after all that went before it.
    return {"batch": float(steps[known - 1] - np.median(steps)), "candidate": float(np.median(steps))}


def search(budget: str, seed: int) -> dict[str, float]:
    """PPO on digits with a dense model, a split and a seed of its own, as `rlprune benchmark --checkpoints`."""
    shipped = load_config("digits")
    seeds = [f"model.seed={shipped.model.seed + seed}", f"data.seed={shipped.data.seed + seed}"]
    settings = [f"budget.target={budget}", f"search.evaluations={EVALUATIONS}", "threads=1", *seeds]
    experiment = prepare_experiment(load_config("digits", settings))
    start = time.process_time()
    outcome = run_agent("ppo", [experiment], EvaluationLog(), seed=seed)
    return {
        "score": outcome.best.score,
        "processor": time.process_time() - start,
        "seconds": outcome.seconds,
        "candidates": sum(candidate.seconds for candidate in outcome.account.history),
    }


KINDS: Mapping[str, Callable[..., dict[str, float]]] = {"costs": cost, "whole": whole, "searches": search}
CELLS: Mapping[str, Sequence[tuple[Any, ...]]] = {
    "costs": COSTS,
    "whole": WHOLE,
    "searches": [(budget, seed) for seed in range(SEEDS) for budget in BUDGETS],
}


def record(out: Path, kind: str, cell: tuple[Any, ...], when: str) -> Path:
    return out / f"{kind}-{'-'.join(map(str, cell))}-{when}.json"


def measure(arguments: argparse.Namespace) -> None:
    """Run what is missing, each in a process of its own, the versions in turns."""
    trees = {"before": arguments.before, "after": DOCS.parent}
    arguments.out.mkdir(parents=True, exist_ok=True)
    for kind in arguments.only:
        for cell, when in itertools.product(CELLS[kind], trees):
            path, tree = record(arguments.out, kind, cell, when), trees[when]
            if path.exists() or tree is None or (kind in arguments.after_only and when == "before"):
                continue
            command = [sys.executable, __file__, "--child", kind, *map(str, cell)]
            environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
            path.write_text(done.stdout.splitlines()[-1], encoding="utf-8")
            print(path.stem, done.stdout.splitlines()[-1], flush=True)


def read(arguments: argparse.Namespace, kind: str, cell: tuple[Any, ...], when: str) -> dict[str, Any] | None:
    path = record(arguments.out, kind, cell, when)
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def per_evaluation(found: Mapping[str, float] | None, *parts: str) -> str:
    return "–" if found is None else f"{sum(found[part] for part in parts) / BATCH:.2f}"


def costs_table(arguments: argparse.Namespace) -> str:
    lines = []
    for cell in COSTS:
        before, after = (read(arguments, "costs", cell, when) for when in ("before", "after"))
        factor = "–"
        if before is not None and after is not None:
            factor = f"{sum(before.values()) / sum(after.values()):.0f}"
        wanted = f"{WANTED[cell]:.1f}" if cell in WANTED else ""
        lines.append(
            [
                *map(str, cell),
                per_evaluation(before, "fit", "predict"),
                per_evaluation(after, "fit"),
                per_evaluation(after, "predict"),
                per_evaluation(after, "fit", "predict"),
                factor,
                wanted,
            ]
        )
    heads = ["G", "N", "before", "fit", "predictions", "after", "times faster", "at most"]
    return markdown_table(heads, lines)


def whole_table(arguments: argparse.Namespace) -> str:
    lines = []
    for cell in WHOLE:
        before, after = (read(arguments, "whole", cell, when) for when in ("before", "after"))
        lines.append([*map(str, cell), *(per_evaluation(found, "batch") for found in (before, after))])
    return markdown_table(["G", "N", "before", "after"], lines)


def searches_table(arguments: argparse.Namespace) -> str:
    """Scores before and after in pairs, and shares of the time."""
    lines = []
    committed = {}
    if arguments.before is not None:
        rows = json.loads((arguments.before / "docs/results/digits.json").read_text(encoding="utf-8"))["rows"]
        committed = {(r["budget"], r["seed"]): r["score"] for r in rows if r["method"] == "ppo"}
    for budget in BUDGETS:
        cells = [(budget, seed) for seed in range(SEEDS)]
        after = [read(arguments, "searches", cell, "after") for cell in cells]
        found = [(s, r) for s, r in enumerate(after) if r is not None]
        if not found:
            continue
        old = [committed.get((float(budget), s)) for s, _ in found]
        gaps = [r["score"] - o for (_, r), o in zip(found, old, strict=True) if o is not None]
        measured = [read(arguments, "searches", cell, "before") for cell in cells]
        lines.append(
            [
                f"{float(budget):.0%}",
                ", ".join("–" if o is None else f"{o:.4f}" for o in old),
                ", ".join(f"{r['score']:.4f}" for _, r in found),
                f"{statistics.mean(gaps):+.4f} ({sum(g > 0 for g in gaps)} of {len(gaps)})" if gaps else "–",
                share([r for r in measured if r is not None]),
                share([r for _, r in found]),
            ]
        )
    heads = ["budget", "scores before", "after", "gain (better)", "candidates' share before", "after"]
    return markdown_table(heads, lines)


def share(found: Sequence[Mapping[str, float]]) -> str:
    """Median share of a search's time that its candidates take, and of how many searches."""
    if not found:
        return "–"
    return f"{statistics.median(r['candidates'] / r['seconds'] for r in found):.0%} ({len(found)})"


def write(arguments: argparse.Namespace) -> None:
    """Fill the tables of the page in, between its marks."""
    page = DOCS / "surrogate-cost.md"
    text = page.read_text(encoding="utf-8")
    where = hardware()
    machine = f"{where['processor']}, one thread, torch {version('torch')}, Python {where['python']}; {arguments.note}"
    tables = {"machine": machine, "costs": costs_table(arguments), "whole": whole_table(arguments)}
    tables["searches"] = searches_table(arguments)
    for name, table in tables.items():
        start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        head, rest = text.split(start)
        text = f"{head}{start}{table.strip()}\n{end}{rest.split(end)[1]}"
    page.write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", type=Path, help="a checkout of the version before")
    parser.add_argument("--only", nargs="+", choices=tuple(KINDS), default=list(KINDS))
    parser.add_argument("--after-only", nargs="*", choices=tuple(KINDS), default=[])
    parser.add_argument("--out", type=Path, default=Path("runs/surrogate-cost"))
    parser.add_argument("--note", default="nothing else was running", help="what else the machine did")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        torch.set_num_threads(1)
        kind, first, second = arguments.child
        print(json.dumps(KINDS[kind](first if kind == "searches" else int(first), int(second))))
        return
    measure(arguments)
    if arguments.write:
        write(arguments)


if __name__ == "__main__":
    main()
