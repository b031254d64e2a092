"""Where the final fine-tune starts: the closed form, statistics alone, or what a few steps say -> docs/finish-start.md.

    python docs/scripts/finish_start.py [--workloads digits-50 ...] [--epochs 6 ...] [--seeds 5]
        [--cifar FOLDER --checkpoint FILE]

FOLDER of CIFAR-10 holds train/CLASS/*.jpg and test/CLASS/*.jpg, FILE the weights of a CIFAR ResNet-20. What has been
measured is kept in --state; the page is written from all of it, and --workloads without a name measures nothing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from kept import Kept, every_seed, options
from reduced import CIFAR, FASHION

from rlprune import load_config
from rlprune.benchmarks import difference
from rlprune.evaluation import EvaluationLog
from rlprune.experiments import Experiment, choose, prepare_experiment, run_agent, tuning_start
from rlprune.report import comparison, markdown_table
from rlprune.utils import hardware
from rlprune.workloads import TuneJob

DOCS = Path(__file__).resolve().parents[1]
STARTS = ("recovered", "statistics", "auto")
RULES = ("uniform", "lamp", "fisher")
AGENT = "ppo"
EVALUATIONS = 60
SPLITS = {"validation": "validation", "test": "after"}  # and where a cell has the loss after the fine-tune
Cells = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A workload at a budget of MACs: the config with its settings; each seed has a dense model of its own."""

    title: str
    config: str
    budget: float
    epochs: tuple[int, ...]
    seeds: int
    settings: tuple[str, ...] = ()
    needs: str = ""


CASES = {
    "digits-50": Case("digits, ResNet-20 of width 16", "digits", 0.5, (6, 30), 5),
    "digits-30": Case("digits, ResNet-20 of width 16", "digits", 0.3, (6, 30), 5),
    "fashion-50": Case(
        "Fashion-MNIST, ResNet-20 of width 8", "fashion_mnist_resnet20", 0.5, (1, 5), 3, FASHION
    ),
    "cifar-50": Case("CIFAR-10 (JPEG), ResNet-20", "cifar10_resnet20", 0.5, (1,), 1, CIFAR, "cifar"),
}


def prepared(case: Case, seed: int, arguments: argparse.Namespace) -> Experiment:
    settings = [*case.settings, "threads=1", f"seed={seed}", f"model.seed={seed}", f"data.seed={seed}"]
    settings += [f"budget.target={case.budget}", f"search.evaluations={EVALUATIONS}"]
    if case.needs == "cifar":
        settings += [f"data.root={arguments.cifar}", f"model.checkpoint={arguments.checkpoint}"]
    return prepare_experiment(load_config(case.config, settings))


def plans(experiment: Experiment, seed: int) -> dict[str, list[int]]:
    """Widths of each rule, and of the plan that validation chose after a search."""
    found = {rule: [int(w) for w in experiment.rule_widths(rule)] for rule in RULES}
    result = run_agent(AGENT, [experiment], EvaluationLog(), seed=seed)
    found[AGENT] = [int(w) for w in choose(experiment, result).history[-1]]
    return found


def tuned(experiment: Experiment, widths: Sequence[int], epochs: int, seed: int) -> Cells:
    """Test loss and accuracy after the fine-tune from either start, and what `auto` chose.

    `auto` then trains what it has chosen with the same batches and the same seed: the same model.
    """
    finish = replace(experiment.config.finish, epochs=epochs)
    plan, workload = experiment.evaluator.plan(np.array(widths)), experiment.workload
    found: Cells = {}
    for start in STARTS:
        config = replace(experiment.config, finish=replace(finish, start=start))
        here = replace(experiment, config=config)
        model, facts = tuning_start.tuning_start(here, experiment.evaluator.build(plan.widths), plan, seed)
        if start == "auto":
            found |= {"chosen": facts["start"], "trial": tuning_start.trial_steps(here)}
            break
        with workload.test_opened():
            before = workload.evaluate(model, "test")
        model = workload.fine_tune(model, finish, TuneJob(seed)).model
        with workload.test_opened():
            after = workload.evaluate(model, "test")
        quality = {"before": [before.loss, before.metric], "after": [after.loss, after.metric]}
        quality["validation"] = [workload.evaluate(model, "validation").loss]
        found[start] = quality
    return found


