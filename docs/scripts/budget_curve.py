"""One policy over a range of budgets, compared with rules and separate searches -> docs/budget-curve.md and .png.

    python docs/scripts/budget_curve.py [--config digits] [--evaluations 600] [--separate 300] [--seeds 0]

A single search over the range trains one policy; the policy is then applied without any search at each budget,
those that the search visited and those in between. Next to it: every rule, and at each visited budget a search
of its own. Finished searches are kept in --out, so that a stopped run goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import rlprune
from rlprune import Config, load_config
from rlprune.agents import save_policy
from rlprune.envs import KNOTS
from rlprune.evaluation import EvaluationLog
from rlprune.experiments import Experiment, prepare_experiment, run_agent
from rlprune.report import SCORE_UNITS, markdown_table, plots
from rlprune.rules import rules_for

DOCS = Path(__file__).resolve().parents[1]
BETWEEN = 3


def searched(config: Config, out: Path) -> dict[str, Any]:
    """A search of its own or over a range; its policy is saved in `out`, what was found is returned."""
    record = out / "found.json"
    if not record.exists():
        out.mkdir(parents=True, exist_ok=True)
        started = time.perf_counter()
        found = run_agent(
            "ppo",
            [prepare_experiment(config)],
            EvaluationLog(out / "ledger.jsonl"),
            seed=config.seed,
            state=out / "state",
        )
        save_policy(found.policy, out / "policy")
        content = {
            "score": found.best.score,
            "spent": found.account.spent,
            "seconds": time.perf_counter() - started,
        }
        record.write_text(json.dumps(content), encoding="utf-8")
    return dict(json.loads(record.read_text(encoding="utf-8")))


def points_of(experiment: Experiment, policy: Any, budgets: list[float]) -> list[dict[str, Any]]:
    """Scores of every rule without probes and of the policy at each budget."""
    names = [name for name, rule in rules_for(experiment.space).items() if not rule.probes]
    rows: list[dict[str, Any]] = []
    for budget in budgets:
        plans = {(name, "rule"): experiment.rule_widths(name, budget=budget) for name in names}
        plans["policy", "agent"] = policy.plan(experiment.evaluator, budget, experiment.metric).widths
        for (name, kind), widths in plans.items():
            score = experiment.evaluator.evaluate(widths).score
            rows.append({"budget": budget, "method": name, "kind": kind, "score": score})
    return rows


def study(arguments: argparse.Namespace, seed: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """All points of one seed, and what the search over the range has spent."""
    low, high = arguments.range
    base = [f"seed={seed}", "threads=1", f"budget.target={(low + high) / 2}"]
    ranged = load_config(
        arguments.config,
        [*base, f"search.budget_range=[{low},{high}]", f"search.evaluations={arguments.evaluations}"],
    )
    out = arguments.out / f"{arguments.config}-{seed}"
    spent = searched(ranged, out / f"range-{arguments.evaluations}")
    policy = rlprune.load_policy(out / f"range-{arguments.evaluations}" / "policy")
    experiment = prepare_experiment(ranged)
    visited = [round(float(b), 6) for b in np.linspace(low, high, KNOTS)]
    budgets = [round(float(b), 6) for b in np.linspace(low, high, (KNOTS - 1) * BETWEEN + 1)]
    points = points_of(experiment, policy, budgets)
    for budget in visited:
        config = load_config(
            arguments.config,
            [
                f"seed={seed}",
                "threads=1",
                f"budget.target={budget}",
                f"search.evaluations={arguments.separate}",
            ],
        )
        own = searched(config, out / f"separate-{budget:g}-{arguments.separate}")
        points.append({"budget": budget, "method": "a search of its own", "score": own["score"]})
    return points, spent


def table(points: list[dict[str, Any]]) -> str:
    """One line a budget: best rule, policy, separate search and the policy's share of the gain."""
    lines = []
    for budget in sorted({p["budget"] for p in points}, reverse=True):
        here = {p["method"]: p for p in points if p["budget"] == budget}
        rule = max((p for p in here.values() if p.get("kind") == "rule"), key=lambda p: p["score"])
        policy, own = here["policy"]["score"], here.get("a search of its own")
        gain = own["score"] - rule["score"] if own else float("nan")
        share = f"{100 * (policy - rule['score']) / gain:.0f}%" if gain > 0 else "–"
        lines.append(
            [
                f"{100 * budget:.0f}%",
                f"{rule['score']:.4f} ({rule['method']})",
                f"{policy:.4f}",
                f"{own['score']:.4f}" if own else "not searched",
                share,
            ]
        )
    return markdown_table(
        ["budget", "best rule", "policy", "a search of its own", "policy's share of its gain"], lines
    )


