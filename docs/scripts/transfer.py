"""A learned policy on checkpoints that it has never seen -> docs/transfer.md.

    python docs/scripts/transfer.py [--config digits] [--budgets 0.5 0.3] [--evaluations 300]

Policies are trained on a single checkpoint and on several (other training seeds of the same model). A policy of
several brings their best plans along (`agents/experience.py`) and builds models on a new checkpoint, whose logits
it compares with the dense ones on unlabelled images. Each is applied without an evaluation to checkpoints of yet other
seeds, beside uniform, the best rule, the best widths of the first checkpoint copied and those of all averaged, the same
number of builds without a policy, and a full search on the checkpoint itself; with `--refine` evaluations as well.
Every score is -KL to the checkpoint's own dense model on its validation split, under the same recovery; finished plans
are reported on the test split, too.
Finished parts are kept in --out, so that a stopped run goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import rlprune
from rlprune.agents.experience import builds, planned
from rlprune.agents.policy import PortablePolicy, save_policy
from rlprune.agents.proposals import neighbours
from rlprune.config import Config, load_config
from rlprune.deploy import refined
from rlprune.envs.task import Task
from rlprune.inspection import hardware
from rlprune.ledger import Ledger
from rlprune.problem import Problem, prepare, search
from rlprune.progress import Console
from rlprune.report import markdown_table
from rlprune.rules import RULES

DOCS = Path(__file__).resolve().parents[1]
TRAINED, UNSEEN = tuple(range(8)), (101, 102, 103, 104, 105)


def problem(config: Config, seed: int) -> Problem:
    """The same settings with the dense model of another training seed."""
    return prepare(config, model_seed=seed, name=f"model seed {seed}")


def trained(config: Config, problems: list[Problem], out: Path) -> dict[str, Any]:
    """Search on some checkpoints; the policy is saved in `out`, and what was found is returned."""
    record = out / "found.json"
    if not record.exists():
        out.mkdir(parents=True, exist_ok=True)
        ledger = Ledger(out / "ledger.jsonl")
        found = search("ppo", problems, ledger, seed=config.seed, state=out / "state")
        save_policy(found.policy, out / "policy")
        spent = len(ledger.rows)
        content = {"widths": list(found.history[-1]), "score": found.best.score, "spent": spent}
        record.write_text(json.dumps(content), encoding="utf-8")
    return dict(json.loads(record.read_text(encoding="utf-8")))


def averaged(problems: list[Problem], ledger: Ledger) -> Any:
    """Widths at the budget from the mean logarithm of the keep ratios of every checkpoint's best plan."""
    space, logs = problems[0].space, []
    for p in problems:
        rows = [row for row in ledger.rows if row["task"] == p.name and row["cost"] <= p.target]
        best = max(rows, key=lambda row: row["score"])
        logs.append(np.log(np.array(best["widths"]) / space.widths))
    return space.project(np.maximum(1.0 - np.exp(np.mean(logs, axis=0)), 1e-6), problems[0].budget)


@dataclass(frozen=True)
class Way:
    """One way to prune an unseen checkpoint: its widths and score there, what that has cost, and the test split's word.

    ``score`` and ``test`` are -KL to the dense model on the validation and on the test split, ``loss`` is the latter's.
    """

    widths: tuple[int, ...]
    score: float
    test: float
    loss: float
    builds: int = 0
    evaluations: int = 0


def way(target: Problem, widths: Any, *, builds: int = 0, evaluations: int = 0) -> Way:
    """Judge a plan whose way here is at its end; nothing is chosen by what the test split says."""
    found = target.evaluator.evaluate(widths)
    test, loss = on_test(target.workload, target.evaluator.build(widths))
    return Way(tuple(int(w) for w in widths), found.score, test, loss, builds, evaluations)


def on_test(workload: Any, model: torch.nn.Module) -> tuple[float, float]:
    """-KL(dense || model) and the loss on the test split."""
    model.eval()
    total = count = 0.0
    with workload.test_opened(), torch.no_grad():
        for inputs, targets in workload.batches("test"):
            dense, pruned = workload.model(inputs).log_softmax(-1), model(inputs).log_softmax(-1)
            total += float((dense.exp() * (dense - pruned)).sum())
            count += len(targets)
        loss = workload.evaluate(model, "test").loss
    return -total / count, loss


def rule_plans(target: Problem) -> Any:
    """What the rules give that need no probes: (number, G)."""
    return np.array([target.rule_widths(name) for name in target.start_rules() if not RULES[name].probes])


