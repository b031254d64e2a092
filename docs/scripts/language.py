"""Pruning a language model without a gradient step: published methods, allocations and searches, by perplexity.

    python docs/scripts/language.py --model FILE.gguf --valid wikitext2_valid.txt --test wikitext2_test.txt \
        --out runs/language search --budget 0.8 --seeds 0 1
    python docs/scripts/language.py ... table --budgets 0.9 0.8
    python docs/scripts/language.py ... tune --budget 0.8 --steps 40
    python docs/scripts/language.py ... slice --budgets 0.9 0.8
    python docs/scripts/language.py ... write --doc docs/language-results.md --more runs/language-256

More calibration tokens, as well: the same commands with `--set data.calibration=256 --out runs/language-256`, and with
sequences as long as those that the perplexity is of
`--set data.calibration=256 data.sequence_length=256 score.kind=loss score.samples=32 search.evaluations=80
finish.candidates=3 --out runs/language-256-long` (130 evaluations at 10%). Those plans and two rules with 512 tokens,
and one plan after 200 steps: `--set data.calibration=256 data.sequence_length=512 score.kind=loss --out
runs/language-512`, followed by `table --rules fisher llm_pruner_ffn --published --searched "more 256 256 loss search
0.8 ppo 0" "more 256 256 loss search 0.9 ppo 0"` or by `tune --steps 200 --batch 1 --rules --searched "more 256 256 loss
search 0.8 ppo 0"` (`--published FLAP` adds that).

Every figure is kept in the --out folder, one file each, and not measured again: a stopped run goes on.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import language_tables  # the scripts next to this one
import numpy as np
import slicegpt
import torch

from rlprune import Config, Context, Plan, PruningSpace, load_config, make_plan, prune, trace
from rlprune.config import RecoveryConfig
from rlprune.evaluation import EvaluationLog, Recovery, compute
from rlprune.experiments import Experiment, build_workload, choose, prepare_experiment, run_agent
from rlprune.language import STATISTICS, Grams, LanguageCalibration, zeroshot
from rlprune.rules import RULES, rules_for
from rlprune.utils import Console, hardware, write_json_atomic
from rlprune.workloads import TuneJob, Workload

Rows = list[dict[str, Any]]
RECORD = Path(__file__).resolve().parents[1] / "language-results.json"

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
        "data.calibration=64",
        "data.sequence_length=128",
        "prune.round_to=1",  # as the published methods have it
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
            facts = {"key": key, "dtype": "float32", **make()}
            facts |= {"seconds": time.perf_counter() - started, "hardware": hardware()}
            write_json_atomic(path, facts)
            print(
                f"{key}: { ({k: v for k, v in facts.items() if k not in ('hardware', 'widths')}) }",
                flush=True,
            )
        found: dict[str, Any] = json.loads(path.read_text())
        return found


def perplexity(workload: Workload, model: torch.nn.Module) -> float:
    """Test perplexity in float32, which any processor is quick at; rows without `dtype` are of bfloat16."""
    twin = model.float()
    with workload.test_opened():
        return workload.evaluate(twin, "test").metric


def protocol(config: Config) -> dict[str, Any]:
    """What rows of one table may differ in: calibration sequences, the tokens of each, and what a score is."""
    data = config.data
    return {"calibration": data.calibration, "length": data.sequence_length, "kind": config.score.kind}


def run_search(args: argparse.Namespace) -> None:
    kept = Kept(args.out)
    console = Console(False)
    experiment = prepare_experiment(settings(args, args.budget), callback=console)
    ledger = EvaluationLog(args.out / f"ledger-{args.budget}.jsonl")
    for seed in args.seeds:
        for method in args.methods:

            def one(method: str = method, seed: int = seed) -> dict[str, Any]:
                found = run_agent(
                    method, [experiment], ledger, seed=seed, state=args.out / f"state-{args.budget}"
                )
                chosen = choose(experiment, found)
                history = chosen.history[-1]
                curve = np.maximum.accumulate([c.score for c in found.account.history]).tolist()
                return {
                    "method": method,
                    "seed": seed,
                    "budget": args.budget,
                    **protocol(experiment.config),
                    "widths": [int(w) for w in history],
                    "evaluations": found.account.spent,
                    "score": experiment.evaluator.evaluate(history).score,
                    "curve": curve,
                    "validation": experiment.evaluator.evaluate_full(history).metric,
                    "test": perplexity(experiment.workload, experiment.evaluator.build(history)),
                }

            kept(f"search {args.budget} {method} {seed}", one)


def run_table(args: argparse.Namespace) -> None:
    kept = Kept(args.out)
    config = settings(args, args.budgets[0])
    experiment = prepare_experiment(config, callback=Console(False))

    def dense(dtype: torch.dtype) -> dict[str, Any]:
        copy = prune(experiment.workload.model, experiment.evaluator.plan(experiment.space.widths)).to(dtype)
        with experiment.workload.test_opened():
            return {"test": experiment.workload.evaluate(copy, "test").metric, "dtype": str(dtype)[6:]}

    kept("dense float32", lambda: dense(torch.float32))
    kept("dense bfloat16", lambda: dense(torch.bfloat16))
    for budget in args.budgets:
        at = at_budget(experiment, budget)
        for rule in rules_for(experiment.space):
            if RULES[rule].probes or (args.rules and rule not in args.rules):
                continue
            kept(f"allocation {budget} {rule}", lambda at=at, rule=rule: allocation(at, rule))
    for found in on_record(args.searched):
        at = at_budget(experiment, found["budget"])
        key = f"search {found['budget']} {found['method']} {found['seed']}"
        kept(key, lambda at=at, found=found: searched(at, found))
    if not args.published:
        return
    grams = calibration(experiment, experiment.space).collect_grams()
    importances: dict[str, Any] = {}
    for method in args.published:
        how = PUBLISHED[method]
        todo = [b for b in args.budgets if not (args.out / f"published_{b}_{_file(method)}.json").exists()]
        if not todo:
            continue
        if how[0] not in importances:
            importances[how[0]] = importance_of(experiment, how[0])
        importance = importances[how[0]]
        for budget in todo:
            kept(
                f"published {budget} {method}",
                lambda b=budget, h=how, i=importance: published(experiment, b, h, i, grams),
            )


def at_budget(experiment: Experiment, budget: float) -> Experiment:
    return replace(experiment, config=experiment.config.override([f"budget.target={budget}"]))


def on_record(keys: Sequence[str]) -> Rows:
    """Rows of the page's record by their keys."""
    rows = {row["key"]: row for row in (json.loads(RECORD.read_text()) if keys else [])}
    return [rows[key] for key in keys]


