"""Pruning without a search: a learned policy or a rule, on a checkpoint of the user's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from ..agents.ppo.policy import PortablePolicy, load_policy
from ..agents.ppo.transfer import PlanMemory, agreed, can_build
from ..agents.ppo.transfer import builds as builds_of
from ..artifacts.policy import POLICY_FILE
from ..config.config import AUTO, Config, load_config
from ..errors import ConfigError
from ..evaluation.candidate import Candidate
from ..evaluation.ledger import EvaluationLog
from ..execution import with_threads
from ..language.files.uniform import equal_widths, plain_obstacle
from ..pruning.history import final_widths
from ..pruning.plan import Plan
from ..rules import RULES, rules_for
from ..rules.blocks import block_cosines, block_count
from ..utils.arrays import Ints
from ..utils.checkpoints import forget
from ..utils.progress import Callback, Console, default_callback
from ..workloads.base import Workload
from ..workloads.checks import check_workload
from .incremental import incremental
from .methods import finalists, run_agent
from .prepare import Experiment, config_of, find_rule, prepare_experiment
from .saving import save_model
from .usage import check_usage
from .workers import working


@dataclass(frozen=True)
class AppliedPolicy:
    """What a policy gave for a model: its plan, and the model that is cut by it and recovered, not fine-tuned.

    ``table`` holds validation scores next to the rules that need no probes, ``notes`` what the policy looked at.
    """

    workload: Workload
    plan: Plan
    model: nn.Module
    table: str
    notes: str = ""
    dtype: str = "auto"

    def save(self, folder: str | Path) -> Path:
        """Write the pruned model into a folder (see `rlprune.save`), by ``finish.dtype``."""
        save_model(self.workload, self.model, self.plan, Path(folder), self.dtype)
        return Path(folder)

    def sizes(self, folder: str | Path) -> str:
        """Size and number format of the dense weights and of a saved folder, in words."""
        return "\n".join(self.workload.adapter.size_lines(self.workload, Path(folder)))

    def __str__(self) -> str:
        return self.table + self.notes


def apply(
    policy: str | Path | PortablePolicy,
    workload: Workload | Config,
    budget: float | int | str | None = None,
    *,
    metric: str = "macs",
    settings: Mapping[str, Any] | None = None,
    checkpoint: str | Path | None = None,
    refine: int = 0,
    builds: int | None = None,
    callback: Callback | None = None,
) -> AppliedPolicy:
    """A learned policy prunes a model that it has not seen: no search on its validation split.

    Args:
        policy: a run's folder, a policy's, or a policy.
        workload: the model and its data; or settings that describe them.
        budget: what may be left; that of the settings where none is given.
        metric: the cost that the budget limits; of settings, theirs counts.
        settings: with a Workload: further settings, nested as in a YAML file (recovery, score, prune).
        checkpoint: with settings: weights of the model.
        refine: a search that starts from the policy then spends so many evaluations.
        builds: models that a policy of several checkpoints builds to compare plans without labels
            (:meth:`PortablePolicy.widths`); with fewer than two, its network answers alone.

    Raises:
        ConfigError, ArtifactError, BudgetError: in one line what is wrong, and what is allowed.
    """
    run = None if isinstance(policy, PortablePolicy) else Path(policy)
    known = policy if isinstance(policy, PortablePolicy) else load_policy(_policy_folder(Path(policy)))
    config = _settings_of(workload, budget, metric, settings or {})
    check_usage(config, "apply --refine" if refine else "apply")
    config = with_threads(config)
    own = None if isinstance(workload, Config) else check_workload(workload)
    watcher = callback or default_callback()
    config = _ranked_as(config, known, watcher)
    experiment = prepare_experiment(
        config, checkpoint=checkpoint, callback=watcher, run=run, workload=own, searches=refine > 0
    )
    asked = config.budget.target
    known = _with_builds(known, experiment, builds)
    widths = known.plan(experiment.evaluator, asked, experiment.metric, builds=builds).widths
    plans = [
        (name, experiment.rule_widths(name))
        for name, rule in rules_for(experiment.space).items()
        if not rule.probes
    ]
    plans.append(("policy", widths))
    if refine:
        with working(config, [experiment]):
            found = refined(experiment, known, refine, EvaluationLog(), watcher)
        widths = final_widths(found.history)
        plans.append((f"policy + {refine} evaluations", widths))
    origin: dict[str, Any] = {"method": "policy", "budget": str(asked), "metric": experiment.metric}
    origin |= {"builds": builds, "refine": refine}
    plan, model = experiment.evaluator.plan(widths, origin), experiment.evaluator.build(widths)
    notes = _probes_note(experiment, str(known.meta["base_rule"])) + _plan_memory_note(experiment, known)
    table = _score_table(experiment, plans)
    return AppliedPolicy(experiment.workload, plan, model, table, notes, config.finish.dtype)


def _ranked_as(config: Config, policy: PortablePolicy, callback: Callback) -> Config:
    """Settings that leave the ranking of units open take that of the policy's training: its features are made of it."""
    if config.prune.importance != AUTO:
        return config
    callback.note(f"units ranked by {policy.importance}, as in the policy's training")
    return replace(config, prune=replace(config.prune, importance=policy.importance))


