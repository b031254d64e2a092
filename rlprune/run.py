"""The commands' work: train, apply, prune, inspect, evaluate, demo."""

from __future__ import annotations

import contextlib
import json
import math
import platform
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import report
from .agents.policy import PortablePolicy, load_policy, portable_state, save_policy
from .artifacts import (
    library_versions,
    load,
    lock_run,
    read_plan,
    save,
    write_json_atomic,
    write_text_atomic,
)
from .config import Config, load_config
from .errors import ArtifactError, ConfigError
from .evaluation import Ledger
from .finish import Finished, add_latency, choose, finish
from .latency import measure
from .problem import Found, Problem, prepare, score_rule, search
from .progress import Console, log_to, logger
from .pruning.tracing import count_macs
from .rules import RULES

_CURVE = (0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)


def train(config: Config, out: Path, *, resume: bool = False, progress: bool = True) -> Path:
    """Learn the distribution, choose, finish, and write everything into ``out``; returns ``out``.

    Raises:
        ConfigError: ``out`` holds a run and ``resume`` is not set, or a run of other settings.
    """
    console = Console(progress)
    with _run_folder(config, Path(out), resume) as folder:
        problems = _problems(config, console)
        problem = problems[0]
        _note_problem(problem, console)
        ledger = Ledger(folder / "ledger.jsonl")
        state = folder / "state"
        rules = _scored_rules(problem, ledger, config.seed, console)
        best = max(rules, key=lambda r: r.best.score)
        console.note(f"best rule: {best.method}, score {best.best.score:.4f}")
        found = [_searched(name, problems, ledger, folder, console) for name in _agents(config)]
        chosen = [choose(problem, f, rules if f.kind == "agent" else ()) for f in found]
        finished = _finish_all(problem, rules, chosen, state, console)
        _save_outcome(problem, folder, found, chosen, finished)
        _write_results(problem, folder, finished, _curve(problem, rules, found))
        shutil.rmtree(state, ignore_errors=True)  # private to an unfinished run
    return folder


def demo(out: Path, seed: int = 0) -> Path:
    """The embedded default: digits, a small ResNet, PPO against the rules, then a second checkpoint."""
    config = load_config("digits", [f"seed={seed}"])
    train(config, out)
    other = config.override([f"model.seed={config.model.seed + 1}"])
    target = config.budget.target
    print("\nthe learned policy on a second checkpoint, without a search:")
    print(apply(out, other, checkpoint=None, budget=target, refine=0, out=Path(out) / "second"))
    report.build(out)
    return Path(out)


def apply(
    source: Path, config: Config, *, checkpoint: Path | None, budget: Any, refine: int, out: Path
) -> str:
    """A learned policy prunes another checkpoint: one forward of the policy, and ``refine`` evaluations if asked.

    ``source`` is a run's folder or a policy's. Writes a pruned model into ``out`` and returns a table of
    validation scores beside uniform and the rules that need no probes.
    """
    console = Console(True)
    folder = Path(source)
    policy = load_policy(folder / "policy" if (folder / "policy").is_dir() else folder)
    config = replace(config, budget=replace(config.budget, target=budget))
    problem = prepare(config, checkpoint=checkpoint, console=console)
    widths = policy.plan(problem.evaluator, budget, problem.metric).widths
    rows = [(name, problem.rule_widths(name)) for name in RULES]
    rows.append(("policy", widths))
    chosen = (tuple(int(w) for w in widths),)
    if refine:
        ledger = Ledger()
        found = search_from(policy, problem, ledger, evaluations=refine, console=console)
        chosen = found.history
        rows.append((f"policy + {refine} evaluations", np.array(chosen[-1])))
    origin = {"method": "policy", "budget": str(budget), "metric": problem.metric, "refine": refine}
    save_plan(problem, chosen[-1], origin, out)
    return _score_table(problem, rows)


def search_from(policy: Any, problem: Problem, ledger: Ledger, *, evaluations: int, console: Console) -> Found:
    """A short search that starts from a policy's plan and weights."""
    return search(
        problem.config.search.agent,
        [problem],
        ledger,
        seed=problem.config.seed,
        evaluations=evaluations,
        progress=console.search("refine"),
        policy=policy,
    )