def by_chance(target: Problem, most: int) -> Any:
    """Widths of a local search from the rules, judged on the unlabelled images as a policy's builds are."""
    task = Task(target.evaluator.fork(), target.budget, target.metric)
    model = task.evaluator.logit_probes(target.target)
    generator = np.random.default_rng(0)
    for widths in rule_plans(target):
        model.measure(widths)
    while model.builds < most:
        model.measure(neighbours(task, model.best(5), target.budget, 1, generator)[0])
    return model.best()[0]


def by_process(target: Problem, most: int) -> Any:
    """Widths that the process of the logits finds from the rules, without a policy."""
    task = Task(target.evaluator.fork(), target.budget, target.metric)
    return planned(task, target.budget, rule_plans(target), most)


def ways(
    target: Problem, single: Any, several: Any, plans: dict[str, Any], full: dict[str, Any], arguments: Any
) -> dict[str, Way]:
    """Every way to prune an unseen checkpoint; only refined policies and the full search spend evaluations on it."""
    judge, budget = target.evaluator, target.budget
    rules = {name: target.rule_widths(name) for name in target.start_rules()}
    best = max(rules, key=lambda name: judge.evaluate(rules[name]).score)
    network = PortablePolicy(several.network, several.meta)
    name = f"policy, {len(TRAINED)} checkpoints"
    plans = {"uniform": rules["uniform"], "best rule": rules[best]} | plans | {
        "policy, 1 checkpoint": single.plan(judge, budget).widths,
        f"{name}, network alone": network.plan(judge, budget).widths,
    }  # fmt: skip
    rows = {label: way(target, widths) for label, widths in plans.items()}
    for most in arguments.builds:
        for label, search_on in (
            ("no policy, local search", by_chance),
            ("no policy, same process", by_process),
        ):
            rows[f"{label} ({most})"] = way(target, search_on(target, most), builds=most)
        # A fork knows of no builds, so that each number of them is a search of its own.
        here = replace(target, evaluator=judge.fork())
        task = Task(here.evaluator, budget, target.metric)
        widths = several.plan(here.evaluator, budget, builds=most).widths
        rows[f"{name} ({most})"] = way(target, widths, builds=builds(task)[0])
        found = refined(here, several, arguments.refine, Ledger(), Console(False))
        rows[f"{name} ({most}), and evaluations"] = way(
            target, found.history[-1], builds=builds(task)[0], evaluations=found.account.spent
        )
    return rows | {"full search": way(target, full["widths"], evaluations=full["spent"])}


def study(config: Config, training: Config, out: Path, arguments: Any) -> dict[int, dict[str, Way]]:
    """Every way on every unseen checkpoint: {model seed: {name: way}}; nothing is trained where all is known."""
    records = {seed: out / f"ways-{seed}.json" for seed in UNSEEN}
    if not all(record.exists() for record in records.values()):
        problems = [problem(training, seed) for seed in TRAINED]
        single = trained(config, [problem(config, TRAINED[0])], out / "trained-1")
        folder = out / f"trained-{len(TRAINED)}"
        trained(training, problems, folder)
        plans = {
            "widths copied": single["widths"],
            "widths averaged": averaged(problems, Ledger(folder / "ledger.jsonl")),
        }
        policies = [rlprune.load_policy(f / "policy") for f in (out / "trained-1", folder)]
    result = {}
    for seed, record in records.items():
        if not record.exists():
            target = problem(config, seed)
            full = trained(config, [target], out / f"full-{seed}")
            found = ways(target, *policies, plans, full, arguments)
            record.write_text(
                json.dumps({name: asdict(way) for name, way in found.items()}), encoding="utf-8"
            )
        kept = json.loads(record.read_text(encoding="utf-8"))
        result[seed] = {name: Way(**(way | {"widths": tuple(way["widths"])})) for name, way in kept.items()}
        print(seed, {name: round(way.score, 4) for name, way in result[seed].items()}, flush=True)
    return result


def table(result: dict[int, dict[str, Way]], of: str) -> str:
    """One line a way: the score (``of``: "score" or "test") on each checkpoint, shares of the gain, and the cost."""
    lines = []
    for name in next(iter(result.values())):
        ways = [found[name] for found in result.values()]
        shares = [share([found], name, of) for found in result.values()]
        mean = f"{100 * np.mean(shares):.0f}%" if np.isfinite(shares).all() else "–"
        cells = [
            f"{getattr(way, of):.4f}" + (f" ({100 * x:.0f}%)" if np.isfinite(x) else "")
            for way, x in zip(ways, shares, strict=True)
        ]
        cost = [str(max(way.builds for way in ways)), str(max(way.evaluations for way in ways))]
        together = f"{100 * share(list(result.values()), name, of):.0f}%"
        loss = [f"{np.mean([way.loss for way in ways]):.4f}"] if of == "test" else []
        lines.append([name, *cost, *cells, mean, together, *loss])
    seeds = [f"model seed {seed}" for seed in result]
    last = ["mean share", "share of the mean gain", *(["mean test loss"] if of == "test" else [])]
    return markdown_table(["", "builds", "evaluations", *seeds, *last], lines)


