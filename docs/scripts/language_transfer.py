"""A policy learned on a shallow language model, applied to a deeper one -> docs/language-transfer.md.

    python docs/scripts/language_transfer.py [--depths 6 10] [--seeds 0 1 2] [--evaluations 120]

PPO searches on a tiny Llama of the first depth; what it has learned is applied without any search to one of the
second depth, which was trained apart from it with another seed, compared with the rules and full searches there. Scores
are -KL to the deep model's own dense outputs on its validation split, all under one recovery; perplexities are
those of its test split. Finished parts are kept in --out, so that a stopped run goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import rlprune
from rlprune import Config, load_config
from rlprune.agents import PolicyTransferWarning, save_policy
from rlprune.evaluation import EvaluationLog
from rlprune.experiments import Experiment, prepare_experiment, run_agent
from rlprune.report import markdown_table
from rlprune.rules import RULES, rules_for
from rlprune.utils import hardware, write_json_atomic, write_text_atomic

DOCS = Path(__file__).resolve().parents[1]
SHOWN = ("uniform", "ffn_uniform", "flap", "fisher")
# Of the dense training: of the model that is searched, and of the one that is met later.
MODEL_SEEDS = (0, 101)

Facts = dict[str, Any]


class Kept:
    """Results by name in one folder; what is there is not measured again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def __call__(self, name: str, make: Callable[[], Facts]) -> Facts:
        path = self.folder / f"{name}.json"
        if not path.exists():
            started = time.perf_counter()
            facts = make()
            write_json_atomic(path, {**facts, "seconds": time.perf_counter() - started})
        found: Facts = json.loads(path.read_text(encoding="utf-8"))
        shown = {key: value for key, value in found.items() if key not in ("widths", "protocol")}
        print(f"{name}: {shown}", flush=True)
        return found