def together(every: list[list[dict[str, Any]]]) -> str:
    """The same table of the means over several seeds, for the budgets at which all of them searched."""
    means: dict[tuple[float, str], dict[str, Any]] = {}
    for key in {(p["budget"], p["method"]) for points in every for p in points}:
        same = [p for points in every for p in points if (p["budget"], p["method"]) == key]
        if len(same) == len(every):
            means[key] = same[0] | {"score": float(np.mean([p["score"] for p in same]))}
    searched = {budget for budget, method in means if method == "a search of its own"}
    return table([point for (budget, _), point in means.items() if budget in searched])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", default="digits")
    parser.add_argument("--range", nargs=2, type=float, default=[0.2, 0.8], metavar=("LOW", "HIGH"))
    parser.add_argument("--evaluations", type=int, default=600, help="of the search over the range")
    parser.add_argument("--separate", type=int, default=300, help="of each search at a single budget")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--out", type=Path, default=Path("runs/budget-curve"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = {seed: study(arguments, seed) for seed in arguments.seeds}
    parts = [
        f"## Search seed {seed}\n\n{table(points)}\n\nEvaluations spent: {spent['spent']} by the search over the "
        f"range ({spent['seconds'] / 60:.0f} minutes), {arguments.separate} by each of the {KNOTS} separate ones.\n"
        for seed, (points, spent) in found.items()
    ]
    if len(found) > 1:
        means = together([points for points, _ in found.values()])
        parts.insert(0, f"## Means over {len(found)} seeds\n\n{means}\n")
    every = [point for points, _ in found.values() for point in points]
    plots.to_png(plots.quality(every, "macs", SCORE_UNITS["kl"]), DOCS / "budget-curve.png")
    command = (
        f"--config {arguments.config} --evaluations {arguments.evaluations} --separate {arguments.separate}"
    )
    text = PAGE.format(
        command=f"{command} --seeds {' '.join(map(str, arguments.seeds))}",
        low=100 * arguments.range[0], high=100 * arguments.range[1], anchor_budgets=KNOTS,
        parts="\n".join(parts), torch=torch.__version__,
    )  # fmt: skip
    (DOCS / "budget-curve.md").write_text(text, encoding="utf-8")
    return 0


PAGE = """# Quality against budget: one policy from {high:.0f}% to {low:.0f}% of the MACs

Written by `python docs/scripts/budget_curve.py {command}`
(torch {torch}, CPU, 1 thread; finished searches are reused).

![Score against budget: the policy, every rule, and separate searches](budget-curve.png)

One search over the whole range trains one policy; here it is applied without any search. The search visits
{anchor_budgets} budgets in turn, all with one surrogate, and at the end teaches the policy the best plan of each;
at the budgets in between the policy interpolates. Scores are −KL to the dense model (nats, higher is better)
on the validation split; the best rule is the best of all rules without probes at that budget, with hindsight.
The last column is (policy − best rule) / (a search of its own − best rule).

`rlprune train digits --set search.budget_range=[0.2,0.8] search.evaluations=1500` trains such a policy and puts
its curve first in report.html; `rlprune apply RUN digits --budget 42%` uses it.

{parts}"""

if __name__ == "__main__":
    sys.exit(main())
