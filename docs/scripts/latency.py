"""Measured latency against MACs, and latency budgets against measured latency -> docs/latency.md, latency.json.

    python docs/scripts/latency.py [--threads 1] [--seconds 12] [--evaluations 60]

For each model and batch size all cut models and the dense one run in turns, at three moments in a process each; figures
are ratios to the dense model. With one thread the clock is the processor time of the thread, which other work on the
machine does not lengthen (`rlprune.utils.timing.quiet_clock`); the machine's load is written down. Weights do not
change a model's speed: only digits is trained, for its PPO plan.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import rlprune
from rlprune import BudgetError, Context, PruningSpace
from rlprune.evaluation import EvaluationLog
from rlprune.experiments import prepare_experiment, run_agent
from rlprune.latency import with_latency
from rlprune.report import markdown_table
from rlprune.rules import RULES
from rlprune.utils import measure, processor, quiet_clock
from rlprune.vision import build_model

DOCS = Path(__file__).resolve().parents[1]
BUDGETS = (0.8, 0.6, 0.5, 0.4)
ROUNDINGS = (1, 8)
REPEATS, MOMENTS = 60, 3


@dataclass(frozen=True)
class Subject:
    """A model, its example input, the batch sizes it is measured at, and further widths at half of the MACs."""

    name: str
    model: nn.Module
    example: Tensor
    batches: tuple[int, ...]
    plans: dict[tuple[str, int], Any]


def subjects(evaluations: int) -> list[Subject]:
    """Digits with a PPO plan of its own, then models with random weights."""
    found = []
    resnet20 = build_model("cifar_resnet20", 10, 1, arguments={"width": 16})
    mobilenet = build_model("mobilenet_v2", 10, arguments={"width_mult": 0.5})
    googlenet = build_model("cifar_googlenet", 10, 1, arguments={"width": 0.125})
    for name, model, shape, batches in (
        ("ResNet-20, width 16, 28 px", resnet20, (1, 1, 28, 28), (1, 64)),
        ("MobileNetV2, width 0.5, 96 px", mobilenet, (1, 3, 96, 96), (1,)),
        ("ResNet-18, 224 px", build_model("resnet18", 1000), (1, 3, 224, 224), (1,)),
        ("GoogLeNet, width 0.125, 28 px", googlenet, (1, 1, 28, 28), (1, 64)),
    ):
        found.append(Subject(name, model.eval(), torch.randn(shape), batches, {}))
    return [digits(evaluations), *found]


def digits(evaluations: int) -> Subject:
    """The digits ResNet, with what PPO finds at half of the MACs for each rounding."""
    plans = {}
    for rounding in ROUNDINGS:
        settings = [f"prune.round_to={rounding}", f"search.evaluations={evaluations}", "threads=1"]
        experiment = prepare_experiment(rlprune.load_config("digits", settings))
        plans["ppo", rounding] = run_agent("ppo", [experiment], EvaluationLog(), seed=0).history[-1]
    workload = experiment.workload
    return Subject(
        "digits, ResNet-20, width 16, 8 px", workload.model, workload.example_inputs, (1, 64), plans
    )


def halves(subject: Subject, spaces: dict[int, PruningSpace]) -> dict[str, np.ndarray]:
    """Plans at half of the MACs: {"rule / rounding": widths}."""
    found = {}
    for rounding, space in spaces.items():
        importance = rlprune.importance.magnitude(subject.model, space)
        for rule in ("uniform", "lamp", "erk"):
            context = Context(space, subject.model, importance, 0.5)
            with contextlib.suppress(BudgetError):  # a narrow model's multiples of 8 may not reach that low
                found[f"{rule} / {rounding}"] = space.project(RULES[rule].function(context), 0.5)
        if ("ppo", rounding) in subject.plans:
            found[f"ppo / {rounding}"] = np.array(subject.plans["ppo", rounding])
    return found


def budgeted(spaces: dict[int, PruningSpace]) -> tuple[dict[str, np.ndarray], list[str]]:
    """Plans at latency budgets, spread evenly and at random, and the budgets that cannot be met."""
    found, refused = {}, []
    for rounding, space in spaces.items():
        spreads = {"even": np.ones(len(space.groups))}
        if rounding == 1:
            spreads["random"] = np.random.default_rng(0).exponential(size=len(space.groups))
        for budget in BUDGETS:
            try:
                for spread, shares in spreads.items():
                    found[f"{budget} / {rounding} / {spread}"] = space.project(shares, budget, "latency")
            except BudgetError:
                refused.append(f"{budget} / {rounding}")
    return found, refused


def cut(subject: Subject, space: PruningSpace, widths: np.ndarray) -> nn.Module:
    importance = rlprune.importance.magnitude(subject.model, space)
    return rlprune.prune(subject.model, rlprune.make_plan(space, importance=importance, widths=widths)).eval()


class Measurement:
    """All plans of one model at one batch size; they are timed in turns, at several moments (`moment`)."""

    def __init__(self, subject: Subject, batch: int) -> None:
        started = time.perf_counter()
        self.subject, self.batch = subject, batch
        model, example = subject.model, subject.example
        self.spaces = {
            r: with_latency(rlprune.trace(model, example, round_to=r), model, example, batch)
            for r in ROUNDINGS
        }
        self.table_seconds = time.perf_counter() - started
        self.half = halves(subject, self.spaces)
        plans, self.refused = budgeted(self.spaces)
        self.plans = self.half | plans
        self._models = {"dense": model.eval()}
        self._models |= {n: cut(subject, self.spaces[_rounding(n)], w) for n, w in self.plans.items()}
        self.shortest = dict.fromkeys(["dense", *self.plans], float("inf"))
        self.load: list[float] = []

    def time(self, seconds: float) -> dict[str, float]:
        """{plan: milliseconds of its shortest pass}, now and in this process."""
        clock, example = quiet_clock(self.subject.example.device), self.subject.example
        times = measure(
            self._models, example, (self.batch,), REPEATS, seconds, clock=clock, settle=1, statistic=min
        )
        return {name: found[self.batch] for name, found in times.items()}

    def add(self, load: float, times: dict[str, float]) -> None:
        """What one moment found."""
        self.load.append(load)
        self.shortest = {name: min(ms, times[name]) for name, ms in self.shortest.items()}


def measurements(evaluations: int, threads: int) -> list[Measurement]:
    """The same in every process, once the tables are in the cache."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    return [Measurement(subject, b) for subject in subjects(evaluations) for b in subject.batches]