def share(found: list[dict[str, Way]], name: str, of: str) -> float:
    """Mean (way - best rule) / mean (full search - best rule); NaN where the search has gained nothing."""

    def gain(which: str) -> float:
        return float(np.mean([getattr(ways[which], of) - getattr(ways["best rule"], of) for ways in found]))

    return gain(name) / gain("full search") if gain("full search") > 0 else float("nan")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", default="digits")
    parser.add_argument("--budgets", nargs="+", default=["0.5", "0.3"])
    parser.add_argument("--evaluations", type=int, default=300, help="per checkpoint")
    parser.add_argument(
        "--train-evaluations", type=int, help="per checkpoint of those that train the policy together"
    )
    parser.add_argument(
        "--builds", type=int, nargs="+", default=[96, 192], help="models built on an unseen checkpoint"
    )
    parser.add_argument("--refine", type=int, default=20, help="evaluations on an unseen checkpoint")
    parser.add_argument("--out", type=Path, default=Path("runs/transfer"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--note", default="", help="a remark for the top of the page")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    together = arguments.train_evaluations or arguments.evaluations
    parts = []
    for budget in arguments.budgets:
        overrides = [f"budget.target={budget}", f"search.evaluations={arguments.evaluations}"]
        config = load_config(arguments.config, overrides)
        out = arguments.out / f"{arguments.config}-{budget}-{arguments.evaluations}"
        training = load_config(arguments.config, [*overrides, f"search.evaluations={together}"])
        result = study(config, training, out, arguments)
        parts.append(
            f"## {100 * float(budget):.0f}% of the MACs\n\n{table(result, 'score')}\n\n"
            f"The same plans on the test split, whose images no way has seen:\n\n{table(result, 'test')}\n"
        )
        print(parts[-1], flush=True)
    text = PAGE.format(
        config=arguments.config, budgets=" ".join(arguments.budgets), evaluations=arguments.evaluations,
        refine=arguments.refine, builds=" ".join(map(str, arguments.builds)), together=together,
        trained=", ".join(map(str, TRAINED)), unseen=", ".join(map(str, UNSEEN)), parts="\n".join(parts),
        note=f"\n{arguments.note}\n" if arguments.note else "", threads=arguments.threads, torch=torch.__version__,
        processor=hardware()["processor"],
    )  # fmt: skip
    (DOCS / "transfer.md").write_text(text, encoding="utf-8")
    return 0


PAGE = """# A policy on checkpoints it has not seen

Written by `python docs/scripts/transfer.py --config {config} --budgets {budgets} --evaluations {evaluations}
--train-evaluations {together} --builds {builds} --refine {refine}`
(torch {torch}, {processor}, {threads} thread(s)).
{note}
Policies trained on model seeds {trained} (the first of them alone with {evaluations} evaluations, all of them with
{together} on each) and applied to model seeds {unseen}: dense models of the same settings, trained with other
seeds. Scores are −KL to the checkpoint's own dense model (nats, higher is better); in brackets the share of the full
search's gain over the best rule. "Evaluations" are plans scored on the validation split of the checkpoint. "Builds"
(the number in brackets; plans that are evaluated afterwards are built as well) are models cut and recovered on the
checkpoint whose logits were compared with the dense model's on unlabelled images of the calibration and the train
split: searches in all but name, which cost a build each and read no label and no validation image (an evaluation costs
a build as well). "Best rule" is the best of all rules on validation, with hindsight; "widths copied" are those that the
search found on the first model seed, "widths averaged" the mean of the logarithms of the best plans' keep ratios.

A policy of several checkpoints starts its builds from their best plans and its network's, and a Gaussian process
of the logits says what to build next (`rlprune/expectation.py`). "No policy, same process" does that from the rules'
plans, "no policy, local search" changes the best plans so far at random; "network alone" builds nothing. What the
policy itself adds is the difference to these.

Every budget has two tables. The first is of the validation split, by which the full search and the refined policies
choose (the full search among 300 plans) and the others do not: it flatters who has seen more of it. The second reports
the same plans on the test split, which none of them has read.

{parts}"""

if __name__ == "__main__":
    sys.exit(main())
