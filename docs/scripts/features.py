"""What a policy has to see of a checkpoint to answer for it without a build -> docs/features.md.

    python docs/scripts/features.py [--config digits] [--budgets 0.5 0.3] [--networks 2]

Reads what docs/scripts/transfer.py has searched on its eight training checkpoints (--runs). Each of them is left out in
turn: a network is taught the best plans of the other seven (`rlprune/agents/ppo/behaviour_cloning.py`) with some
columns of the observation (`rlprune/envs/observation.py`) hidden or filled with probes, and answers for the one that
was left out. Scores are -KL on that checkpoint's validation split, by which its own search has chosen, too. The unseen
checkpoints of docs/transfer.md and every test split stay untouched. Finished parts are kept in --out.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rlprune import load_config
from rlprune.agents import COMMON_PLANS, GroupPolicy, PortablePolicy, clone_behaviour
from rlprune.benchmarks import bootstrap
from rlprune.envs import BOUND, FEATURE_VERSIONS, KINDS, DistributionEnv, Task, deviate
from rlprune.evaluation import EvaluationLog
from rlprune.experiments import Experiment, prepare_experiment
from rlprune.report import markdown_table
from rlprune.utils import hardware, read_json, write_json_atomic

DOCS = Path(__file__).resolve().parents[1]
TRAINED = tuple(range(8))
FEATURES = FEATURE_VERSIONS[1]
IMPORTANCES = tuple(name for name in FEATURES if "importance" in name)
COSTS = ("cost_share", "log_unit_cost", "log_importance_per_cost")
SHAPE = (
    *(f"kind_{kind}" for kind in KINDS[1]),
    "kind_other",
    "log_width",
    "kernel",
    "stride",
    "log_members",
    "minimum",
)
PROBED = ("sensitivity_1", "sensitivity_2")
SHOWN_ALWAYS = ("mask", "depth", "budget")


@dataclass(frozen=True)
class View:
    """What a network sees: the columns that are hidden, and which probes (2 a group, evaluated) fill two more."""

    about: str
    hidden: tuple[str, ...] = ()
    probes: str = ""


VIEWS = {
    "as shipped": View("every column; no probes"),
    "no importances": View("nothing of the units' importances", IMPORTANCES),
    "no costs": View("neither a group's share of the cost nor a unit's", COSTS),
    "no shape": View("neither kind, width, kernel, stride nor members", SHAPE),
    "no plan of the base rule": View("not what the base rule would do", ("base", "base_kept")),
    "depth alone": View(
        "where the group is, and nothing else", tuple(name for name in FEATURES if name not in SHOWN_ALWAYS)
    ),
    "probes around the dense model": View("each group alone cut to a half and to a fifth", (), "dense"),
    "probes around the base plan": View(
        "each group of the base rule's plan given up more and less of, the others making up for it",
        (),
        "base",
    ),
}


@dataclass(frozen=True)
class Viewed(Task):
    """A task whose observation is a view's."""

    view: View = VIEWS["as shipped"]

    def observe(self, budget: Any, widths: Any = None) -> NDArray[np.float32]:
        table = super().observe(budget, widths)
        if self.view.probes == "base":
            table[:, [FEATURES.index(name) for name in PROBED]] = self._cached(
                ("probes", budget), lambda: self._around_base(budget)
            )
        table[:, [FEATURES.index(name) for name in self.view.hidden]] = 0.0
        return table

    def _around_base(self, budget: Any) -> Any:
        """Change of the score (G, 2), in units of the base plan's distance to the dense model."""
        base = self.base(budget)
        start = self.evaluate([self.widths(np.zeros(len(base)), budget)]).score
        found = np.zeros((len(base), 2))
        for group in range(len(base)):
            for column, action in enumerate((0.5, -0.5)):
                actions = np.zeros(len(base))
                actions[group] = action
                plan = self.space.project(deviate(base, actions), budget, self.metric)
                found[group, column] = self.evaluate([plan]).score - start
        return np.clip(found / max(self.evaluator.dense.score - start, 1e-9), -BOUND, BOUND)


def best_plans(experiment: Experiment, ledger: EvaluationLog) -> list[tuple[float, NDArray[np.int64]]]:
    """Scores and widths of the best plans within the budget that a search has scored, the best first."""
    rows = [row for row in ledger.rows if row["task"] == experiment.name and row["cost"] <= experiment.target]
    rows.sort(key=lambda row: -row["score"])
    return [(row["score"], np.array(row["widths"], dtype=np.int64)) for row in rows[:COMMON_PLANS]]


def answer(tasks: Sequence[Task], plans: Sequence[Any], left: Task, seed: int) -> NDArray[np.int64]:
    """Widths for ``left`` of a network that was taught the plans of ``tasks``."""
    torch.manual_seed(seed)
    env = DistributionEnv(tasks=list(tasks))
    policy = GroupPolicy(env.observation_space, env.action_space, lambda _: 1e-3, group_bias=False)
    wanted = [
        [(task.budget, widths.astype(np.float64), 1.0) for _, widths in found]
        for task, found in zip(tasks, plans, strict=True)
    ]
    clone_behaviour(policy, env, tasks, wanted, common=True)
    network = PortablePolicy(policy.network, {"reach": policy.reach, "base_rule": left.base_rule})
    return left.widths(network.action(left.observe(left.budget)), left.budget)