def moment(evaluations: int, threads: int, seconds: float) -> list[tuple[float, dict[str, float]]]:
    """Loads and times of every measurement."""
    return [(os.getloadavg()[0], m.time(seconds)) for m in measurements(evaluations, threads)]


def facts(m: Measurement) -> dict[str, Any]:
    dense = m.shortest["dense"]
    rows = [
        {
            "plan": name,
            "kind": "macs" if name in m.half else "latency",
            "macs": space.cost(w) / space.dense_cost(),
            "table": space.cost(w, "latency") / space.dense_cost("latency"),
            "measured": m.shortest[name] / dense,
        }
        for name, w in m.plans.items()
        for space in [m.spaces[_rounding(name)]]
    ]
    low, high = m.spaces[1].feasible("latency")
    found = {"model": m.subject.name, "batch": m.batch, "dense_ms": dense, "refused": m.refused, "rows": rows}
    return found | {"lowest": low / high, "table_seconds": m.table_seconds, "load": m.load}


def _rounding(name: str) -> int:
    return int(name.split(" / ")[1])


def first_table(cells: list[dict[str, Any]]) -> str:
    head = ["model", "batch", "dense, ms", "plan at 50% of the MACs", "MACs", "latency"]
    head += ["rounded to 8: MACs", "latency"]
    rows = []
    for cell in cells:
        found = {row["plan"]: row for row in cell["rows"] if row["kind"] == "macs"}
        for rule in dict.fromkeys(name.partition(" / ")[0] for name in found):
            shown = []
            for rounding in ROUNDINGS:
                row = found.get(f"{rule} / {rounding}")
                shown += ["–", "–"] if row is None else [f"{row['macs']:.1%}", f"{row['measured']:.1%}"]
            rows.append([cell["model"], cell["batch"], f"{cell['dense_ms']:.2f}", rule, *shown])
    return markdown_table(head, rows)


def second_table(cells: list[dict[str, Any]]) -> str:
    head = ["model", "batch", "rounding", "budget", "spread", "table", "measured", "off by", "MACs kept"]
    rows = []
    for cell in cells:
        for row in cell["rows"]:
            if row["kind"] == "latency":
                budget, rounding, spread = row["plan"].split(" / ")
                off = row["measured"] / float(budget) - 1
                shown = [f"{row['table']:.1%}", f"{row['measured']:.1%}", f"{off:+.1%}", f"{row['macs']:.1%}"]
                rows.append([cell["model"], cell["batch"], rounding, f"{float(budget):.0%}", spread, *shown])
        for name in cell["refused"]:
            budget, rounding = name.split(" / ")
            lowest = f"not feasible (lowest {cell['lowest']:.0%})" if rounding == "1" else "not feasible"
            rows.append([cell["model"], cell["batch"], rounding, f"{float(budget):.0%}", lowest, *["–"] * 4])
    return markdown_table(head, rows)