def importance_of(experiment: Experiment, name: str) -> Any:
    """A published ranking, from statistics that are measured already."""
    measured = calibration(experiment, experiment.space)
    measured.keep(STATISTICS, experiment.evaluator.context(experiment.config.budget.target).statistics())
    return compute(name, experiment.workload, experiment.space, calibration=measured)


def calibration(experiment: Experiment, space: PruningSpace) -> LanguageCalibration:
    """A cache in which nothing has been measured yet."""
    return LanguageCalibration(experiment.workload, space, experiment.workload.model)


def _file(method: str) -> str:
    return method.replace(" ", "_").replace(",", "")


def allocation(experiment: Experiment, rule: str) -> dict[str, Any]:
    """One rule's widths under our ranking and our closed form."""
    widths = experiment.rule_widths(rule)
    candidate = experiment.evaluator.evaluate(widths)
    return {
        "rule": rule,
        "budget": experiment.config.budget.target,
        **protocol(experiment.config),
        "widths": [int(w) for w in widths],
        "score": candidate.score,
        "test": perplexity(experiment.workload, experiment.evaluator.build(widths)),
    }


def searched(experiment: Experiment, found: dict[str, Any]) -> dict[str, Any]:
    """The plan of a search that is on record, under what has been measured of the model here."""
    widths = np.array(found["widths"])
    return {
        **{name: found[name] for name in ("method", "seed", "budget", "evaluations", "widths")},
        **protocol(experiment.config),
        "plan": found["key"],
        "score": experiment.evaluator.evaluate(widths).score,
        "test": perplexity(experiment.workload, experiment.evaluator.build(widths)),
    }


def published(
    experiment: Experiment,
    budget: float,
    how: tuple[str, str, tuple[str, ...], bool],
    importance: Any,
    grams: Grams,
) -> dict[str, Any]:
    """A method with its own ranking, allocation and compensation; then the same units with the closed form."""
    plan = published_plan(experiment, budget, how, importance)
    facts = {
        "budget": budget,
        "rule": how[1],
        **protocol(experiment.config),
        "widths": [int(w) for w in plan.widths],
    }
    for name, own in (("test", RecoveryConfig(steps=how[2])), ("ours", experiment.config.recovery)):
        slim = compensated(experiment, plan, own, importance, grams)
        facts[name] = perplexity(experiment.workload, slim)
    return facts


def published_plan(
    experiment: Experiment, budget: float, how: tuple[str, str, tuple[str, ...], bool], importance: Any
) -> Plan:
    """The units that a published method keeps."""
    _, rule, _, drop = how
    workload = experiment.workload
    space = trace(workload.model, workload.example_inputs, drop=True) if drop else experiment.space
    known = None if drop else experiment.evaluator.calibration
    context = Context(space, workload.model, importance, budget, "params", workload, calibration=known)
    widths = space.project(rules_for(space)[rule].function(context), budget, "params")
    return make_plan(space, importance=importance, widths=widths)


def compensated(
    experiment: Experiment,
    plan: Plan,
    recovery: RecoveryConfig,
    importance: Any,
    grams: Grams,
) -> torch.nn.Module:
    """The model of a plan after a recovery."""
    slim = prune(experiment.workload.model, plan)
    given = calibration(experiment, plan.space)
    given.give_grams(Grams({n: grams[n] for n in grams.names}))  # a recovery uses up what it takes
    Recovery(experiment.workload, plan.space, recovery, importance=importance, calibration=given)(slim, plan)
    return slim