def measured(
    experiments: Sequence[Experiment], ledger: EvaluationLog, view: View, networks: int
) -> list[dict[str, float]]:
    """For every checkpoint left out: the scores of the network's answers (their mean), the best rule and the search."""
    sensitivity = (0.5, 0.8) if view.probes == "dense" else ()
    tasks = [
        Viewed(p.evaluator, p.budget, p.metric, sensitivity=sensitivity, name=p.name, view=view)
        for p in experiments
    ]
    plans = [best_plans(p, ledger) for p in experiments]
    found = []
    for out, experiment in enumerate(experiments):
        others = [i for i in range(len(experiments)) if i != out]
        answers = [
            answer([tasks[i] for i in others], [plans[i] for i in others], tasks[out], seed)
            for seed in range(networks)
        ]
        scores = [experiment.evaluator.evaluate(widths).score for widths in answers]
        rules = [
            experiment.evaluator.evaluate(experiment.rule_widths(name)).score
            for name in experiment.free_start_rules()
        ]
        found.append({"answer": float(np.mean(scores)), "rule": max(rules), "search": plans[out][0][0]})
    return found


def share(rows: Sequence[dict[str, float]]) -> float:
    """Mean (answer - best rule) / mean (search - best rule)."""
    gain = np.mean([row["search"] - row["rule"] for row in rows])
    return float(np.mean([row["answer"] - row["rule"] for row in rows]) / gain)


def searches(arguments: argparse.Namespace, budget: str) -> Path:
    """The folder of what `docs/scripts/transfer.py` has found on the eight checkpoints."""
    return arguments.runs / f"{arguments.config}-{budget}-{arguments.evaluations}" / f"trained-{len(TRAINED)}"


def study(arguments: argparse.Namespace, budget: str) -> dict[str, list[dict[str, float]]]:
    """Every view at one budget; finished ones are taken from the record."""
    config = load_config(arguments.config, [f"budget.target={budget}"])
    record = arguments.out / f"{arguments.config}-{budget}-{arguments.networks}.json"
    known: dict[str, Any] = read_json(record) if record.exists() else {}
    if set(VIEWS) <= set(known):
        return {name: known[name] for name in VIEWS}
    ledger = EvaluationLog(searches(arguments, budget) / "ledger.jsonl")
    experiments = [prepare_experiment(config, model_seed=seed, name=f"model seed {seed}") for seed in TRAINED]
    for name, view in VIEWS.items():
        if name not in known:
            known[name] = measured(experiments, ledger, view, arguments.networks)
            record.parent.mkdir(parents=True, exist_ok=True)
            write_json_atomic(record, known)
            print(f"{budget}: {name}: {100 * share(known[name]):.0f}%", flush=True)
    return {name: known[name] for name in VIEWS}


def table(found: dict[str, list[dict[str, float]]]) -> str:
    """One line a view: its share of the searches' mean gain, and on how many checkpoints it beats the best rule."""
    lines = []
    for name, rows in found.items():
        low, high = bootstrap(lambda drawn, rows=rows: share([rows[i] for i in drawn]), len(rows))
        ahead = sum(row["answer"] > row["rule"] for row in rows)
        interval = f"{100 * share(rows):.0f}% [{100 * low:.0f}, {100 * high:.0f}]"
        cost = "2 a group" if VIEWS[name].probes else "0"
        lines.append([name, VIEWS[name].about, cost, interval, f"{ahead} of {len(rows)}"])
    head = ["view", "", "evaluations", "share of the searches' mean gain", "ahead of the best rule"]
    return markdown_table(head, lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", default="digits")
    parser.add_argument("--budgets", nargs="+", default=["0.5", "0.3"])
    parser.add_argument("--evaluations", type=int, default=300, help="as docs/scripts/transfer.py was called")
    parser.add_argument("--networks", type=int, default=2, help="networks that are taught and averaged over")
    parser.add_argument("--runs", type=Path, default=Path("runs/transfer"))
    parser.add_argument("--out", type=Path, default=Path("runs/features"))
    parser.add_argument("--write", action="store_true", help="write the page from what is there")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    records = [searches(arguments, budget) / "found.json" for budget in arguments.budgets]
    if missing := [str(record) for record in records if not record.exists()]:
        raise SystemExit(f"{', '.join(missing)}: not there yet; docs/scripts/transfer.py searches first")
    asked = [read_json(record)["asked"] for record in records]
    parts = [f"## {float(b):.0%} of the MACs\n\n{table(study(arguments, b))}\n" for b in arguments.budgets]
    if arguments.write:
        text = PAGE.format(
            evaluations=" and ".join(sorted({str(a["evaluations"]) for a in asked})),
            config=arguments.config, budgets=" ".join(arguments.budgets), networks=arguments.networks,
            torch=torch.__version__, processor=hardware()["processor"], parts="\n".join(parts),
        )  # fmt: skip
        (DOCS / "features.md").write_text(text, encoding="utf-8")
    return 0


PAGE = """# What a policy has to see

Written by `python docs/scripts/features.py --config {config} --budgets {budgets} --networks {networks} --write`
(torch {torch}, {processor}, 1 thread), from searches of `docs/scripts/transfer.py` with {evaluations} evaluations on
each checkpoint.

Each of the eight training checkpoints of [transfer.md](transfer.md) is left out in turn: {networks} networks are taught
the best plans of the other seven and answer for it, without a build. What they see is changed one thing at a time. The
share is that of the gain over the best rule (with hindsight) that a search on the checkpoint reaches on its validation
split; in brackets the 95% bootstrap interval over the checkpoints. No test split was read.

{parts}"""

if __name__ == "__main__":
    sys.exit(main())
