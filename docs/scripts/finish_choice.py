"""Which finalist wins: the one with the best score, or the one that is best after its fine-tune -> finish-choice.md.

    python docs/scripts/finish_choice.py [--workloads digits-50 ...] [--seeds 5] [--cifar FOLDER --checkpoint FILE]

FOLDER of CIFAR-10 holds train/CLASS/*.jpg and test/CLASS/*.jpg, FILE the weights of a CIFAR ResNet-20. What has been
measured is kept in --state; the page is written from all of it, and --workloads without a name measures nothing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from kept import Kept, every_seed, options
from reduced import FASHION

from rlprune import load_config
from rlprune.benchmarks import difference
from rlprune.evaluation import EvaluationLog
from rlprune.experiments import Experiment, finalists, prepare_experiment, run_agent, score_rule
from rlprune.report import comparison, markdown_table
from rlprune.rules import rules_for
from rlprune.utils import hardware
from rlprune.workloads import TuneJob

DOCS = Path(__file__).resolve().parents[1]
EVALUATIONS = 100
AGENTS = ("ppo", "evopress")
# Finalists that differ do so by at least this in their keep ratios, on average over the groups.
APART = 0.05
Cells = dict[str, Any]
Plan = Mapping[str, Any]
History = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Case:
    """A workload at a budget of MACs: the config with its settings; each seed has splits of its own."""

    title: str
    config: str
    budget: float
    seeds: int
    settings: tuple[str, ...] = ()
    needs: str = ""


CASES = {
    "digits-50": Case("digits, ResNet-20 of width 16", "digits", 0.5, 5),
    "digits-30": Case("digits, ResNet-20 of width 16", "digits", 0.3, 5),
    "cifar-50": Case(
        "CIFAR-10 (JPEG), ResNet-20", "cifar10_resnet20", 0.5, 3,
        ("data.train=3000", "data.calibration=128", "data.validation=1000", "data.test=2000", "model.train.epochs=1",
         "model.train.lr=0.01", "finish.epochs=1"),
        "cifar",
    ),
    "fashion-50": Case(
        "Fashion-MNIST, ResNet-20 of width 8", "fashion_mnist_resnet20", 0.5, 3, (*FASHION, "finish.epochs=1")
    ),
}  # fmt: skip


def prepared(case: Case, seed: int, arguments: argparse.Namespace) -> Experiment:
    settings = [*case.settings, "threads=1", f"seed={seed}", f"model.seed={seed}", f"data.seed={seed}"]
    settings += [f"budget.target={case.budget}", f"search.evaluations={EVALUATIONS}"]
    if case.needs == "cifar":
        settings += [f"data.root={arguments.cifar}", f"model.checkpoint={arguments.checkpoint}"]
    return prepare_experiment(load_config(case.config, settings))


def measured(experiment: Experiment, history: History, seed: int) -> Cells:
    """A plan's score on the whole validation split, and loss and accuracy after the fine-tune."""
    workload = experiment.workload
    model = experiment.evaluator.build(history)
    with workload.test_opened():
        before = workload.evaluate(model, "test")
    model = workload.fine_tune(model, experiment.config.finish, TuneJob(seed)).model
    validation = workload.evaluate(model, "validation")
    with workload.test_opened():
        after = workload.evaluate(model, "test")
    score = experiment.evaluator.evaluate_full(history).score
    return {
        "score": score, "before": before.loss, "validation": validation.loss, "loss": after.loss,
        "accuracy": after.metric,
    }  # fmt: skip


def apart(experiment: Experiment, ranked: Sequence[History], count: int) -> list[History]:
    """The first ``count`` of some plans that each differ from those before; the next ones where too few do."""
    dense, taken = experiment.space.widths, list[History]()
    for history in ranked:
        widths = np.array(history[-1])
        if all((np.abs(widths - np.array(other[-1])) / dense).mean() >= APART for other in taken):
            taken.append(history)
    left = [history for history in ranked if history not in taken]
    return [*taken, *left][:count]


def measure(name: str, seed: int, arguments: argparse.Namespace, state: Kept) -> None:
    """The rules' plans and each search's finalists of one dense model, by score and apart from one another."""
    if all(f"{name} {seed} {group}" in state.cells for group in ("rules", *AGENTS)):
        return
    experiment = prepared(CASES[name], seed, arguments)
    known: dict[History, Cells] = {}

    def ask(history: History) -> Cells:
        if history not in known:
            known[history] = measured(experiment, history, seed)
        return known[history]

    def rules() -> Cells:
        found = {r: score_rule(experiment, r, EvaluationLog(), seed) for r in rules_for(experiment.space)}
        return {rule: ask(result.history) for rule, result in found.items()}

    state.ask(f"{name} {seed} rules", rules)
    for agent in AGENTS:

        def finals(agent: str = agent) -> Cells:
            account = run_agent(agent, [experiment], EvaluationLog(), seed=seed).account
            ranked = finalists(experiment, account, len(account.plans))
            count = experiment.config.finish.candidates
            sets = {"best": ranked[:count], "apart": apart(experiment, ranked, count)}
            return {which: [ask(history) for history in histories] for which, histories in sets.items()}

        state.ask(f"{name} {seed} {agent}", finals)


def by_score(plans: Sequence[Plan]) -> Plan:
    return max(plans, key=lambda plan: float(plan["score"]))


def by_loss(plans: Sequence[Plan]) -> Plan:
    return min(plans, key=lambda plan: float(plan["validation"]))