def _with_builds(known: PortablePolicy, experiment: Experiment, builds: int | None) -> PortablePolicy:
    """The policy, or its network alone where it may build fewer than two models; ConfigError: it can build none."""
    if builds is None:
        return known
    if builds < 2:
        return PortablePolicy(known.network, known.meta)
    if _plan_memory(experiment, known) is None:
        raise ConfigError(
            f"--builds {builds}: only for a policy of several checkpoints and an image model; allowed here: 0"
        )
    return known


def _settings_of(
    workload: Workload | Config, budget: float | int | str | None, metric: str, settings: Mapping[str, Any]
) -> Config:
    if isinstance(workload, Config):
        if settings:
            raise ConfigError("settings: the Config holds them already; give them with a Workload only")
        return workload if budget is None else _with_budget(workload, budget)
    if budget is None:
        raise ConfigError("budget: needed with a Workload, as in budget=0.5")
    return config_of(workload, settings, {"budget": {"target": budget, "metric": metric}})


def _policy_folder(source: Path) -> Path:
    """The folder of the policy: ``source`` itself, or the one within a run; ConfigError for a run without one."""
    policy, settings = source / "policy", source / "config.yaml"
    if policy.is_dir():
        return policy
    if (source / POLICY_FILE).is_file() or not settings.is_file():
        return source
    agent = load_config(settings).search.agent
    if not (source / "results.json").is_file():
        raise ConfigError(
            f"RUN_OR_POLICY: {source}: this run of the agent {agent!r} is not complete and has left no policy; "
            f"go on with it (`rlprune train CONFIG --resume --out {source}`), or give the folder of a policy"
        )
    raise ConfigError(
        f"RUN_OR_POLICY: {source}: the agent of this run, {agent!r}, has left no policy; train with "
        f"--set search.agent=ppo, or give the folder of a policy, or of a plan ({source / 'pruned'})"
    )


def _plan_memory(experiment: Experiment, policy: PortablePolicy) -> PlanMemory | None:
    """The policy's experience, where builds on this checkpoint can go on from it."""
    known = policy.plan_memory
    task = policy.task(experiment.evaluator, experiment.budget, experiment.metric)
    return known if known is not None and can_build(task) else None


def _plan_memory_note(experiment: Experiment, policy: PortablePolicy) -> str:
    """What the policy's experience has looked at here, where it had any."""
    known = _plan_memory(experiment, policy)
    if known is None:
        return ""
    models, images = builds_of(policy.task(experiment.evaluator, experiment.budget, experiment.metric))
    fits = known.fingerprint == experiment.space.fingerprint
    others = f"{len(known.tasks.unique())} other checkpoints"
    start = "; here" if fits else ", which do not fit here; from the rules' plans"
    return (
        f"\nthe policy knows plans of {others}{start} it built {models} models and compared their logits with the "
        f"dense one's on {images} calibration and training images, without labels"
    )


