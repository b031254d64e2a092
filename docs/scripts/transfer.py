"""A learned policy on checkpoints that it has never seen -> docs/transfer.md.

    python docs/scripts/transfer.py [--config digits] [--budgets 0.5 0.3] [--evaluations 300]

Policies are trained on a single checkpoint and on several (other training seeds of the same model). A policy of
several brings their best plans along (`agents/experience.py`) and builds models on a new checkpoint, whose logits
it compares with the dense ones on unlabelled images. Each is applied without an evaluation to checkpoints of yet other
seeds, and uniform, the best rule, the best widths of the first checkpoint copied and those of all averaged, the same
number of builds without a policy, and a full search on the checkpoint itself; with `--refine` evaluations as well.
Every score is -KL to the checkpoint's own dense model on its validation split, under the same recovery; finished plans
are reported on the test split, too.
Finished parts are kept in --out, so that a stopped run goes on where it was; they are of the code that found them.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import rlprune
from rlprune import Config, load_config
from rlprune.agents import PortablePolicy, planned, save_policy
from rlprune.agents import builds as builds_of
from rlprune.benchmarks import bootstrap
from rlprune.envs import Task
from rlprune.evaluation import EvaluationLog
from rlprune.experiments import Experiment, prepare_experiment, refined, run_agent
from rlprune.report import markdown_table
from rlprune.surrogates import LogitProbes, neighbours
from rlprune.utils import Console, hardware, read_json, write_json_atomic

DOCS = Path(__file__).resolve().parents[1]
TRAINED, UNSEEN = tuple(range(8)), (101, 102, 103, 104, 105)


def experiment(config: Config, seed: int) -> Experiment:
    """The same settings with the dense model of another training seed."""
    return prepare_experiment(config, model_seed=seed, name=f"model seed {seed}")


def trained(config: Config, experiments: list[Experiment], out: Path) -> dict[str, Any]:
    """Search on some checkpoints; the policy is saved in `out`, and what was found is returned."""
    record = out / "found.json"
    asked = {"evaluations": config.search.evaluations, "checkpoints": len(experiments)}
    if not record.exists():
        out.mkdir(parents=True, exist_ok=True)
        ledger = EvaluationLog(out / "ledger.jsonl")
        found = run_agent("ppo", experiments, ledger, seed=config.seed, state=out / "state")
        save_policy(found.policy, out / "policy")
        spent = len(ledger.rows)
        content = {"widths": list(found.history[-1]), "score": found.best.score, "spent": spent}
        write_json_atomic(record, content | {"asked": asked})
    content = read_json(record)
    if content["asked"] != asked:
        raise SystemExit(f"{record}: found with {content['asked']}, not {asked}; another --out is needed")
    return dict(content)


def averaged(experiments: list[Experiment], ledger: EvaluationLog) -> Any:
    """Widths at the budget from the mean logarithm of the keep ratios of every checkpoint's best plan."""
    space, logs = experiments[0].space, []
    for p in experiments:
        rows = [row for row in ledger.rows if row["task"] == p.name and row["cost"] <= p.target]
        best = max(rows, key=lambda row: row["score"])
        logs.append(np.log(np.array(best["widths"]) / space.widths))
    return space.project(np.maximum(1.0 - np.exp(np.mean(logs, axis=0)), 1e-6), experiments[0].budget)


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


def way(target: Experiment, widths: Any, *, builds: int = 0, evaluations: int = 0) -> Way:
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


def from_rules(task: Task) -> Any:
    """The plans that a search without a policy starts from: uniform, and the rules that need no probes (number, G)."""
    return np.vstack([task.uniform_widths(task.budget), task.rule_plans(task.budget)])


def by_chance(target: Experiment, most: int) -> Any:
    """Widths of a local search from the rules, judged on the unlabelled images as a policy's builds are."""
    task = Task(target.evaluator.fork(), target.budget, target.metric)
    model = task.evaluator.logit_probes(target.target, LogitProbes)
    generator = np.random.default_rng(0)
    for widths in from_rules(task):
        model.measure(widths)
    while model.builds < most:
        model.measure(neighbours(task, model.best(5), target.budget, 1, generator)[0])
    return model.best()[0]


