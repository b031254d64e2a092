"""A learned policy on checkpoints that it has never seen -> docs/transfer.md.

    python docs/scripts/transfer.py [--config digits] [--budgets 0.5 0.3] [--evaluations 300]

Policies are trained on a single checkpoint, on several (other training seeds of the same model), and on
several with the rule `sensitivity` as the base of their actions (it probes each checkpoint: 2 G + 1
evaluations, G groups). Each is applied without any search to checkpoints of yet other seeds, beside uniform,
the best rule, the first checkpoint's best widths simply copied, and a full search on the checkpoint itself.
Every score is -KL to the checkpoint's own dense model on its validation split, under the same recovery.
Finished parts are kept in --out, so that a stopped run goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import rlprune
from rlprune.agents.policy import save_policy
from rlprune.config import Config, load_config
from rlprune.ledger import Ledger
from rlprune.problem import Problem, prepare, search
from rlprune.report import markdown_table
from rlprune.rules import RULES

DOCS = Path(__file__).resolve().parents[1]
TRAINED, UNSEEN = (0, 1, 2, 3), (101, 102, 103)


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


def scores_on(target: Problem, policies: dict[str, Any], copied: list[int], full: float) -> dict[str, float]:
    """Score of every way to prune an unseen checkpoint; only the full search has spent evaluations on it."""
    judge = target.evaluator
    rules = {name: judge.evaluate(target.rule_widths(name)).score for name in RULES}
    best = max(rules, key=rules.__getitem__)
    rows = {
        "uniform": rules["uniform"],
        "sensitivity": rules["sensitivity"],
        "best rule": rules[best],
        "widths copied": judge.evaluate(copied).score,
    }
    for label, policy in policies.items():
        rows[label] = judge.evaluate(policy.plan(judge, target.budget).widths).score
    return rows | {"full search": full}


def study(config: Config, out: Path) -> dict[int, dict[str, float]]:
    """Scores on every unseen checkpoint: {model seed: {way: score}}."""
    problems = [problem(config, seed) for seed in TRAINED]
    single = trained(config, problems[:1], out / "trained-1")
    trained(config, problems, out / f"trained-{len(TRAINED)}")
    probing = config.override(["search.base_rule=sensitivity"])
    probed = [replace(p, config=probing) for p in problems]
    trained(probing, probed, out / f"trained-{len(TRAINED)}-sensitivity")
    policies = {
        "policy, 1 checkpoint": rlprune.load_policy(out / "trained-1" / "policy"),
        f"policy, {len(TRAINED)} checkpoints": rlprune.load_policy(
            out / f"trained-{len(TRAINED)}" / "policy"
        ),
        f"policy, {len(TRAINED)} checkpoints, base sensitivity": rlprune.load_policy(
            out / f"trained-{len(TRAINED)}-sensitivity" / "policy"
        ),
    }
    result = {}
    for seed in UNSEEN:
        target = problem(config, seed)
        full = trained(config, [target], out / f"full-{seed}")["score"]
        result[seed] = scores_on(target, policies, single["widths"], full)
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
    parser.add_argument("--out", type=Path, default=Path("runs/transfer"))
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    started = time.perf_counter()
    parts = []
    for budget in arguments.budgets:
        overrides = [f"budget.target={budget}", f"search.evaluations={arguments.evaluations}"]
        config = load_config(arguments.config, overrides)
        result = study(config, arguments.out / f"{arguments.config}-{budget}-{arguments.evaluations}")
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
full search's gain over the best rule. Only "full search" searched on the checkpoint ({evaluations} evaluations);
"sensitivity" and the policy on top of it spent 2 G + 1 = 25 probes there, the others nothing;
"best rule" is the best of all rules there, with hindsight; "widths copied" are those that the search found on
model seed 0.

{parts}"""

if __name__ == "__main__":
    sys.exit(main())