def prune_rule(config: Config, rule: str, budget: Any, out: Path) -> str:
    """Prune by a heuristic rule, recover, fine-tune as configured, write the model into ``out``."""
    console = Console(True)
    config = replace(config, budget=replace(config.budget, target=budget))
    problem = prepare(config, console=console)
    widths = problem.rule_widths(rule)
    save_plan(problem, widths, {"method": rule, "budget": str(budget), "metric": problem.metric}, out)
    return _score_table(problem, [("uniform", problem.rule_widths("uniform")), (rule, widths)])


def save_plan(problem: Problem, widths: Sequence[int] | Any, origin: dict[str, Any], out: Path) -> Path:
    """Build, recover and write the model of widths (G,); its quality on validation is that of the recovery."""
    model = problem.evaluator.build(widths)
    return save(model, problem.evaluator.plan(widths, origin), out, base=problem.workload.base, example_inputs=problem.workload.example_inputs)


def inspect(config: Config) -> str:
    """Groups, widths, costs, protected parts and feasible budgets as text; nothing is trained or searched."""
    from .pruning.tracing import trace
    from .workloads.build import build_workload

    workload = build_workload(config, train=False)
    settings = config.prune
    space = trace(workload.model, workload.example_inputs, settings.ignore, settings.round_to, settings.minimum)
    macs, params = space.unit_costs(space.widths, "macs"), space.unit_costs(space.widths, "params")
    lines = [f"{'group':<34} {'kind':<10} {'width':>6} {'unit':>5} {'min':>5} {'step':>5} {'macs/unit':>12} {'params/unit':>12}"]
    for i, g in enumerate(space.groups):
        lines.append(
            f"{g.name:<34} {g.kind:<10} {g.width:>6} {g.unit:>5} {g.minimum:>5} {g.step:>5} {macs[i]:>12,.0f} {params[i]:>12,.0f}"
        )
    lines.append("")
    lines += [f"protected: {name}: {reason}" for name, reason in space.protected.items()]
    lines += [f"unused in eval mode: {name}" for name in space.unused]
    for metric in space.costs:
        low, dense = space.feasible(metric)
        lines.append(f"{metric}: dense {dense:,.0f}; feasible budgets {low / dense:.4f} to 1 ({low:,.0f} to {dense:,.0f})")
    target = space.target(config.budget.target, config.budget.metric)
    lines.append(f"budget: {config.budget.target} of {config.budget.metric} = {target:,.0f}")
    return "\n".join(lines)


def evaluate(directory: Path, config: Config | None) -> str:
    """A saved pruned model beside its dense base: costs, latency and, with a config, its quality on test."""
    plan = read_plan(directory)
    if config is not None:
        from .workloads.build import build_workload

        workload = build_workload(config, progress=Console(True).training)
        dense, example = workload.model, workload.example_inputs
        slim = load(directory, base=dense).to(workload.device)
    else:
        from .workloads.zoo import rebuild

        workload = None
        slim = load(directory)
        dense = rebuild(plan["base"]).eval()
        example = _example_of(plan)
    models = {"dense": dense, "pruned": slim}
    times = measure(models, example, budget_seconds=10.0)
    lines = [f"{'':<10} {'macs':>16} {'params':>14} {'ms batch 1':>11} {'ms batch 64':>12}  quality"]
    for name, model in models.items():
        quality = "(give CONFIG to measure it)"
        if workload is not None:
            with workload.test_opened():
                q = workload.evaluate(model, "test")
            quality = f"test {workload.metric_name} {q.metric:.4f}, loss {q.loss:.4f} ({q.count} samples)"
        params = sum(p.numel() for p in model.parameters())
        macs = count_macs(model.eval(), example)
        lines.append(f"{name:<10} {macs:>16,.0f} {params:>14,} {times[name][1]:>11.3f} {times[name][64]:>12.3f}  {quality}")
    return "\n".join(lines)


