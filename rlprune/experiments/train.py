"""``train``: from settings to a finished run folder."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..agents import AGENTS, make_agent
from ..agents.callbacks import check_tensorboard
from ..agents.ppo.policy import PortablePolicy, portable_state, save_policy
from ..config.config import Config, load_config
from ..errors import ConfigError
from ..evaluation.ledger import EvaluationLog
from ..execution import with_threads
from ..latency.cost import TableCost
from ..latency.profile import TABLE_FILE
from ..pruning.cost import plain_amount
from ..pruning.cost_terms import narrow_lines
from ..pruning.plan import Plan
from ..pruning.space import PruningSpace
from ..report import html as report
from ..report.results import OUTCOMES_FILE, read_results
from ..rules import rules_for
from ..tracking import Together, TrackingCallback, make_tracker
from ..utils.checkpoints import forget
from ..utils.dotted import flat
from ..utils.files import finite, lock_run, write_json_atomic, write_text_atomic
from ..utils.machine import hardware
from ..utils.progress import Callback, default_callback, log_to, logger
from ..workloads.base import Workload
from .build import expected_adapter
from .choice import choose, stage_of, takes_own_choice, trains_finalists
from .finish import FinalModel, add_latency, finish, save_outcomes
from .methods import MethodResult, check_learning, check_wing, keep_logits, run_agent, score_rule
from .prepare import Experiment, find_rule, prepare_experiment
from .result import PruningResult
from .rounds import in_rounds
from .saving import save_model
from .usage import check_usage
from .workers import working

_CURVE = (0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)


def train(
    config: Config, out: str | Path, *, resume: bool = False, callback: Callback | None = None
) -> PruningResult:
    """Learn the distribution, choose, finish, and write everything into the folder ``out``.

    Args:
        config: settings, from `rlprune.load_config` or built in Python.
        resume: go on with what a killed run of the same settings left in ``out``; the result is that of an
            uninterrupted one. A run that is complete is read.
        callback: is told of the progress, and may end the search early; by default bars on a terminal, else nothing.

    Raises:
        ConfigError: ``out`` holds a run and ``resume`` is not set, or a run of other settings; or a setting is given
            that nothing of the run uses.
    """
    check_usage(config, "train")
    callback, config = callback or default_callback(), with_threads(config)
    return run(config, lambda folder: _experiments(config, callback, folder), Path(out), resume, callback)


def run(
    config: Config,
    prepared: Callable[[Path], Sequence[Experiment]],
    out: Path,
    resume: bool,
    callback: Callback,
) -> PruningResult:
    """What `train` and `rlprune.search` have in common: from experiments to a finished run folder.

    ``prepared(folder)`` gives the experiment whose plan is wanted, then those that only train the policy.
    """
    trackers = [TrackingCallback(make_tracker(name)) for name in config.search.trackers]
    callback = Together([callback, *trackers]) if trackers else callback
    adapter = expected_adapter(config)
    for name in _agents(config):  # what is wrong with an agent, before anything is trained
        if not AGENTS.knows(name) or AGENTS[name].extra is not None:
            make_agent(name, config.search)
        check_learning(name, config)
        if adapter is not None:
            check_wing(name, adapter.wing)
    if config.search.tensorboard:
        check_tensorboard()
    with _run_folder(config, out, resume) as folder:
        if (folder / "results.json").is_file():
            callback.note(f"{folder}: this run is complete; nothing to resume")
            report.build(folder)
            _forget_models(folder / "state")
            return PruningResult.read(folder)
        callback.on_start(config.name, config.to_dict())
        _say_stages(config, callback)
        experiments = prepared(folder)
        experiment = experiments[0]
        _note_experiment(experiment, callback)
        state = folder / "state"
        rules: list[MethodResult] = []
        found: list[MethodResult] = []
        if config.rounds.count > 1:
            dense = finish(experiment, None, seed=config.seed, state=state, callback=callback)
            finished = [dense, in_rounds(experiment, folder, callback)]
            add_latency(finished, experiment)
        else:
            with working(config, experiments, logs=state):
                rules, found, chosen = _search_all(config, experiments, folder, callback)
            if chosen is None:  # the workers are gone: a fine-tune may need their memory
                chosen = _chosen(experiment, rules, found, state, callback)
            finished = _finish_all(experiment, rules, chosen, state, callback)
        plan, sizes = _save_outcome(experiment, folder, found, finished)
        _write_results(experiment, folder, finished, _curve(experiment, rules, found), sizes)
        callback.on_result(folder, read_results(folder))
        _forget_models(state)
    model = next(done.model for done in finished if done.row["kind"] == "agent")
    return PruningResult(folder, experiment.workload, plan, model)


def _say_stages(config: Config, callback: Callback) -> None:
    """Tell what the run consists of, in evaluations of a candidate: rough, and mended by the pace that is seen."""
    evaluations = config.search.evaluations
    tuned = config.finish.epochs + config.finish.steps > 0
    work = {"prepare": max(5.0, 0.1 * evaluations), "rules": 15.0}
    work |= {name: float(evaluations) for name in _agents(config)}
    if trains_finalists(config, expected_adapter(config)) and not takes_own_choice(config):
        work |= {stage_of(name): float(evaluations) for name in _agents(config)}
    callback.expect(work | {"finish": float(evaluations if tuned else 5)})


def _forget_models(state: Path) -> None:
    """Remove the models of all methods: only an unfinished run needs them."""
    for kept in state.glob("finish-*"):
        forget(kept)


def _search_all(
    config: Config, experiments: Sequence[Experiment], folder: Path, callback: Callback
) -> tuple[list[MethodResult], list[MethodResult], list[MethodResult] | None]:
    """The rules, what each agent found, and for each agent what is finished; None where fine-tunes have to say it."""
    experiment, ledger = experiments[0], EvaluationLog(folder / "ledger.jsonl")
    for name in _agents(config):  # they start from the rules
        keep_logits(make_agent(name, config.search), [experiment])
    alone = takes_own_choice(config)
    rules = [] if alone else _scored_rules(experiment, ledger, config.seed, callback)
    if rules:
        best = max(rules, key=lambda r: r.best.score)
        callback.note(f"best rule: {best.method}, score {best.best.score:.4f}")
    found = [_searched(name, experiments, ledger, folder, callback) for name in _agents(config)]
    experiment.evaluator.refuse_equal_scores(least=3)
    if alone:
        return rules, found, found
    if trains_finalists(config, experiment.workload.adapter):
        return rules, found, None
    return rules, found, _chosen(experiment, rules, found, folder / "state", callback)


def _chosen(
    experiment: Experiment,
    rules: Sequence[MethodResult],
    found: Sequence[MethodResult],
    state: Path,
    callback: Callback,
) -> list[MethodResult]:
    """Each method's winner; the rules are the agent's fallback."""
    return [
        choose(experiment, one, rules if one.kind == "agent" else (), state=state, callback=callback)
        for one in found
    ]


@contextlib.contextmanager
def _run_folder(config: Config, folder: Path, resume: bool) -> Iterator[Path]:
    """The locked run folder with config.yaml and run.log; what is there is continued or refused."""
    with lock_run(folder):
        recorded = folder / "config.yaml"
        if recorded.exists():
            if not resume:
                raise ConfigError(f"--out: {folder} holds a run already; use --resume or another folder")
            _same_settings(load_config(recorded), config, folder)
        else:
            write_text_atomic(recorded, config.to_yaml())
        (folder / "state").mkdir(exist_ok=True)
        handler = log_to(folder / "run.log")
        try:
            yield folder
        finally:
            logger.removeHandler(handler)
            handler.close()


def _same_settings(before: Config, now: Config, folder: Path) -> None:
    ours, theirs = flat(now.to_dict()), flat(before.to_dict())
    free = (
        "threads",
        "search.tensorboard",
        "search.trackers",
        "recovery.spill",
    )  # they change nothing of the result
    changed = [
        key
        for key in theirs
        if theirs[key] != ours.get(key) and key not in free and not key.startswith("execution.")
    ]
    if changed:
        key = changed[0]
        raise ConfigError(f"--resume: {folder} was started with {key}={theirs[key]!r}, not {ours.get(key)!r}")


def _experiments(config: Config, callback: Callback, folder: Path) -> list[Experiment]:
    """The experiment whose plan is wanted, then those that only train the policy (further checkpoints and seeds)."""
    experiments = [prepare_experiment(config, callback=callback, run=folder, searches=True)]
    latency = experiments[0].space.costs.get("latency")
    if (
        isinstance(latency, TableCost) and latency.table is not None
    ):  # a resumed run goes on with the same numbers
        write_json_atomic(folder / TABLE_FILE, latency.table.to_dict())
    for seed in config.search.model_seeds:
        experiments.append(
            prepare_experiment(
                config, model_seed=seed, callback=callback, name=f"seed{seed}", run=folder, searches=True
            )
        )
    for checkpoint in config.search.checkpoints:
        name = Path(checkpoint).stem
        experiments.append(
            prepare_experiment(
                config, checkpoint=checkpoint, callback=callback, name=name, run=folder, searches=True
            )
        )
    return experiments


def _note_experiment(experiment: Experiment, callback: Callback) -> None:
    space, dense = experiment.space, experiment.space.dense_cost(experiment.metric)
    quality = experiment.workload.evaluate(experiment.workload.model, "validation")
    whole, allowed = (plain_amount(value, experiment.metric) for value in (dense, experiment.target))
    callback.note(
        f"{experiment.workload.name}: {len(space.groups)} groups, {whole} {experiment.metric}, budget {allowed} "
        f"({experiment.target / dense:.1%}); dense validation {experiment.workload.metric_name} "
        f"{quality.metric:.4f}, loss {quality.loss:.4f}"
    )
    for line in narrow_lines(space):
        callback.note(f"warning: {line}")


def _agents(config: Config) -> list[str]:
    return [*(name for name in config.search.baselines if name != config.search.agent), config.search.agent]


def _scored_rules(
    experiment: Experiment, ledger: EvaluationLog, seed: int, callback: Callback
) -> list[MethodResult]:
    names = rules_for(experiment.space)
    callback.stage("rules")
    show, rules = callback.counting("rules", len(names)), []
    experiment.prefetch_rules([name for name in names if not find_rule(name).probes])
    for name in names:
        rules.append(score_rule(experiment, name, ledger, seed))
        show(len(rules))
    return rules


def _searched(
    method: str, experiments: Sequence[Experiment], ledger: EvaluationLog, folder: Path, callback: Callback
) -> MethodResult:
    config = experiments[0].config
    callback.stage(method)
    found = run_agent(
        method,
        experiments if method == config.search.agent else experiments[:1],
        ledger,
        seed=config.seed,
        state=folder / "state",
        progress=callback.search(method),
        tensorboard=folder / "tensorboard" if config.search.tensorboard else None,
    )
    callback.note(f"{method}: best score {found.best.score:.4f} after {found.account.spent} evaluations")
    return found


def _finish_all(
    experiment: Experiment,
    rules: Sequence[MethodResult],
    chosen: Sequence[MethodResult],
    state: Path,
    callback: Callback,
) -> list[FinalModel]:
    seed = experiment.config.seed
    every = [None, *(rules if experiment.config.finish.rules else ()), *chosen]
    finished = []
    for number, found in enumerate(every):
        callback.stage("finish", number, len(every))
        finished.append(finish(experiment, found, seed=seed, state=state, callback=callback))
    add_latency(finished, experiment)
    return finished


def _save_outcome(
    experiment: Experiment, folder: Path, found: Sequence[MethodResult], finished: Sequence[FinalModel]
) -> tuple[Plan, list[str]]:
    """policy/ and pruned/ of the agent; returns its plan, and lines on the size of what was saved."""
    for search_result in found:
        if search_result.policy is not None:
            save_policy(search_result.policy, folder / "policy")
    done = next(done for done in finished if done.row["kind"] == "agent")
    assert done.plan is not None
    origin = dict(done.plan.origin) | {"method": done.row["method"], "seed": done.row["seed"]}
    plan = replace(done.plan, origin=origin)
    wanted = experiment.config.finish.dtype
    return plan, save_model(experiment.workload, done.model, plan, folder / "pruned", wanted)


def _curve(
    experiment: Experiment, rules: Sequence[MethodResult], found: Sequence[MethodResult]
) -> list[dict[str, Any]]:
    """Score against budget of the policy as it stands, at budgets it may not have seen, and of rules for comparison.

    A policy that was trained over a range is shown over that range, compared with every rule that needs no probes;
    one of a single budget with uniform and the best such rule there. None of a run without rules (``search.starts``).
    """
    space, metric = experiment.space, experiment.metric
    if not rules:
        return []
    if searched := experiment.config.search.budget_range:
        low, high = searched
        budgets = sorted({low, high, *(b for b in _CURVE if low < b < high)}, reverse=True)
        names = [
            name
            for name, rule in rules_for(space).items()
            if not rule.probes and not experiment.is_slow(rule)
        ]
    else:
        budgets = [b for b in _CURVE if b > space.feasible(metric)[0] / space.dense_cost(metric)]
        free = [r for r in rules if not find_rule(r.method).probes]
        names = ["uniform", max(free, key=lambda r: r.best.score).method]
    policies = {f.method: PortablePolicy.from_state(*portable_state(f.policy)) for f in found if f.policy}
    rows = []
    for budget in budgets:
        plans = {(name, "rule"): experiment.rule_widths(name, budget=budget) for name in dict.fromkeys(names)}
        for name, policy in policies.items():
            plans[f"{name} policy", "agent"] = policy.plan(experiment.evaluator, budget, metric).widths
        for (name, kind), widths in plans.items():
            score = experiment.evaluator.evaluate(widths).score
            rows.append({"budget": budget, "method": name, "kind": kind, "score": score, "metric": metric})
    return rows


def _write_results(
    experiment: Experiment,
    folder: Path,
    finished: Sequence[FinalModel],
    curve: Sequence[dict[str, Any]],
    saved: Sequence[str],
) -> None:
    write_json_atomic(folder / "budgets.json", list(curve))
    results = results_of(experiment, [f.row for f in finished])
    kind = save_outcomes(finished, folder / OUTCOMES_FILE)
    results |= {"outcomes": kind} if kind else {}
    write_json_atomic(folder / "results.json", results | ({"saved": list(saved)} if saved else {}))
    report.build(folder)


def results_of(experiment: Experiment, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The content of results.json (see the public surface in the docs)."""
    found = outcome(experiment.config, experiment.workload, experiment.space, rows)
    ranking = experiment.evaluator.ranking
    found |= {} if ranking is None else {"importance": asdict(ranking)}
    return found | {"scoring": experiment.evaluator.scoring_facts}


def outcome(
    config: Config, workload: Workload, space: PruningSpace, rows: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """`results_of` where nothing has been prepared but the dense model and its space."""
    metric = config.budget.metric
    protocol = workload.protocol()
    sizes = {split: workload.size(split) for split in ("train", "calibration", "validation", "test")}
    return {
        "version": 1,
        "workload": {
            "name": workload.name,
            "model": config.model.name,
            "data": config.data.name,
            "metric": workload.metric_name,
            "higher_is_better": workload.higher_is_better,
            "exp_of_loss": workload.exp_of_loss,
            "samples": workload.sample_noun,
            "task": workload.task_type.name,
            "sizes": sizes,
            "fingerprint": space.fingerprint,
            **({"protocol": protocol} if protocol else {}),
        },
        "budget": {
            "metric": metric,
            "target": float(space.target(config.budget.target, metric)),
            "dense": space.dense_cost(metric),
            **({"range": list(config.search.budget_range)} if config.search.budget_range else {}),
        },
        "score": "score_fn" if workload.score_fn is not None else config.score.kind,
        "hardware": hardware(),
        "groups": [{"name": g.name, "kind": g.kind, "width": g.width} for g in space.groups],
        "rows": [finite(row) for row in rows],
    }
