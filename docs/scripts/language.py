"""Pruning a language model without a gradient step: published methods, allocations and searches, by perplexity.

    python docs/scripts/language.py --model FILE.gguf --valid wikitext2_valid.txt --test wikitext2_test.txt \
        --out runs/language search --budget 0.8 --seeds 0 1
    python docs/scripts/language.py ... table --budgets 0.9 0.8
    python docs/scripts/language.py ... tune --budget 0.8 --steps 40
    python docs/scripts/language.py ... write --doc docs/language-results.md

Every figure is kept in the --out folder, one file each, and not measured again: a stopped run goes on.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlprune.config import Config, RecoveryConfig, load_config
from rlprune.files import write_json_atomic, write_text_atomic
from rlprune.finish import choose
from rlprune.inspection import hardware
from rlprune.ledger import Ledger
from rlprune.problem import Problem, prepare, search
from rlprune.progress import Console
from rlprune.pruning.grams import Grams
from rlprune.pruning.grams import collect as collect_grams
from rlprune.pruning.importance import compute
from rlprune.pruning.plan import make_plan
from rlprune.pruning.recovery import Recovery
from rlprune.pruning.surgery import prune
from rlprune.pruning.tracing import trace
from rlprune.report import markdown_table
from rlprune.rules import Context, rules_for

Rows = list[dict[str, Any]]

# Method -> (importance, rule, its own compensation, whether whole parts may go).
PUBLISHED: dict[str, tuple[str, str, tuple[str, ...], bool]] = {
    "magnitude": ("l2", "uniform", ("none",), False),
    "Wanda-sp": ("wanda_sp", "ffn_uniform", ("none",), False),
    "FLAP": ("flap", "flap", ("bias",), False),
    "LLM-Pruner, all layers": ("taylor_param_first", "llm_pruner", ("none",), False),
    "LLM-Pruner, FFN": ("taylor_param_first", "llm_pruner_ffn", ("none",), False),
    "Adapt-Pruner": ("taylor_param_first", "adapt_pruner", ("none",), False),
    "SAAP-style": ("saap", "saap", ("none",), False),
    "ShortGPT": ("l2", "shortgpt", ("none",), True),
}


def settings(args: argparse.Namespace, budget: float) -> Config:
    overrides = [
        f"model.name=hf:{args.model}",
        f"data.files.calibration={args.valid}",
        f"data.files.test={args.test}",
        f"budget.target={budget}",
        "threads=1",
        *args.set,
    ]
    return load_config("smollm2_135m", overrides)


class Kept:
    """Results by key in one folder; what is there is not measured again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def __call__(self, key: str, make: Any) -> dict[str, Any]:
        path = self.folder / f"{key.replace(' ', '_').replace(',', '')}.json"
        if not path.exists():
            started = time.perf_counter()
            facts = make()
            facts = {"key": key, **facts, "seconds": time.perf_counter() - started, "hardware": hardware()}
            write_json_atomic(path, facts)
            print(
                f"{key}: { ({k: v for k, v in facts.items() if k not in ('hardware', 'widths')}) }",
                flush=True,
            )
        found: dict[str, Any] = json.loads(path.read_text())
        return found


def perplexity(problem: Problem, model: torch.nn.Module, split: str = "test") -> float:
    """Perplexity in bfloat16 (dense: within 0.05% of float32, at half the time)."""
    twin = model.to(torch.bfloat16)
    if split != "test":
        return problem.workload.evaluate(twin, split).metric
    with problem.workload.test_opened():
        return problem.workload.evaluate(twin, split).metric