def hardware() -> dict[str, Any]:
    """What the figures were measured on."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "device": gpu or "cpu",
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "libraries": library_versions(),
    }


def _example_of(plan: dict[str, Any]) -> torch.Tensor:
    shape = plan.get("input")
    if not shape:
        raise ArtifactError("plan.json: does not say the input's shape; give CONFIG")
    return torch.zeros(shape)


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


@contextlib.contextmanager
def _run_folder(config: Config, folder: Path, resume: bool) -> Iterator[Path]:
    """The locked run folder with config.yaml and run.log; what is there is continued or refused."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--out: {folder} is a file, not a folder")
    with lock_run(folder):
        recorded = folder / "config.yaml"
        if recorded.exists():
            if not resume:
                raise ConfigError(f"--out: {folder} holds a run already; use --resume or another folder")
            _same_settings(load_config(recorded), config, folder)
        else:
            foreign = [p.name for p in folder.iterdir() if not p.name.startswith(".")]
            if foreign:
                raise ConfigError(f"--out: {folder} is not empty ({foreign[0]}) and is no run of rlprune")
            write_text_atomic(recorded, config.to_yaml())
        (folder / "state").mkdir(exist_ok=True)
        handler = log_to(folder / "run.log")
        try:
            yield folder
        finally:
            logger.removeHandler(handler)
            handler.close()


def _same_settings(before: Config, now: Config, folder: Path) -> None:
    ours, theirs = _flat(now.to_dict()), _flat(before.to_dict())
    changed = [key for key in theirs if theirs[key] != ours.get(key) and key not in ("threads", "search.tensorboard")]
    if changed:
        key = changed[0]
        raise ConfigError(f"--resume: {folder} was started with {key}={theirs[key]!r}, not {ours.get(key)!r}")


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _problems(config: Config, console: Console) -> list[Problem]:
    """The problem that is wanted, then those that only train the policy (further checkpoints and seeds)."""
    problems = [prepare(config, console=console)]
    for seed in config.search.model_seeds:
        problems.append(prepare(config, model_seed=seed, console=console, name=f"seed{seed}"))
    for checkpoint in config.search.checkpoints:
        problems.append(prepare(config, checkpoint=checkpoint, console=console, name=Path(checkpoint).stem))
    return problems


def _note_problem(problem: Problem, console: Console) -> None:
    space, dense = problem.space, problem.space.dense_cost(problem.metric)
    quality = problem.workload.evaluate(problem.workload.model, "validation")
    console.note(
        f"{problem.workload.name}: {len(space.groups)} groups, {dense:,.0f} {problem.metric}, budget "
        f"{problem.target:,.0f} ({problem.target / dense:.1%}); dense validation {problem.workload.metric_name} "
        f"{quality.metric:.4f}, loss {quality.loss:.4f}"
    )


def _agents(config: Config) -> list[str]:
    return [*(name for name in config.search.baselines if name != config.search.agent), config.search.agent]


def _scored_rules(problem: Problem, ledger: Ledger, seed: int, console: Console) -> list[Found]:
    show, rules = console.counting("rules", len(RULES)), []
    for name in RULES:
        rules.append(score_rule(problem, name, ledger, seed))
        show(len(rules))
    return rules


def _searched(
    method: str, problems: Sequence[Problem], ledger: Ledger, folder: Path, console: Console
) -> Found:
    config = problems[0].config
    found = search(
        method,
        problems if method == config.search.agent else problems[:1],
        ledger,
        seed=config.seed,
        state=folder / "state",
        progress=console.search(method),
        tensorboard=folder / "tensorboard" if config.search.tensorboard else None,
    )
    console.note(f"{method}: best score {found.best.score:.4f} after {found.account.spent} evaluations")
    return found


def _finish_all(
    problem: Problem, rules: Sequence[Found], chosen: Sequence[Found], state: Path, console: Console
) -> list[Finished]:
    seed = problem.config.seed
    finished = [finish(problem, None, seed=seed, state=state, console=console)]
    every = [*(rules if problem.config.finish.rules else ()), *chosen]
    finished += [finish(problem, f, seed=seed, state=state, console=console) for f in every]
    add_latency(finished, problem)
    return finished


