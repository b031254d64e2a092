"""A learned policy on checkpoints that it has never seen -> docs/transfer.md.

    python docs/scripts/transfer.py [--config digits] [--budgets 0.5 0.3] [--evaluations 300]

Policies are trained on a single checkpoint and on several (other training seeds of the same model). A policy of
several brings what was scored on them along (`agents/experience.py`). Each is applied without any search to
checkpoints of yet other seeds, beside uniform, the best rule, the best widths of the first checkpoint copied and
those of all averaged, and a full search on the checkpoint itself; with `--refine` evaluations as well.
Every score is -KL to the checkpoint's own dense model on its validation split, under the same recovery.
Finished parts are kept in --out, so that a stopped run goes on where it was.
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
from rlprune.agents.policy import PortablePolicy, save_policy
from rlprune.config import Config, load_config
from rlprune.deploy import refined
from rlprune.ledger import Ledger
from rlprune.problem import Problem, prepare, search
from rlprune.progress import Console
from rlprune.report import markdown_table

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


def scores_on(
    target: Problem, single: Any, several: Any, plans: dict[str, Any], full: float, refine: int
) -> dict[str, float]:
    """Score of every way to prune an unseen checkpoint; only the last two spend evaluations on it."""
    judge = target.evaluator
    rules = {name: judge.evaluate(target.rule_widths(name)).score for name in target.start_rules()}
    best = max(rules, key=rules.__getitem__)
    rows = {"uniform": rules["uniform"], "best rule": rules[best]}
    network = PortablePolicy(several.network, several.meta)
    count = len(TRAINED)
    plans = plans | {
        "policy, 1 checkpoint": single.plan(judge, target.budget).widths,
        f"policy, {count} checkpoints, network alone": network.plan(judge, target.budget).widths,
        f"policy, {count} checkpoints": several.plan(judge, target.budget).widths,
    }
    rows |= {label: judge.evaluate(widths).score for label, widths in plans.items()}
    found = refined(target, several, refine, Ledger(), Console(False))
    assert found.account.spent <= refine
    return rows | {
        f"policy, {count} checkpoints, and {refine} evaluations": found.best.score,
        "full search": full,
    }


def study(config: Config, out: Path, refine: int) -> dict[int, dict[str, float]]:
    """Scores on every unseen checkpoint: {model seed: {way: score}}."""
    problems = [problem(config, seed) for seed in TRAINED]
    single = trained(config, problems[:1], out / "trained-1")
    folder = out / f"trained-{len(TRAINED)}"
    trained(config, problems, folder)
    plans = {
        "widths copied": single["widths"],
        "widths averaged": averaged(problems, Ledger(folder / "ledger.jsonl")),
    }
    policies = [rlprune.load_policy(f / "policy") for f in (out / "trained-1", folder)]
    result = {}
    for seed in UNSEEN:
        target = problem(config, seed)
        full = trained(config, [target], out / f"full-{seed}")["score"]
        result[seed] = scores_on(target, *policies, plans, full, refine)
        print(seed, {way: round(score, 4) for way, score in result[seed].items()}, flush=True)
    return result


def table(result: dict[int, dict[str, float]]) -> str:
    """One line a way: the score on each checkpoint, and the share of the full search's gain over the best rule."""
    ways = list(next(iter(result.values())))
    lines = []
    for way in ways:
        shares = [share(scores, way) for scores in result.values()]
        mean = f"{100 * np.mean(shares):.0f}%" if np.isfinite(shares).all() else "–"
        cells = [
            f"{scores[way]:.4f}" + (f" ({100 * x:.0f}%)" if np.isfinite(x) else "")
            for scores, x in zip(result.values(), shares, strict=True)
        ]
        lines.append([way, *cells, mean])
    return markdown_table(["", *[f"model seed {seed}" for seed in result], "mean share"], lines)


def share(scores: dict[str, float], way: str) -> float:
    """(way - best rule) / (full search - best rule); NaN where the search has gained nothing."""
    gain = scores["full search"] - scores["best rule"]
    return (scores[way] - scores["best rule"]) / gain if gain > 0 else float("nan")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", default="digits")
    parser.add_argument("--budgets", nargs="+", default=["0.5", "0.3"])
    parser.add_argument("--evaluations", type=int, default=300, help="per checkpoint")
    parser.add_argument("--refine", type=int, default=20, help="evaluations on an unseen checkpoint")
    parser.add_argument("--out", type=Path, default=Path("runs/transfer"))
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    started = time.perf_counter()
    parts = []
    for budget in arguments.budgets:
        overrides = [f"budget.target={budget}", f"search.evaluations={arguments.evaluations}"]
        config = load_config(arguments.config, overrides)
        out = arguments.out / f"{arguments.config}-{budget}-{arguments.evaluations}"
        result = study(config, out, arguments.refine)
        parts.append(f"## {100 * float(budget):.0f}% of the MACs\n\n{table(result)}\n")
        print(parts[-1], flush=True)
    text = PAGE.format(
        config=arguments.config, budgets=" ".join(arguments.budgets), evaluations=arguments.evaluations,
        trained=", ".join(map(str, TRAINED)), unseen=", ".join(map(str, UNSEEN)), parts="\n".join(parts),
        threads=arguments.threads, minutes=(time.perf_counter() - started) / 60, torch=torch.__version__,
    )  # fmt: skip
    (DOCS / "transfer.md").write_text(text, encoding="utf-8")
    return 0


PAGE = """# A policy on checkpoints it has not seen

Written by `python docs/scripts/transfer.py --config {config} --budgets {budgets} --evaluations {evaluations}`
(torch {torch}, CPU, {threads} thread(s); the last call took {minutes:.0f} minutes, finished parts are reused).

Policies trained on model seeds {trained} (the first of them alone, and all of them, with {evaluations}
evaluations on each) and applied to model seeds {unseen}: dense models of the same settings, trained with other
seeds. Scores are −KL to the checkpoint's own dense model (nats, higher is better); in brackets the share of the
full search's gain over the best rule. Only the last two rows spent evaluations on the checkpoint ("full search":
{evaluations}). "Best rule" is the best of all rules there, with hindsight; "widths copied" are those that the search
found on the first model seed, "widths averaged" the mean of the logarithms of the best plans' keep ratios.
A policy of several checkpoints takes the plan that its experience expects most of: a Gaussian process over all
plans that were scored in its training, and on the new checkpoint the changes of the logits when each group alone is
cut to eight widths (calibration images only; no plan is scored). "Network alone" leaves that out.

{parts}"""

if __name__ == "__main__":
    sys.exit(main())