def run_search(args: argparse.Namespace) -> None:
    kept = Kept(args.out)
    console = Console(False)
    problem = prepare(settings(args, args.budget), console=console)
    ledger = Ledger(args.out / f"ledger-{args.budget}.jsonl")
    for seed in args.seeds:
        for method in args.methods:

            def one(method: str = method, seed: int = seed) -> dict[str, Any]:
                found = search(method, [problem], ledger, seed=seed, state=args.out / f"state-{args.budget}")
                chosen = choose(problem, found)
                history = chosen.history[-1]
                curve = np.maximum.accumulate([c.score for c in found.account.history]).tolist()
                return {
                    "method": method,
                    "seed": seed,
                    "budget": args.budget,
                    "widths": [int(w) for w in history],
                    "evaluations": found.account.spent,
                    "score": problem.evaluator.evaluate(history).score,
                    "curve": curve,
                    "validation": problem.evaluator.evaluate_full(history).metric,
                    "test": perplexity(problem, problem.evaluator.build(history)),
                }

            kept(f"search {args.budget} {method} {seed}", one)


def run_table(args: argparse.Namespace) -> None:
    kept = Kept(args.out)
    config = settings(args, args.budgets[0])
    problem = prepare(config, console=Console(False))

    def dense(dtype: torch.dtype) -> dict[str, Any]:
        copy = prune(problem.workload.model, problem.evaluator.plan(problem.space.widths)).to(dtype)
        with problem.workload.test_opened():
            return {"test": problem.workload.evaluate(copy, "test").metric}

    kept("dense float32", lambda: dense(torch.float32))
    kept("dense bfloat16", lambda: dense(torch.bfloat16))
    for budget in args.budgets:
        at = replace(problem, config=problem.config.override([f"budget.target={budget}"]))
        for rule in rules_for(problem.space):
            if rule in ("sensitivity", *args.skip):
                continue
            kept(f"allocation {budget} {rule}", lambda at=at, rule=rule: allocation(at, rule))
    grams = collect_grams(problem.workload.model, problem.space, problem.workload.batches("calibration"))
    shared: dict[str, Any] = problem.evaluator.context(args.budgets[0]).shared
    importances: dict[str, Any] = {}
    for method, how in PUBLISHED.items():
        todo = [b for b in args.budgets if not (args.out / f"published_{b}_{_file(method)}.json").exists()]
        if not todo:
            continue
        if how[0] not in importances:
            measured = problem.evaluator.context(args.budgets[0]).statistics()
            importances[how[0]] = compute(how[0], problem.workload, problem.space, statistics=measured)
        importance = importances[how[0]]
        for budget in todo:
            kept(
                f"published {budget} {method}",
                lambda b=budget, h=how, i=importance: published(problem, b, h, i, grams, shared),
            )


def _file(method: str) -> str:
    return method.replace(" ", "_").replace(",", "")


def allocation(problem: Problem, rule: str) -> dict[str, Any]:
    """One rule's widths under our ranking and our closed form."""
    widths = problem.rule_widths(rule)
    candidate = problem.evaluator.evaluate(widths)
    return {
        "rule": rule,
        "budget": problem.config.budget.target,
        "widths": [int(w) for w in widths],
        "score": candidate.score,
        "test": perplexity(problem, problem.evaluator.build(widths)),
    }


def published(
    problem: Problem,
    budget: float,
    how: tuple[str, str, tuple[str, ...], bool],
    importance: Any,
    grams: Grams,
    shared: dict[str, Any],
) -> dict[str, Any]:
    """A method with its own ranking, allocation and compensation; then the same units with the closed form."""
    _, rule, steps, drop = how
    workload = problem.workload
    space = trace(workload.model, workload.example_inputs, drop=True) if drop else problem.space
    context = Context(
        space, workload.model, importance, budget, "params", workload, shared=shared if not drop else {}
    )
    widths = space.project(rules_for(space)[rule].function(context), budget, "params")
    plan = make_plan(space, importance=importance, widths=widths)
    facts: dict[str, Any] = {"budget": budget, "rule": rule, "widths": [int(w) for w in widths]}
    recovery = problem.config.recovery
    for name, own in (("test", RecoveryConfig(steps=steps)), ("ours", recovery)):
        slim = prune(workload.model, plan)
        copies = Grams({n: grams[n] for n in grams.names})
        Recovery(workload, space, own, importance=importance, grams=copies)(slim, plan)
        facts[name] = perplexity(problem, slim)
    return facts