def summary(cells: list[dict[str, Any]]) -> str:
    """How many budgets hold within 10%, and the worst."""
    off = [
        (
            abs(row["measured"] / float(row["plan"].split(" / ")[0]) - 1),
            cell["model"],
            cell["batch"],
            row["plan"],
        )
        for cell in cells
        for row in cell["rows"]
        if row["kind"] == "latency"
    ]
    inside = sum(o <= 0.1 for o, *_ in off)
    worst = max(off)
    return (
        f"Of {len(off)} plans at latency budgets {inside} are within 10% of their target when measured; median"
        f"\ndistance {np.median([o for o, *_ in off]):.1%}, the largest {worst[0]:.1%} ({worst[1]}, batch {worst[2]}, "
        f"budget / rounding / spread: {worst[3]})."
    )


TEXT = """# Latency

Written by `{command}`: {threads} thread(s), {machine}; torch {torch}, Python {python}, float32.
Load of the machine (1 minute) during the run: {low:.1f} to {high:.1f} on {cores} cores, other work on the machine.
Every figure is the ratio to the dense model of the shortest of at most {repeats} passes at each of {moments} moments,
each in a process of its own, with all other lines measured in between; in every round all models of
one line's model and batch size take turns, each timed pass right after an untimed one; {clock}.
The process has freed a large block before (`rlprune.utils.memory.settle_heap`): a young one pays for its pages in every
pass. Absolute milliseconds are shown for scale only. Took {minutes:.1f} minutes, {tables:.0f} s of them
for the tables (none for what the cache had).

## Half of the MACs is not half of the time

{first}

PPO's plans: {evaluations} evaluations each (digits only). LAMP and ERK read the other models' random weights and
shapes: they stand for allocations that are not uniform, not for good ones.

## Budgets of latency

`budget.metric: latency`: the promise is about the table's value, which never exceeds the target. "Off by" is the
measured ratio against the target. How tables are measured and fitted was settled on the other models; GoogLeNet
has had no say in it.
{summary}

{second}

A budget is refused as not feasible where a model of minimal widths already takes longer: what a framework spends
on each call of a layer is the same for one channel as for hundreds.
"""


def write(cells: list[dict[str, Any]], args: argparse.Namespace, seconds: float) -> None:
    """The page and its figures, from what has been measured so far."""
    doc = args.doc
    loads = [load for cell in cells for load in cell["load"]]
    quiet = quiet_clock(torch.device("cpu")) is time.thread_time
    text = TEXT.format(
        command=f"python docs/scripts/latency.py --threads {args.threads} --seconds {args.seconds:g}"
        f" --evaluations {args.evaluations}",
        threads=args.threads,
        machine=f"{platform.machine()}, {processor()}",
        torch=version("torch"),
        python=platform.python_version(),
        low=min(loads),
        high=max(loads),
        cores=os.cpu_count(),
        repeats=REPEATS,
        moments=MOMENTS,
        clock="the clock is the thread's processor time" if quiet else "the clock is the one on the wall",
        minutes=seconds / 60,
        tables=sum(cell["table_seconds"] for cell in cells),
        first=first_table(cells),
        second=second_table(cells),
        summary=summary(cells),
        evaluations=args.evaluations,
    )
    doc.write_text(text)
    doc.with_suffix(".json").write_text(json.dumps(cells, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--seconds",
        type=float,
        default=12.0,
        help="limit for timing one model and batch size at each of three moments",
    )
    parser.add_argument("--evaluations", type=int, default=60, help="of the PPO search on digits")
    parser.add_argument("--doc", type=Path, default=DOCS / "latency.md")
    args = parser.parse_args()
    started = time.perf_counter()
    cells = measurements(args.evaluations, args.threads)
    for number in range(MOMENTS):
        # In one process some models stayed slower from moment to moment, probably for where their tensors lie.
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            found = pool.submit(moment, args.evaluations, args.threads, args.seconds).result()
        for cell, (load, times) in zip(cells, found, strict=True):
            cell.add(load, times)
        write([facts(cell) for cell in cells], args, time.perf_counter() - started)
        print(f"moment {number + 1} of {MOMENTS}: {time.perf_counter() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