def by_process(target: Experiment, most: int) -> Any:
    """Widths that the process of the logits finds from the rules, without a policy."""
    task = Task(target.evaluator.fork(), target.budget, target.metric)
    return planned(task, target.budget, from_rules(task), most)


OTHERWISE = {"no policy, local search": by_chance, "no policy, same process": by_process}


def ways(
    target: Experiment,
    policies: dict[str, PortablePolicy],
    plans: dict[str, Any],
    full: dict[str, Any],
    builds: Sequence[int],
    refine: int,
) -> dict[str, Callable[[], Way]]:
    """Every way to prune an unseen checkpoint; only refined policies and the full search spend evaluations on it.

    Args:
        policies: by the name of their rows; those with experience build models as well.
        plans: widths that are given, by the name of their rows.
        full: what a search on this checkpoint has found.
        builds: numbers of models that may be built; refine: evaluations after them.
    """
    found: dict[str, Callable[[], Way]] = {
        "uniform": lambda: way(target, target.rule_widths("uniform")),
        "best rule": lambda: way(target, best_rule(target)),
    } | {name: partial(way, target, widths) for name, widths in plans.items()}
    for name, policy in policies.items():
        label = name if policy.plan_memory is None else f"{name}, network alone"
        found[label] = partial(alone, target, PortablePolicy(policy.network, policy.meta))
    for most in builds:
        for label, search_on in OTHERWISE.items():
            found[f"{label} ({most})"] = partial(unguided, target, search_on, most)
        for name, policy in policies.items():
            if policy.plan_memory is not None:
                # A fork knows of no builds, so that each number of them is a search of its own.
                here = replace(target, evaluator=target.evaluator.fork())
                found[f"{name} ({most})"] = partial(built, here, policy, most, 0)
                found[f"{name} ({most}), and {refine} evaluations"] = partial(
                    built, here, policy, most, refine
                )
    found["full search"] = lambda: way(target, full["widths"], evaluations=full["spent"])
    return found


def best_rule(target: Experiment) -> Any:
    rules = {name: target.rule_widths(name) for name in target.free_start_rules()}
    return rules[max(rules, key=lambda name: target.evaluator.evaluate(rules[name]).score)]


def alone(target: Experiment, network: PortablePolicy) -> Way:
    return way(target, network.plan(target.evaluator, target.budget).widths)


def unguided(target: Experiment, search_on: Callable[[Experiment, int], Any], most: int) -> Way:
    return way(target, search_on(target, most), builds=most)


def built(target: Experiment, policy: PortablePolicy, most: int, refine: int) -> Way:
    """The policy's plan of so many builds, refined by evaluations where there are any."""
    task, spent = Task(target.evaluator, target.budget, target.metric), 0
    widths = policy.plan(target.evaluator, target.budget, builds=most).widths
    if refine:
        found = refined(target, policy, refine, EvaluationLog(), Console(False))
        widths, spent = found.history[-1], found.account.spent
    return way(target, widths, builds=builds_of(task)[0], evaluations=spent)


def recorded(record: Path, ways: dict[str, Callable[[], Way]]) -> dict[str, Way]:
    """Every way by name, taken from the record where it is there; each is written as soon as it is known."""
    known: dict[str, Any] = read_json(record) if record.exists() else {}
    for name, find in ways.items():
        if name not in known:
            started = time.perf_counter()
            known[name] = asdict(find())
            write_json_atomic(record, known)
            print(
                f"{record.stem}: {name} {known[name]['score']:.4f}, {time.perf_counter() - started:.0f} s",
                flush=True,
            )
    return {name: Way(**(known[name] | {"widths": tuple(known[name]["widths"])})) for name in ways}