def run_tune(args: argparse.Namespace) -> None:
    """An equal number of LoRA steps for dense, the best rule, random search and PPO; then zero-shot accuracy."""
    from rlprune import zeroshot
    from rlprune.finish import fine_tune

    kept = Kept(args.out)
    config = settings(args, args.budget).override(
        [f"finish.steps={args.steps}", "finish.method=lora", f"finish.batch_size={args.batch}"]
    )
    problem = prepare(config, console=Console(False))
    plans: dict[str, Any] = {"dense": problem.space.widths}
    for rule in args.rules:
        plans[rule] = problem.rule_widths(rule)
    for path in sorted(args.out.glob(f"search_{args.budget}_*_0.json")):
        found = json.loads(path.read_text())
        plans[found["method"]] = np.array(found["widths"])
    for name, widths in plans.items():

        def one(name: str = name, widths: Any = widths) -> dict[str, Any]:
            model = problem.evaluator.build(widths)
            before = perplexity(problem, copy.deepcopy(model))
            if name != "dense":
                fine_tune(problem, model, seed=0)
            after = perplexity(problem, model)
            rows = zeroshot.accuracy(model, problem.workload.tokenizer, args.tasks, limit=args.limit)
            return {
                "method": name,
                "budget": args.budget,
                "steps": args.steps,
                "batch": args.batch,
                "limit": args.limit,
                "before": before,
                "after": after,
                "tasks": [row if isinstance(row, dict) else vars(row) for row in rows],
            }

        kept(f"tuned {args.budget} {args.steps} {name}", one)


def run_write(args: argparse.Namespace) -> None:
    """docs/language-results.md and .json from what the --out folder holds."""
    found = [json.loads(path.read_text()) for path in sorted(args.out.glob("*.json"))]
    rows = [{k: v for k, v in row.items() if k not in ("hardware", "curve")} for row in found]
    machines = {row["hardware"]["processor"] for row in found}
    versions = found[0]["hardware"]["libraries"]
    lines = [
        "# Language models: perplexity after pruning, without a gradient step",
        "",
        "Written by `docs/scripts/language.py` (commands at its top; every figure beside it in "
        f"`{args.doc.with_suffix('.json').name}`). SmolLM2-135M-Instruct (Q4_1 GGUF, dequantised), WikiText-2. "
        "Calibration: 64 sequences of 128 tokens of the valid text, for every method alike; the search scores on "
        "16 other sequences of it, the final choice among 5 on 64; perplexity: the first 40 blocks of 256 tokens "
        "of the test text (10,200 scored tokens), in bfloat16. 10% and 20% are shares of all parameters, "
        "embeddings included. One calibration seed: gaps of a few percent are ties. "
        f"{', '.join(sorted(machines))}, 1 thread, torch {versions['torch']}.",
        "",
        *_dense_lines(found),
        "## Every method as published, and the same units with a closed form",
        "",
        *_published_lines(found, args.budgets),
        "## Every allocation under our ranking and our closed form",
        "",
        *_allocation_lines(found, args.budgets),
        *_tuned_lines(found),
    ]
    write_text_atomic(args.doc, "\n".join(lines) + "\n")
    write_json_atomic(args.doc.with_suffix(".json"), rows)
    print(f"written: {args.doc}")
    if args.readme:
        start, end = "<!-- language-results:start -->", "<!-- language-results:end -->"
        before, _, rest = args.readme.read_text(encoding="utf-8").partition(start)
        after = rest.partition(end)[2]
        body = "\n".join(_summary(found, args.budgets))
        write_text_atomic(args.readme, f"{before}{start}\n{body}\n{end}{after}")