def measure(name: str, seed: int, arguments: argparse.Namespace, state: Kept) -> None:
    """All cells of one dense model."""
    case = CASES[name]
    epochs = [e for e in case.epochs if not arguments.epochs or e in arguments.epochs]
    wanted = {(p, e): f"{name} {seed} {e} {p}" for e in epochs for p in (*RULES, AGENT)}
    if all(key in state.cells for key in wanted.values()):
        return
    experiment = prepared(case, seed, arguments)
    widths = state.ask(f"{name} {seed} plans", lambda: plans(experiment, seed))
    for (plan, length), key in wanted.items():
        state.ask(key, lambda p=plan, e=length: tuned(experiment, widths[p], e, seed))  # type: ignore[misc]


def rows_of(cells: Cells, name: str, epochs: int, plan: str) -> dict[str, dict[int, dict[str, float]]]:
    """{start: {seed: losses and accuracies}} of a plan, of the seeds that have all plans."""
    rows: dict[str, dict[int, dict[str, float]]] = {start: {} for start in STARTS}
    for seed in whole(cells, name, epochs):
        cell = cells[f"{name} {seed} {epochs} {plan}"]
        for start in STARTS:
            one = cell[cell["chosen"] if start == "auto" else start]
            rows[start][seed] = {
                "before": one["before"][0],
                "validation": one["validation"][0],
                "loss": one["after"][0],
                "accuracy": one["after"][1],
                "statistics": float(cell["chosen"] == "statistics"),
                **{f"right on {split}": float(cell["chosen"] == best(cell, split)) for split in SPLITS},
            }
    return rows


def whole(cells: Cells, name: str, epochs: int) -> list[int]:
    """The seeds that have all plans."""
    names = (*RULES, AGENT)
    return [s for s in range(CASES[name].seeds) if all(f"{name} {s} {epochs} {p}" in cells for p in names)]


def best(cell: Mapping[str, Any], split: str) -> str:
    """The start with the lower loss of a split after the fine-tune."""
    return min(STARTS[:2], key=lambda start: float(cell[start][SPLITS[split]][0]))


def together(
    parts: Sequence[dict[str, dict[int, dict[str, float]]]],
) -> dict[str, dict[int, dict[str, float]]]:
    """The mean over the plans for each seed that has them all: plans of one seed are not independent."""
    return {
        start: {
            seed: {f: float(np.mean([p[start][seed][f] for p in parts])) for f in parts[0][start][seed]}
            for seed in parts[0][start]
        }
        for start in STARTS
    }


def table(cells: Cells, name: str, epochs: int) -> tuple[str, str]:
    """The table of one length, and a line that sums it up; both empty where nothing has been measured."""
    if not whole(cells, name, epochs):
        return "", ""
    known = {plan: rows_of(cells, name, epochs, plan) for plan in (*RULES, AGENT)}
    every = together([*known.values()])
    lines = []
    for plan, rows in [*known.items(), ("mean of the plans", every)]:
        line = [plan]
        for start in STARTS:
            own = rows[start].values()
            line.append(f"{mean(own, 'loss'):.4f} / {mean(own, 'accuracy'):.4f}")
        for start in STARTS[1:]:
            line.append(against(rows, start, "loss"))
        line.append(against(rows, "statistics", "accuracy"))
        lines.append(line)
    runs = [run for rows in known.values() for run in rows["auto"].values()]
    of, other = len(runs), round(sum(run["statistics"] for run in runs))
    right = [f"{round(sum(run[f'right on {s}'] for run in runs))} times on {s}" for s in SPLITS]
    best_start = min(STARTS, key=lambda start: mean(every[start].values(), "loss"))
    summary = (
        f"lowest mean test loss `{best_start}`; statistics − recovered {against(every, 'statistics', 'loss')}, by "
        f"validation loss {against(every, 'statistics', 'validation')}; auto − recovered "
        f"{against(every, 'auto', 'loss')}; of {of} `auto` took statistics {other} times and the better start "
        f"{', '.join(right)}"
    )
    trial = next(c["trial"] for k, c in cells.items() if k.startswith(f"{name} ") and f" {epochs} " in k)
    header = [
        "plan",
        *STARTS,
        "statistics − recovered",
        "auto − recovered",
        "accuracy, statistics − recovered",
    ]
    text = (
        f"### {epochs} epoch{'s' if epochs > 1 else ''} of fine-tune\n\n{len(every['auto'])} seed(s); a trial has "
        f"{trial} steps.\n\n{markdown_table(header, lines)}\n"
    )
    return text, f"{name}, {epochs} epoch{'s' if epochs > 1 else ''}: {summary}."