def run_tune(args: argparse.Namespace) -> None:
    """An equal number of LoRA steps for rules, searches and published methods; then zero-shot accuracy."""
    kept = Kept(args.out)
    config = settings(args, args.budget).override(
        [f"finish.steps={args.steps}", "finish.method=lora", f"finish.batch_size={args.batch}"]
    )
    experiment = prepare_experiment(config, callback=Console(False))
    build = experiment.evaluator.build
    models: dict[str, Callable[[], torch.nn.Module]] = {"dense": lambda: build(experiment.space.widths)}
    for rule in args.rules:
        models[rule] = lambda rule=rule: build(experiment.rule_widths(rule))
    for path in sorted(args.out.glob(f"search_{args.budget}_*_0.json")):
        found = json.loads(path.read_text())
        models[found["method"]] = lambda found=found: build(np.array(found["widths"]))
    searches = {}
    for found in on_record(args.searched):
        searches[found["method"]] = found["key"]
        models[found["method"]] = lambda found=found: build(np.array(found["widths"]))
    for method in args.published:
        models[method] = lambda method=method: published_model(experiment, args.budget, method)
    for name, make in models.items():

        def one(name: str = name, make: Callable[[], torch.nn.Module] = make) -> dict[str, Any]:
            model = make()
            before = perplexity(experiment.workload, copy.deepcopy(model))
            if name != "dense":
                tuned = experiment.workload.fine_tune(model, experiment.config.finish, TuneJob(seed=0))
                model = tuned.model
            after = perplexity(experiment.workload, model)
            rows = zeroshot.accuracy(model, experiment.workload.tokenizer, args.tasks, limit=args.limit)
            return {
                "method": name,
                "budget": args.budget,
                **protocol(experiment.config),
                "plan": searches.get(name),
                "steps": args.steps,
                "batch": args.batch,
                "limit": args.limit,
                "before": before,
                "after": after,
                "tasks": [row if isinstance(row, dict) else vars(row) for row in rows],
            }

        kept(f"tuned {args.budget} {args.steps} {name}", one)


def published_model(experiment: Experiment, budget: float, method: str) -> torch.nn.Module:
    """A published method's model with its own compensation."""
    how = PUBLISHED[method]
    importance = importance_of(experiment, how[0])
    plan = published_plan(experiment, budget, how, importance)
    grams = calibration(experiment, experiment.space).collect_grams()
    return compensated(experiment, plan, RecoveryConfig(steps=how[2]), importance, grams)


def run_slice(args: argparse.Namespace) -> None:
    """SliceGPT with a share of the hidden width, which is its authors' measure, and with a share of the parameters."""
    kept = Kept(args.out)
    chosen = settings(args, args.budgets[0])
    workload = build_workload(chosen)
    model, config = workload.model, workload.model.config
    whole = sum(p.numel() for p in model.parameters())
    widths = range(1, config.hidden_size + 1)
    for budget in args.budgets:
        fits = [w for w in widths if slicegpt.parameters(config, w) <= budget * whole]
        for measure, width in (("width", round(budget * config.hidden_size)), ("parameters", fits[-1])):

            def one(width: int = width, measure: str = measure, budget: float = budget) -> dict[str, Any]:
                texts = [ids for ids, _ in workload.batches("calibration")]
                slim = slicegpt.sliced(model, texts, width)
                return {
                    "measure": measure,
                    "budget": budget,
                    **protocol(chosen),
                    "width": width,
                    "parameters": slicegpt.parameters(config, width) / whole,
                    "test": perplexity(workload, slim),
                }

            kept(f"sliced {budget} {measure}", one)


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
    two.add_argument("--rules", nargs="*", default=[], help="only these")
    two.add_argument("--searched", nargs="*", default=[], help=f"searches by their keys in {RECORD.name}")
    two.add_argument("--published", nargs="*", default=list(PUBLISHED), help="only these")
    two.set_defaults(action=run_table)
    three = commands.add_parser("tune")
    three.add_argument("--budget", type=float, default=0.8)
    three.add_argument("--steps", type=int, default=40)
    three.add_argument("--batch", type=int, default=4)
    three.add_argument("--rules", nargs="*", default=["ffn_uniform", "fisher"])
    three.add_argument("--searched", nargs="*", default=[], help=f"searches by their keys in {RECORD.name}")
    three.add_argument("--published", nargs="*", default=[], help="these, with their own compensation")
    three.add_argument("--tasks", type=Path, nargs="+", default=[])
    three.add_argument("--limit", type=int)
    three.set_defaults(action=run_tune)
    four = commands.add_parser("slice")
    four.add_argument("--budgets", type=float, nargs="+", default=[0.9, 0.8])
    four.set_defaults(action=run_slice)
    five = commands.add_parser("write")
    five.add_argument("--budgets", type=float, nargs="+", default=[0.9, 0.8])
    five.add_argument("--doc", type=Path, required=True)
    five.add_argument("--more", type=Path, help="folder of results with a larger calibration split")
    five.set_defaults(action=language_tables.write)
    return made


def main(argv: list[str] | None = None) -> None:
    torch.set_num_threads(1)
    arguments = parser().parse_args(argv)
    arguments.action(arguments)


if __name__ == "__main__":
    main()