def _summary(found: Rows, budgets: Sequence[float]) -> list[str]:
    """The README's table: the best of each kind, by test perplexity at each budget."""
    kinds = {
        "best method as published": ("published", lambda row: row["test"]),
        "uniform FFN widths, our closed form": ("allocation", lambda row: row["test"]),
        "best rule, our closed form": ("allocation", lambda row: row["test"]),
        "random search, our closed form": ("search", lambda row: row["test"]),
        "PPO, our closed form": ("search", lambda row: row["test"]),
    }
    lines = []
    for label, (kind, value) in kinds.items():
        cells = [label]
        for budget in budgets:
            own = [row for row in found if row["key"].startswith(f"{kind} {budget} ")]
            if "uniform" in label:
                own = [row for row in own if row["rule"] == "ffn_uniform"]
            elif kind == "search":
                own = [row for row in own if row["method"] == ("ppo" if "PPO" in label else "random")]
            best = min(own, key=value, default=None)
            name = "" if best is None or kind == "search" or "uniform" in label else f" ({_name(best)})"
            cells.append("-" if best is None else f"{value(best):.2f}{name}")
        lines.append(cells)
    dense = next(row["test"] for row in found if row["key"] == "dense float32")
    header = ["SmolLM2-135M, WikiText-2", *(f"{1 - b:.0%} of all parameters removed" for b in budgets)]
    text = f"Test perplexity without any gradient step (dense {dense:.2f}; one calibration seed, 150 evaluations):"
    return [
        text,
        "",
        markdown_table(header, lines),
        "",
        "More in [docs/language-results.md](docs/language-results.md).",
    ]


def _name(row: dict[str, Any]) -> str:
    return str(row["key"].split(" ", 2)[2])


def _dense_lines(found: Rows) -> list[str]:
    dense = {row["key"]: row["test"] for row in found if row["key"].startswith("dense")}
    text = ", ".join(f"{value:.2f} in {key.split()[1]}" for key, value in dense.items())
    return [f"Dense: {text}.", ""]


def _published_lines(found: Rows, budgets: Sequence[float]) -> list[str]:
    rows = {row["key"]: row for row in found if row["key"].startswith("published")}
    header = ["method"]
    for budget in budgets:
        cut = f"{1 - budget:.0%}"
        header += [f"{cut}: as published", f"{cut}: + our closed form"]
    lines = []
    for method in PUBLISHED:
        cells = [method]
        for budget in budgets:
            row = rows.get(f"published {budget} {method}", {})
            cells += [_number(row.get(field)) for field in ("test", "ours")]
        lines.append(cells)
    note = (
        "As published: own ranking, own allocation, own compensation (FLAP: bias), one shot. Our closed form: ridge "
        "1e-3 of the mean diagonal and 0.2 of each input's own second moment (`recovery.shrink`) on the same units."
    )
    return [markdown_table(header, lines), "", note, ""]


def _allocation_lines(found: Rows, budgets: Sequence[float]) -> list[str]:
    rules = sorted({row["rule"] for row in found if row["key"].startswith("allocation")})
    methods = [m for m in ("random", "ppo") if any(row.get("method") == m for row in found)]
    table: dict[str, dict[float, list[dict[str, Any]]]] = {}
    for name in [*rules, *methods]:
        table[name] = {
            b: [
                row
                for row in found
                if row["key"] == f"allocation {b} {name}" or row["key"].startswith(f"search {b} {name} ")
            ]
            for b in budgets
        }
    header = ["allocation"]
    for budget in budgets:
        header += [f"{1 - budget:.0%}: score", f"{1 - budget:.0%}: perplexity", "seeds"]
    last = budgets[-1]
    order = sorted(table, key=lambda n: -_mean([r["score"] for r in table[n][last]]))
    lines = []
    for name in order:
        cells = [name]
        for budget in budgets:
            own = table[name][budget]
            cells += [
                _spread([r["score"] for r in own], 3),
                _spread([r["test"] for r in own], 2),
                str(len(own)),
            ]
        lines.append(cells)
    spent = sorted({row["evaluations"] for row in found if row["key"].startswith("search")})
    note = (
        "Ranking `obs_fisher`, recovery `reconstruct` with shrink 0.2. Score: -KL(dense || pruned) on the "
        f"validation sequences of the search, in nats. random and ppo: {', '.join(map(str, spent))} evaluations each, "
        "the rules that need no further passes over the model among their starts (fisher too); the score is that "
        "of the plan whose perplexity is shown, chosen among the best 5 on 64 sequences; mean [lowest, highest] over "
        "the seeds."
    )
    return [markdown_table(header, lines), "", note, ""]