def searched(experiment: Experiment, seed: int, folder: Path) -> Facts:
    """A full search on a model; its policy is saved in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    ledger = EvaluationLog(folder / "ledger.jsonl")
    found = run_agent("ppo", [experiment], ledger, seed=seed, state=folder / "state")
    save_policy(found.policy, folder / "policy")
    widths = [int(w) for w in found.history[-1]]
    return {"evaluations": found.account.spent, **judged(experiment, widths)}


def judged(experiment: Experiment, widths: Sequence[int] | Any) -> Facts:
    """Score on the validation split, perplexity on the test split, and what is left of the blocks."""
    candidate = experiment.evaluator.evaluate(widths)
    slim = experiment.evaluator.build(widths)
    with experiment.workload.test_opened():
        quality = experiment.workload.evaluate(slim, "test")
    return {
        "widths": [int(w) for w in widths],
        "score": candidate.score,
        "error": candidate.error,
        "test": quality.metric,
        "share": candidate.cost / experiment.space.dense_cost(experiment.metric),
    }


def dense(experiment: Experiment) -> Facts:
    """What the dense model is and can do."""
    workload, space = experiment.workload, experiment.space
    with workload.test_opened():
        quality = workload.evaluate(workload.model, "test")
    return {
        "test": quality.metric,
        "params": space.dense_cost("params"),
        "cost": space.dense_cost(experiment.metric),
        "groups": len(space.groups),
        "protocol": workload.protocol()["splits"],
    }


def applied(experiment: Experiment, folder: Path) -> Facts:
    """The plan of a saved policy: one forward pass of it; only a base rule that probes scores candidates."""
    policy = rlprune.load_policy(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PolicyTransferWarning)  # the other depth is what is asked about
        plan = policy.plan(experiment.evaluator, experiment.budget, experiment.metric)
    base = str(policy.meta["base_rule"])
    probes = RULES[base].probe_count(experiment.space)
    return {"base rule": base, "evaluations": probes, **judged(experiment, plan.widths)}


def study(config: Config, depths: Sequence[int], seeds: Sequence[int], kept: Kept) -> dict[str, Any]:
    """Everything that the page says: facts by part."""
    source, target = (_lazily(config, depth, seed) for depth, seed in zip(depths, MODEL_SEEDS, strict=True))
    found: dict[str, Any] = {
        "dense": [kept(f"dense-{i}", lambda p=p: dense(p())) for i, p in enumerate((source, target))],
        "learned": [
            kept(f"learned-{s}", lambda s=s: searched(source(), s, kept.folder / f"source-{s}"))
            for s in seeds
        ],
        "policy": [
            kept(f"policy-{s}", lambda s=s: applied(target(), kept.folder / f"source-{s}" / "policy"))
            for s in seeds
        ],
        "rules": kept("rules", lambda: {n: _by_rule(target(), n) for n in rules_for(target().space)}),
        "full": [
            kept(f"full-{s}", lambda s=s: searched(target(), s, kept.folder / f"target-{s}")) for s in seeds
        ],
    }
    found["rules"].pop("seconds", None)
    return found


def _lazily(config: Config, depth: int, seed: int) -> Callable[[], Experiment]:
    """The problem of a depth and a training seed, prepared when it is asked for first."""
    held: list[Experiment] = []

    def get() -> Experiment:
        if not held:
            held.append(
                prepare_experiment(config.override([f"model.arguments.layers={depth}", f"model.seed={seed}"]))
            )
        return held[0]

    return get


def _by_rule(experiment: Experiment, name: str) -> Facts:
    asked: list[Any] = []

    def evaluate(widths: Any) -> Any:
        asked.append(tuple(int(w) for w in widths))
        return experiment.evaluator.evaluate(widths)

    widths = experiment.rule_widths(name, evaluate)
    return {"evaluations": len(set(asked)), **judged(experiment, widths)}


def table(found: dict[str, Any]) -> str:
    """One line a way to prune the deep model: the rules that are shown, the policy, the search."""
    rules = found["rules"]
    best = max(rules, key=lambda n: rules[n]["score"])
    bases = sorted({p["base rule"] for p in found["policy"]})
    lines = [["dense", "0", "0", f"{found['dense'][1]['test']:.2f}"]]
    for name in dict.fromkeys((*SHOWN, *bases, best)):
        notes = ["base of the policy"] * (name in bases) + ["best rule"] * (name == best)
        lines.append(_line(name + (f" ({', '.join(notes)})" if notes else ""), [rules[name]]))
    lines.append(_line("policy, no search", found["policy"]))
    lines.append(_line("full search", found["full"]))
    return markdown_table(["on the deep model", "evaluations there", "score", "test perplexity"], lines)


def _line(label: str, results: Sequence[Facts]) -> list[str]:
    return [
        label,
        "/".join(sorted({str(r["evaluations"]) for r in results})),
        _spread([r["score"] for r in results], 4),
        _spread([r["test"] for r in results], 2),
    ]


def _spread(values: Sequence[float], digits: int) -> str:
    """Mean, and in brackets the lowest and the highest of the seeds."""
    text = f"{np.mean(values):.{digits}f}"
    return text if len(values) == 1 else f"{text} [{min(values):.{digits}f}, {max(values):.{digits}f}]"


def verdict(found: dict[str, Any]) -> str:
    """On how many seeds the policy is ahead of what, by score and by test perplexity, whatever came out."""
    policies, rules = found["policy"], found["rules"]
    best = max(rules, key=lambda n: rules[n]["score"])
    lines = []
    for name in dict.fromkeys(("uniform", "flap", *sorted({p["base rule"] for p in policies}), best)):
        score = sum(p["score"] > rules[name]["score"] for p in policies)
        test = sum(p["test"] < rules[name]["test"] for p in policies)
        label = name + (" (the best rule, with hindsight)" if name == best else "")
        lines.append(
            f"- against {label}: ahead by score on {score} of {len(policies)} seeds, "
            f"by test perplexity on {test} of {len(policies)}"
        )
    return "\n".join(lines)


def page(arguments: argparse.Namespace, found: dict[str, Any]) -> str:
    """The text of the document."""
    shallow, deep = found["dense"]
    facts = hardware()
    test, validation = deep["protocol"]["test"], deep["protocol"]["validation"]
    learned = ", ".join(f"{f['score']:.4f}" for f in found["learned"])
    parts = [*found["learned"], *found["policy"], *found["full"]]
    seeds = " ".join(map(str, arguments.seeds))
    command = (
        f"--config {arguments.config} --depths {arguments.depths[0]} {arguments.depths[1]} --seeds {seeds}"
    )
    command += f" --evaluations {arguments.evaluations} --budget {arguments.budget}"
    return PAGE.format(
        command=command + (f" --set {' '.join(arguments.set)}" if arguments.set else ""),
        torch=facts["libraries"].get("torch", "?"),
        processor=facts["processor"],
        threads=facts["threads"],
        seconds=sum(part["seconds"] for part in parts),
        first=arguments.depths[0],
        second=arguments.depths[1],
        model_seeds=MODEL_SEEDS,
        sizes=(f"{shallow['params']:,.0f}", f"{deep['params']:,.0f}"),
        groups=(shallow["groups"], deep["groups"]),
        tests=(f"{shallow['test']:.2f}", f"{deep['test']:.2f}"),
        budget=f"{100 * float(arguments.budget):.0f}%",
        evaluations=arguments.evaluations,
        seeds=", ".join(map(str, arguments.seeds)),
        learned=learned,
        validation=f"{validation['sequences']} sequences of {validation['length']} tokens",
        test=f"{test['sequences']} sequences of {test['length']} tokens, {test['tokens']} of them scored",
        error=f"{np.mean([p['error'] for p in found['policy']]):.4f}",
        table=table(found),
        verdict=verdict(found),
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", default="tiny_llama")
    parser.add_argument("--depths", type=int, nargs=2, default=[6, 10])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--evaluations", type=int, default=120)
    parser.add_argument("--budget", default="0.5")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="further settings")
    parser.add_argument("--out", type=Path, default=Path("runs/language-transfer"))
    parser.add_argument("--doc", type=Path, default=DOCS / "language-transfer.md")
    arguments = parser.parse_args()
    overrides = [f"budget.target={arguments.budget}", f"search.evaluations={arguments.evaluations}"]
    config = load_config(arguments.config, [*overrides, *arguments.set])
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    # Results of other settings lie next to these, and are not taken for them.
    mark = zlib.crc32(json.dumps([config.to_dict(), arguments.depths], sort_keys=True).encode())
    found = study(config, arguments.depths, arguments.seeds, Kept(arguments.out / f"{mark:08x}"))
    write_text_atomic(arguments.doc, page(arguments, found))
    print(table(found), verdict(found), sep="\n\n")
    return 0


PAGE = """# A policy of one depth on a language model of another

Written by `python docs/scripts/language_transfer.py {command}`
(torch {torch}, {processor}, {threads} thread(s); searches and policies took {seconds:.0f} s together).

Two tiny Llamas, trained on the spot on Python's help texts with seeds {model_seeds[0]} and {model_seeds[1]}:
{first} blocks ({sizes[0]} parameters, {groups[0]} groups, dense test perplexity {tests[0]}) and {second} blocks
({sizes[1]} parameters, {groups[1]} groups, {tests[1]}). PPO searched on the first at {budget} of the parameters in
the blocks ({evaluations} evaluations; search seeds {seeds}; scores there: {learned}).
Its policy was then applied to the second: one forward pass of the policy, nothing searched, nothing trained.
"full search" is the same PPO from scratch on the deep model. All plans have the same ranking of units and the
same closed-form recovery, and no gradient step follows.

Scores are −KL to the deep model's own dense outputs (nats a token, higher is better) on the validation split
({validation}; the standard error of one score is {error}); perplexity is that of the test split ({test}).
Brackets: lowest and highest of the search seeds.

{table}

The policy without search:

{verdict}

One source model and one deep model; the seeds are those of the search alone.
"""

if __name__ == "__main__":
    sys.exit(main())