def arms(cells: Cells, name: str, seed: int, agent: str) -> dict[str, Plan]:
    """The plan of each way to choose."""
    found, rules = cells[f"{name} {seed} {agent}"], list(cells[f"{name} {seed} rules"].values())
    return {
        "score": by_score(found["best"]),
        "tuned": by_loss(found["best"]),
        "tuned, finalists that differ": by_loss(found["apart"]),
        "score, and the rules": by_score([*found["best"], *rules]),
        "tuned, and the rules": by_loss([*found["best"], *rules]),
        "lowest by hindsight": min([*found["best"], *rules], key=lambda plan: float(plan["loss"])),
    }


PAIRS = {
    "tuned": "score",
    "tuned, finalists that differ": "score",
    "tuned, and the rules": "score, and the rules",
}


def seeds_of(cells: Cells, name: str) -> list[int]:
    """The seeds that have everything."""
    groups = ("rules", *AGENTS)
    return [s for s in range(CASES[name].seeds) if all(f"{name} {s} {group}" in cells for group in groups)]


def rows(cells: Cells, name: str, agent: str) -> dict[str, dict[int, Plan]]:
    """{way to choose: {seed: its plan's figures}}."""
    seeds = seeds_of(cells, name)
    every = {seed: arms(cells, name, seed, agent) for seed in seeds}
    return {arm: {seed: every[seed][arm] for seed in seeds} for arm in every[seeds[0]]}


def mean(plans: Mapping[int, Plan], field: str) -> float:
    return float(np.mean([plan[field] for plan in plans.values()]))


def against(found: Mapping[str, Mapping[int, Plan]], arm: str) -> str:
    other = PAIRS.get(arm)
    if other is None:
        return ""
    return comparison.against(difference(dict(found[arm]), dict(found[other]), "loss", higher=False))


def sections(cells: Cells) -> Iterator[str]:
    for name, case in CASES.items():
        seeds = seeds_of(cells, name)
        if not seeds:
            continue
        text = f"## {case.title}, {case.budget:.0%} of the MACs\n\n{len(seeds)} seed(s).\n"
        for agent in AGENTS:
            found = rows(cells, name, agent)
            table = [
                [arm, *(f"{mean(plans, f):.4f}" for f in ("before", "loss", "accuracy")), against(found, arm)]
                for arm, plans in found.items()
            ]
            header = ["choice", "test loss before", "after", "accuracy after", "after, against the score"]
            text += f"\nSearch of {agent}:\n\n{markdown_table(header, table)}\n"
        rules: dict[str, dict[int, Plan]] = {}
        for seed in seeds:
            for rule, plan in cells[f"{name} {seed} rules"].items():
                rules.setdefault(rule, {})[seed] = plan
        ranked = sorted(rules, key=lambda rule: mean(rules[rule], "loss"))
        text += "\nRules, test loss after the fine-tune: "
        yield text + ", ".join(f"{rule} {mean(rules[rule], 'loss'):.4f}" for rule in ranked) + ".\n"


def lines(cells: Cells) -> Iterator[str]:
    for name in CASES:
        for agent in AGENTS if seeds_of(cells, name) else ():
            found = rows(cells, name, agent)
            what = "; ".join(f"{arm} − {other} {against(found, arm)}" for arm, other in PAIRS.items())
            yield f"- {name}, {agent}: {what}."


def missing(cells: Cells) -> str:
    """What has not been measured, with the command."""
    files = " --cifar cifar10-jpeg --checkpoint resnet20_cifar10.safetensors"
    left = [
        f"python docs/scripts/finish_choice.py --workloads {name}{files if case.needs else ''}"
        f"   # {len(seeds_of(cells, name))} of {case.seeds} seeds done"
        for name, case in CASES.items()
        if len(seeds_of(cells, name)) < case.seeds
    ]
    text = "\n".join(left)
    return f"\n## Open\n\nNot measured, or not on every seed:\n\n```sh\n{text}\n```\n" if left else ""


def page(cells: Cells) -> str:
    machine = hardware()
    return PAGE.format(
        processor=machine["processor"], torch=machine["libraries"]["torch"], evaluations=EVALUATIONS,
        lines="\n".join(lines(cells)), sections="\n".join(sections(cells)), missing=missing(cells),
    )  # fmt: skip


def main() -> int:
    parser = options(__doc__, CASES, DOCS / "finish-choice.json")
    arguments = parser.parse_args()
    state = Kept(arguments.state)
    every_seed(arguments, CASES, lambda name, seed: measure(name, seed, arguments, state))
    (DOCS / "finish-choice.md").write_text(page(state.cells), encoding="utf-8")
    return 0


PAGE = """# Which finalist wins

Written by `python docs/scripts/finish_choice.py`: one thread of an {processor}, torch {torch}, other programs on
the other cores.

A search scores plans before the final fine-tune. `finish.choice` says who wins: `score`, the best of the five finalists
by the score on the whole validation split; `tuned`, the one with the lowest validation loss after each of them had the
whole final fine-tune. In `rlprune train` the rules that are trained for its table take part (`finish.rules`, "and the
rules"); in `rlprune benchmark` every method has its own finalists alone. The five best plans of a search are
neighbours; "finalists that differ" are the best ones at least 0.05 apart in their keep ratios, on average over the
groups.

Searches of {evaluations} evaluations; each seed has a search, splits and, but for CIFAR-10, a dense model of its own.
All ways to choose meet the same searches, and every plan the same fine-tune. Cells are means over the seeds, the
difference is paired by seed: mean [95% BCa interval] (seeds on which the first is better); intervals of so few seeds
are too narrow. No way to choose has read the test split, but the last, which shows what there was to gain.

{lines}

{sections}{missing}"""

if __name__ == "__main__":
    sys.exit(main())