def policies(config: Config, training: Config, out: Path) -> tuple[dict[str, PortablePolicy], dict[str, Any]]:
    """The policy of one checkpoint and that of several, and widths for others of their architecture: by rows' names."""
    experiments = [experiment(training, seed) for seed in TRAINED]
    single = trained(config, [experiment(config, TRAINED[0])], out / "trained-1")
    folder = out / f"trained-{len(TRAINED)}"
    trained(training, experiments, folder)
    found = {
        "policy, 1 checkpoint": rlprune.load_policy(out / "trained-1" / "policy"),
        f"policy, {len(TRAINED)} checkpoints": rlprune.load_policy(folder / "policy"),
    }
    return found, {
        "widths copied": single["widths"],
        "widths averaged": averaged(experiments, EvaluationLog(folder / "ledger.jsonl")),
    }


def study(config: Config, training: Config, out: Path, arguments: Any) -> dict[str, dict[str, Way]]:
    """Every way on every unseen checkpoint: {checkpoint: {name: way}}."""
    known, plans = policies(config, training, out)
    result = {}
    for seed in UNSEEN:
        target = experiment(config, seed)
        full = trained(config, [target], out / f"full-{seed}")
        found = ways(target, known, plans, full, arguments.builds, arguments.refine)
        result[target.name] = recorded(out / f"ways-{seed}.json", found)
    return result


def table(result: dict[str, dict[str, Way]], of: str) -> str:
    """One line a way: the score (``of``: "score" or "test") on each checkpoint, shares of the gain, and the cost."""
    lines = []
    for name in next(iter(result.values())):
        ways = [found[name] for found in result.values()]
        shares = [share([found], name, of) for found in result.values()]
        cells = [
            f"{getattr(way, of):.4f}" + (f" ({100 * x:.0f}%)" if np.isfinite(x) else "")
            for way, x in zip(ways, shares, strict=True)
        ]
        cost = [str(max(way.builds for way in ways)), str(max(way.evaluations for way in ways))]
        together = percent(list(result.values()), name, of)
        loss = [f"{np.mean([way.loss for way in ways]):.4f}"] if of == "test" else []
        lines.append([name, *cost, *cells, together, *loss])
    last = ["share of the mean gain", *(["mean test loss"] if of == "test" else [])]
    return markdown_table(["", "builds", "evaluations", *result, *last], lines)


def percent(found: list[dict[str, Way]], name: str, of: str) -> str:
    """The share in percent, and its 95% interval over the checkpoints where the search gains in every resample."""
    low, high = bootstrap(lambda drawn: share([found[i] for i in drawn], name, of), len(found))
    interval = (
        f" [{100 * low:.0f}, {100 * high:.0f}]" if np.isfinite([low, high]).all() and low < high else ""
    )
    return f"{100 * share(found, name, of):.0f}%{interval}"


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
        "--builds", type=int, nargs="+", default=[48, 96, 192], help="models built on an unseen checkpoint"
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
search's gain over the best rule; in the column of the mean gain the 95% bootstrap interval over the checkpoints, which
are few (none where the search gains nothing in some resamples). "Evaluations" are plans scored on the validation split
of the checkpoint. "Builds" (the number in brackets; plans that are evaluated afterwards are built as well) are models
cut and recovered on the checkpoint whose logits were compared with the dense model's on unlabelled images of the
calibration and the train split: searches in all but name, which cost a build each and read no label and no validation
image (an evaluation costs a build as well). "Best rule" is the best of all rules on validation, with hindsight; "widths
copied" are those that the search found on the first model seed, "widths averaged" the mean of the logarithms of the
best plans' keep ratios.

A policy of several checkpoints has been taught what their best plans have in common
(`rlprune/agents/ppo/behaviour_cloning.py`): "network alone" is what it answers then, without a build. Its builds start
from that plan, the uniform one and the checkpoints' best plans, and a Gaussian process of the logits says what to build
next (`rlprune/surrogates/logit_gp.py`). "No policy, same process" does that from the rules' plans, "no policy, local
search" changes the best plans so far at random. What the policy itself adds is the difference to these.

Every budget has two tables. The first is of the validation split: the full search chooses among 300 plans by it, the
refined policies among 20 by it and the unlabelled images together, the others do not read it: it flatters who has seen
more of it. The second reports the same plans on the test split, which none of them has read.

{parts}"""

if __name__ == "__main__":
    sys.exit(main())