def _save_outcome(
    problem: Problem, folder: Path, found: Sequence[Found], chosen: Sequence[Found], finished: Sequence[Finished]
) -> None:
    """policy/ and pruned/ of the agent."""
    for f in found:
        if f.policy is not None:
            save_policy(f.policy, folder / "policy")
    for f in finished:
        if f.row["kind"] == "agent" and f.plan is not None:
            origin = dict(f.plan.origin) | {"method": f.row["method"], "seed": f.row["seed"]}
            save(f.model, replace(f.plan, origin=origin), folder / "pruned", base=problem.workload.base, example_inputs=problem.workload.example_inputs)


def _curve(problem: Problem, rules: Sequence[Found], found: Sequence[Found]) -> list[dict[str, Any]]:
    """Score against budget: uniform, the best rule and the policy as it stands, at budgets it may not have seen."""
    best = max(rules, key=lambda r: r.best.score).method
    policies = {f.method: PortablePolicy.from_state(*portable_state(f.policy)) for f in found if f.policy}
    low = problem.space.feasible(problem.metric)[0] / problem.space.dense_cost(problem.metric)
    rows = []
    for budget in (b for b in _CURVE if b > low):
        there = replace(problem, config=problem.config.override([f"budget.target={budget}"]))
        plans = {name: there.rule_widths(name) for name in dict.fromkeys(("uniform", best))}
        for name, policy in policies.items():
            plans[f"{name} policy"] = policy.plan(problem.evaluator, budget, problem.metric).widths
        for name, widths in plans.items():
            score = problem.evaluator.evaluate(widths).score
            rows.append({"budget": budget, "method": name, "score": score, "metric": problem.metric})
    return rows


def _write_results(
    problem: Problem, folder: Path, finished: Sequence[Finished], curve: Sequence[dict[str, Any]]
) -> None:
    write_json_atomic(folder / "budgets.json", list(curve))
    write_json_atomic(folder / "results.json", results_of(problem, [f.row for f in finished]))
    report.build(folder)


def results_of(problem: Problem, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The content of results.json (see the public surface in the docs)."""
    workload, space = problem.workload, problem.space
    sizes = {split: workload.size(split) for split in ("train", "calibration", "validation", "test")}
    return {
        "version": 1,
        "workload": {
            "name": workload.name,
            "model": problem.config.model.name,
            "data": problem.config.data.name,
            "metric": workload.metric_name,
            "sizes": sizes,
            "fingerprint": space.fingerprint,
        },
        "budget": {"metric": problem.metric, "target": problem.target, "dense": space.dense_cost(problem.metric)},
        "score": problem.config.score.kind,
        "hardware": hardware(),
        "groups": [{"name": g.name, "kind": g.kind, "width": g.width} for g in space.groups],
        "rows": [_finite(row) for row in rows],
    }


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    """JSON knows no NaN: a loss that is not finite is written as null."""
    text = json.dumps(row, default=float)
    parsed: dict[str, Any] = json.loads(text, parse_constant=lambda _: None)
    return parsed


def _score_table(problem: Problem, plans: Sequence[tuple[str, Any]]) -> str:
    """Validation score, loss and metric of plans, after the recovery."""
    dense = problem.workload.evaluate(problem.workload.model, "validation")
    name = problem.workload.metric_name
    total = problem.space.dense_cost(problem.metric)
    lines = [f"{'method':<28} {problem.metric + ' kept':>12} {'score':>9} {'loss':>8} {name:>9}"]
    lines.append(f"{'dense':<28} {1:>12.1%} {'':>9} {dense.loss:>8.4f} {dense.metric:>9.4f}")
    for label, widths in plans:
        c = problem.evaluator.evaluate_full(widths)
        score = c.score if math.isfinite(c.score) else float("nan")
        lines.append(f"{label:<28} {c.cost / total:>12.1%} {score:>9.4f} {c.loss:>8.4f} {c.metric:>9.4f}")
    return "\n".join(lines)