def against(rows: Mapping[str, Mapping[int, Any]], start: str, field: str) -> str:
    return comparison.against(
        difference(dict(rows[start]), dict(rows["recovered"]), field, higher=field == "accuracy")
    )


def mean(rows: Any, field: str) -> float:
    return float(np.mean([row[field] for row in rows]))


def sections(cells: Cells) -> Iterator[str]:
    for name, case in CASES.items():
        texts = [text for epochs in case.epochs if (text := table(cells, name, epochs)[0])]
        if texts:
            before = [
                rows_of(cells, name, epochs, plan) for epochs in case.epochs for plan in (*RULES, AGENT)
            ]
            start, other = (
                np.mean([run["before"] for rows in before for run in rows[s].values()]) for s in STARTS[:2]
            )
            yield (
                f"## {case.title}, {case.budget:.0%} of the MACs\n\nTest loss before the fine-tune, mean over all "
                f"plans: recovered {start:.4f}, statistics alone {other:.4f}.\n\n" + "\n".join(texts)
            )


def missing(cells: Cells) -> str:
    """What has not been measured, with the command."""
    lines = []
    for name, case in CASES.items():
        for epochs in case.epochs:
            done = whole(cells, name, epochs)
            if len(done) < case.seeds:
                files = (
                    " --cifar cifar10-jpeg --checkpoint resnet20_cifar10.safetensors" if case.needs else ""
                )
                command = f"python docs/scripts/finish_start.py --workloads {name} --epochs {epochs}{files}"
                lines.append(f"{command}   # {len(done)} of {case.seeds} seeds done")
    text = "\n".join(lines)
    return f"\n## Open\n\nNot measured, or not on every seed:\n\n```sh\n{text}\n```\n" if lines else ""


def page(cells: Cells) -> str:
    machine = hardware()
    lines = [line for name, case in CASES.items() for e in case.epochs if (line := table(cells, name, e)[1])]
    return PAGE.format(
        processor=machine["processor"], torch=machine["libraries"]["torch"], evaluations=EVALUATIONS,
        lines="\n".join(f"- {line}" for line in lines), sections="\n".join(sections(cells)), missing=missing(cells),
    )  # fmt: skip


def main() -> int:
    parser = options(__doc__, CASES, DOCS / "finish-start.json")
    parser.add_argument("--epochs", nargs="+", type=int, help="these lengths only")
    arguments = parser.parse_args()
    state = Kept(arguments.state)
    every_seed(arguments, CASES, lambda name, seed: measure(name, seed, arguments, state))
    (DOCS / "finish-start.md").write_text(page(state.cells), encoding="utf-8")
    return 0


PAGE = """# Where the final fine-tune starts

Written by `python docs/scripts/finish_start.py`: one thread of an {processor}, torch {torch}, other programs on
the other cores.

`finish.start` says what the final fine-tune of a model of images begins with: `recovered`, the model after all of
`recovery.steps`; `statistics`, the same units without the closed form, new batch-norm statistics alone; `auto` trains
both for a tenth of the steps (10 to 200) with a rate that falls to zero, and goes on from the one with the lower
validation loss, which costs up to a fifth more training.

Each seed has a dense model and splits of its own. Plans: those of the rules `uniform`, `lamp` and `fisher`, and the one
that validation chose after a PPO search of {evaluations} evaluations. The same plan, seed and batches meet all starts.
Cells are test loss / accuracy after the fine-tune, means over the seeds. Differences are paired by seed: mean [95% BCa
interval] (seeds on which the first is better); intervals of so few seeds are too narrow. "Mean of the plans" takes the
mean over the plans of a seed first. The validation loss after the fine-tune is given too, because a default is not to
be chosen by the test split.

{lines}

What follows: the default stays `recovered`. No start is best on all workloads. On Fashion-MNIST `recovered` is better
for all four plans and both lengths; on CIFAR-10 after one epoch three of four plans end with a lower test loss from
`statistics`, and three with a higher accuracy from `recovered`; each of the two is one dense model. On digits
`statistics` has the lower mean, but clear of zero only at 50% after six epochs, by 0.005, more than half of it from the
plan of `uniform`; by the validation loss it is clear nowhere. `auto` is nowhere worse than `recovered` in the mean, but
its gain is nowhere clear of zero, for up to a fifth more training: the trial favours the closed form, which is ahead
early on.

{sections}
{missing}"""

if __name__ == "__main__":
    sys.exit(main())