def _probes_note(experiment: Experiment, rule: str) -> str:
    """What the policy's base rule cost, where that is more than nothing."""
    if not RULES[rule].probes:
        return ""
    probes: list[Ints] = []

    def evaluate(widths: Ints) -> Candidate:
        probes.append(widths)
        return experiment.evaluator.evaluate(widths)

    experiment.rule_widths(rule, evaluate)
    return f"\nthe policy's base rule, {rule}, took {len(probes)} evaluations for its probes"


def refined(
    experiment: Experiment,
    policy: PortablePolicy,
    evaluations: int,
    ledger: EvaluationLog,
    callback: Callback,
) -> Any:
    """A search of a few evaluations that starts from a policy's plan and weights.

    Where the policy has builds of this checkpoint, the plan is chosen by the images of these as well (`agreed`).
    """
    # Few evaluations are spent in small batches: the surrogate is fitted again after each.
    batch = max(4, min(experiment.config.search.batch, evaluations // 4))
    settings = replace(experiment.config.search, batch=batch)
    found = run_agent(
        settings.agent,
        [replace(experiment, config=replace(experiment.config, search=settings))],
        ledger,
        seed=experiment.config.seed,
        evaluations=evaluations,
        progress=callback.search("refine"),
        policy=policy,
    )
    if _plan_memory(experiment, policy) is None or experiment.config.score.kind != "kl":
        return found
    task = policy.task(experiment.evaluator, experiment.budget, experiment.metric)
    plans = {h: found.account.plans[h] for h in finalists(experiment, found.account, evaluations)}
    return replace(found, history=agreed(task, plans))


def prune_rule(
    config: Config,
    rule: str,
    budget: str | float,
    out: Path,
    checkpoint: Path | None = None,
    callback: Callback | None = None,
) -> str:
    """A heuristic rule prunes the model, the recovery follows; writes it into ``out``, returns a table.

    ``checkpoint`` are weights that are used as they are, or the folder of a pruned model that is pruned further.
    """
    find_rule(rule)
    experiment = prepare_experiment(
        _with_budget(config, budget), checkpoint=checkpoint, callback=callback or Console(True)
    )
    widths = experiment.rule_widths(rule)
    origin: dict[str, object] = {"method": rule, "budget": str(budget), "metric": experiment.metric}
    _, sizes = _save(experiment, widths, origin, out)
    table = _score_table(experiment, [("uniform", experiment.rule_widths("uniform")), (rule, widths)])
    return "\n".join([table, *sizes])


def prune_equal_widths(
    config: Config,
    budget: str | float,
    drop_blocks: int,
    out: Path,
    checkpoint: Path | None = None,
    callback: Callback | None = None,
) -> str:
    """One number of neurons for all blocks, so that `rlprune export --to hf` gives a folder that needs no custom code.

    Of the blocks the ``drop_blocks`` with the least influence go first, 1 - the mean cosine of their input and
    output (ShortGPT, arXiv 2403.03853, equation 1). Writes the pruned model into ``out``, returns a table.
    """
    experiment = prepare_experiment(
        _with_budget(config, budget), checkpoint=checkpoint, callback=callback or Console(True)
    )
    space, metric = experiment.space, experiment.metric
    if drop_blocks and drop_blocks >= block_count(space):
        allowed = f"allowed: 0 to {block_count(space) - 1}"
        raise ConfigError(
            f"--drop-blocks: the model has {block_count(space)} blocks, {drop_blocks} leave none; {allowed}"
        )
    dropped: list[int] = []
    if drop_blocks:
        influence = 1.0 - block_cosines(experiment.evaluator.context(budget, metric))
        dropped = sorted(int(b) for b in np.argsort(influence, kind="stable")[:drop_blocks])
    widths = equal_widths(space, budget, metric, dropped)
    origin: dict[str, object] = {
        "method": "same_widths",
        "budget": str(budget),
        "metric": metric,
        "dropped_blocks": dropped,
    }
    slim, sizes = _save(experiment, widths, origin, out)
    why = plain_obstacle(slim)
    of = next(g for g in space.groups if g.kind == "ffn" and g.block not in dropped)
    neurons = int(widths[space.groups.index(of)])
    table = _score_table(
        experiment, [("uniform", experiment.rule_widths("uniform")), ("same_widths", widths)]
    )
    gone = ", ".join(map(str, dropped)) or "none"
    table += f"\nsame_widths: {neurons} of {of.width} neurons in every block; blocks dropped: {gone}"
    notes = [f"no plain transformers folder can be exported: {why}"] if why else []
    return "\n".join([table, *notes, *sizes])


def prune_stages(
    config: Config,
    rule: str,
    budget: str | float,
    stages: int,
    steps: int,
    out: Path,
    checkpoint: Path | None = None,
    callback: Callback | None = None,
) -> str:
    """`prune_rule` in rounds: cut a part, recover, train ``steps`` steps, look again
    (`experiments.incremental.incremental`).

    A killed run leaves its finished rounds in ``OUT.state`` and the same command goes on from there.
    """
    find_rule(rule)
    callback = callback or Console(True)
    experiment = prepare_experiment(_with_budget(config, budget), checkpoint=checkpoint, callback=callback)
    state = out.with_name(f"{out.name}.state")
    found = incremental(
        experiment, rule, stages=stages, steps=steps, seed=config.seed, out=state, callback=callback
    )
    callback.close()
    sizes = save_model(experiment.workload, found.model, found.plan, out, config.finish.dtype)
    forget(state)
    total, name = experiment.space.dense_cost(experiment.metric), experiment.workload.metric_name
    lines = [f"{'stage':<8} {experiment.metric + ' kept':>18} {'loss':>8} {name:>10}"]
    dense = experiment.workload.evaluate(experiment.workload.model, "validation")
    lines.append(f"{'dense':<8} {1:>18.1%} {dense.loss:>8.4f} {dense.metric:>10.4f}")
    for number, facts in enumerate(found.rounds, 1):
        share = facts["cost"] / total
        lines.append(f"{number:<8} {share:>18.1%} {facts['loss']:>8.4f} {facts['metric']:>10.4f}")
    return "\n".join([*lines, *sizes])


def _with_budget(config: Config, budget: str | float) -> Config:
    return replace(config, budget=replace(config.budget, target=budget))


def _save(
    experiment: Experiment, widths: Ints, origin: dict[str, object], out: Path
) -> tuple[nn.Module, list[str]]:
    """Write the pruned and recovered model of ``widths``; returns it, and lines on its size."""
    plan = experiment.evaluator.plan(widths, origin)
    slim = experiment.evaluator.build(widths)
    return slim, save_model(experiment.workload, slim, plan, out, experiment.config.finish.dtype)


def _score_table(experiment: Experiment, plans: Sequence[tuple[str, Ints]]) -> str:
    """Validation score, loss and metric of plans, after the recovery."""
    dense = experiment.workload.evaluate(experiment.workload.model, "validation")
    name = experiment.workload.metric_name
    total = experiment.space.dense_cost(experiment.metric)
    lines = [f"{'method':<28} {experiment.metric + ' kept':>12} {'score':>9} {'loss':>8} {name:>9}"]
    lines.append(f"{'dense':<28} {1:>12.1%} {'':>9} {dense.loss:>8.4f} {dense.metric:>9.4f}")
    for label, widths in plans:
        c = experiment.evaluator.evaluate_full(widths)
        score = c.score if math.isfinite(c.score) else float("nan")
        lines.append(f"{label:<28} {c.cost / total:>12.1%} {score:>9.4f} {c.loss:>8.4f} {c.metric:>9.4f}")
    return "\n".join(lines)