def _tuned_lines(found: Rows) -> list[str]:
    rows = [row for row in found if row["key"].startswith("tuned")]
    if not rows:
        return []
    tasks = [task["task"] for task in rows[0]["tasks"]]
    header = ["method", "perplexity before", f"after {rows[0]['steps']} LoRA steps"]
    header += [f"{task} accuracy (chance)" for task in tasks]
    lines = []
    for row in sorted(rows, key=lambda r: r["after"]):
        cells = [
            row["method"],
            _number(row["before"]),
            _number(row["after"]) if row["method"] != "dense" else "-",
        ]
        cells += [f"{t['acc']:.3f} ± {t['acc_stderr']:.3f} ({t['chance']:.3f})" for t in row["tasks"]]
        lines.append(cells)
    first = rows[0]
    limit = f"first {first['limit']} questions of each file" if first["limit"] else "all questions"
    note = (
        f"{1 - first['budget']:.0%} of the parameters removed; LoRA of rank 8 with distillation, "
        f"{first['steps']} steps of {first['batch']} sequences of 128 tokens; zero-shot on {limit}: "
        "mean and standard error."
    )
    return ["## After an equal number of LoRA steps", "", markdown_table(header, lines), "", note, ""]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("-inf")


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if value < 1000 else f"{value:,.0f}"


def _spread(values: Sequence[float], digits: int) -> str:
    if not values:
        return "-"
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{_mean(values):.{digits}f} [{min(values):.{digits}f}, {max(values):.{digits}f}]"


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", default="", help="folder, GGUF file or hub id")
    made.add_argument("--valid", default="", help="text for calibration and validation")
    made.add_argument("--test", default="", help="text of the test split")
    made.add_argument("--out", type=Path, required=True, help="folder of the results")
    made.add_argument("--set", nargs="*", default=[], help="further settings, KEY=VALUE")
    commands = made.add_subparsers(dest="command", required=True)
    one = commands.add_parser("search")
    one.add_argument("--budget", type=float, default=0.8)
    one.add_argument("--seeds", type=int, nargs="+", default=[0])
    one.add_argument("--methods", nargs="+", default=["ppo", "random"])
    one.set_defaults(action=run_search)
    two = commands.add_parser("table")
    two.add_argument("--budgets", type=float, nargs="+", default=[0.9, 0.8])
    two.add_argument("--skip", nargs="*", default=[])
    two.set_defaults(action=run_table)
    three = commands.add_parser("tune")
    three.add_argument("--budget", type=float, default=0.8)
    three.add_argument("--steps", type=int, default=40)
    three.add_argument("--batch", type=int, default=4)
    three.add_argument("--rules", nargs="*", default=["ffn_uniform", "fisher"])
    three.add_argument("--tasks", type=Path, nargs="+", default=[])
    three.add_argument("--limit", type=int)
    three.set_defaults(action=run_tune)
    four = commands.add_parser("write")
    four.add_argument("--budgets", type=float, nargs="+", default=[0.9, 0.8])
    four.add_argument("--doc", type=Path, required=True)
    four.add_argument("--readme", type=Path, help="file whose language-results markers are filled")
    four.set_defaults(action=run_write)
    return made


def main(argv: list[str] | None = None) -> None:
    torch.set_num_threads(1)
    arguments = parser().parse_args(argv)
    arguments.action(arguments)


if __name__ == "__main__":
    main()
