"""One workload under one budget, ready to be searched: every method comes in through here."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..config.config import AUTO, Config
from ..errors import ConfigError, near_miss
from ..evaluation.candidate import Candidate, Scored
from ..evaluation.evaluator import Evaluator
from ..evaluation.ledger import EvaluationBudget, EvaluationLog
from ..evaluation.parallel import Rebuild
from ..latency.profile import TABLE_FILE, Progress, machine, read_table, with_latency
from ..pruning.space import PruningSpace
from ..rules import RULES, Rule, rules_for
from ..rules.context import rule_widths
from ..tracing.trace import TraceOptions
from ..utils.arrays import Ints
from ..utils.progress import Callback
from ..workloads.base import Workload
from .build import build_workload, train_dense

# Share of a search's evaluations that a rule's probes may take for the rule to be among the starts.
MOST_PROBES = 1 / 3


@dataclass(frozen=True)
class Experiment:
    """A dense model, its space, the evaluator of its candidates, and the budget they have to meet."""

    config: Config
    workload: Workload
    evaluator: Evaluator
    name: str = ""
    stop: Callable[[], bool] | None = field(default=None, repr=False, compare=False)
    """Asked before each evaluation of a search: whether it is to end early."""
    rebuild: Rebuild | None = field(default=None, repr=False, compare=False)
    """Prepares the same evaluator in another process; None where the workload was given as an object."""

    @property
    def space(self) -> PruningSpace:
        return self.evaluator.space

    @property
    def importance(self) -> str:
        """The importance that ranks the units, by name; what the settings ask for where an agent has learned scores."""
        ranking = self.evaluator.ranking
        return self.config.prune.importance if ranking is None else ranking.name

    @property
    def budget(self) -> str | float:
        return self.config.budget.target

    @property
    def metric(self) -> str:
        return self.config.budget.metric

    @property
    def target(self) -> float:
        """Absolute cost that the budget allows."""
        return float(self.space.target(self.budget, self.metric))

    def account(self, ledger: EvaluationLog, method: str, seed: int, limit: int) -> EvaluationBudget:
        return EvaluationBudget(
            self.evaluator, ledger, method=method, seed=seed, limit=limit, task=self.name, stop=self.stop
        )

    def rule_widths(
        self, rule: str, evaluate: Callable[[Ints], Scored] | None = None, budget: Any = None
    ) -> Ints:
        """Widths that a rule gives at the budget, or at another one; ``evaluate`` charges for its probes."""
        budget = self.budget if budget is None else budget
        context = self.evaluator.context(budget, self.metric, evaluate)
        return rule_widths(find_rule(rule), context)

    def prefetch_rules(self, names: Sequence[str]) -> None:
        """Let the evaluator's workers, if it has any, begin with what rules give at the budget."""
        if self.evaluator.workers > 1:
            self.evaluator.prefetch([self.rule_widths(name) for name in names])

    def starts(self, budgets: Sequence[Any] = ()) -> list[Ints]:
        """Plans that every search starts from and pays for: uniform and the other rules, probes included.

        ``budgets`` are those of a search over a range, which starts from the rules that probe nothing at each of them
        after its own, as far as half of its evaluations allow. None at all where ``search.starts`` is `none`.
        """
        plans: list[Ints] = []

        def evaluate(widths: Ints) -> Candidate:
            plans.append(widths)
            return self.evaluator.evaluate(widths)

        if self.config.search.starts != "rules":
            return plans
        for name in self.start_rules():
            plans.append(self.rule_widths(name, evaluate))
        names = self.free_start_rules()
        for budget in dict.fromkeys(b for b in budgets if b != self.budget):
            if len(plans) + len(names) > self.config.search.evaluations / 2:
                break
            plans += [self.rule_widths(name, budget=budget) for name in names]
        return plans

    def free_start_rules(self) -> list[str]:
        """Those of `start_rules` that probe nothing."""
        return [name for name in self.start_rules() if not RULES[name].probes]

    def start_rules(self) -> list[str]:
        """The shipped rules that apply here and are worth their probes as a start, uniform first.

        A rule that probes every group is left out where that would eat much of the evaluations, and a slow one
        (`is_slow`), unless the importance has measured what it needs. Of those that probe one is enough: that which
        scales what the importance expects of cuts, where it does.
        """
        most = self.config.search.evaluations * MOST_PROBES
        names, probing = ["uniform"], list[str]()
        for name, rule in rules_for(self.space).items():
            slow = self.is_slow(rule) and not self.evaluator.has_measured(rule.measures or name)
            if name != "uniform" and rule.shipped and rule.probe_count(self.space) <= most and not slow:
                (probing if rule.probes else names).append(name)
        expects = self.evaluator.ranks_by_divergence
        preferred = [name for name in probing if (RULES[name].measures is not None) == expects]
        return names + (preferred or probing)[:1]

    def is_slow(self, rule: Rule) -> bool:
        """Whether a rule runs more passes over the model than a search should spend that did not ask for it."""
        return rule.costly and self.workload.adapter.costly_passes


def find_rule(name: str) -> Rule:
    """A rule by name; ConfigError with the near miss for an unknown one."""
    if not RULES.knows(name):
        raise ConfigError(f"rule: unknown rule {name!r}{near_miss(name, RULES)}; allowed: {', '.join(RULES)}")
    return RULES[name]


def prepare_experiment(
    config: Config,
    *,
    model_seed: int | None = None,
    checkpoint: str | Path | None = None,
    callback: Callback | None = None,
    name: str = "",
    run: Path | None = None,
    workload: Workload | None = None,
    searches: bool = False,
) -> Experiment:
    """Build (and train) the workload, trace it, compute importances and the recovery's statistics.

    ``run`` is the folder of a run whose latency table is taken where it was measured on this model and machine;
    ``workload`` is taken instead of what the settings describe; ``searches``: so many candidates will be scored that a
    trial of a faster format pays (`Evaluator.settle_format`).
    """
    if model_seed is not None:
        config = replace(config, model=replace(config.model, seed=model_seed))
    rebuild = None if workload is not None else partial(_rebuilt, config, checkpoint, run)
    workload, space = dense_model(
        config, checkpoint=checkpoint, callback=callback, run=run, workload=workload
    )
    evaluator = Evaluator(
        workload,
        space,
        importance=config.prune.importance,
        recovery=config.recovery,
        score=config.score,
        metric=config.budget.metric,
        seed=config.seed,
    )
    if config.prune.importance == AUTO:
        (callback or Callback()).note(f"{workload.name}: units ranked by {evaluator.ranking}")
    if searches and (trial := evaluator.settle_format(config.budget.target)) is not None:
        (callback or Callback()).note(f"{workload.name}: {trial}")
    stop = None if callback is None else callback.should_stop
    return Experiment(config, workload, evaluator, name, stop, rebuild)


def _rebuilt(config: Config, checkpoint: str | Path | None, run: Path | None) -> Evaluator:
    """What `prepare_experiment` prepares, in a worker."""
    return prepare_experiment(config, checkpoint=checkpoint, run=run).evaluator


def config_of(workload: Workload, settings: Mapping[str, Any], named: dict[str, Any]) -> Config:
    """The settings of a Python call on a workload: ``settings`` nested as in a YAML file, ``named`` above them."""
    kind = type(workload)
    values: dict[str, Any] = {
        "name": re.sub(r"\W+", "-", workload.name) or "run",
        "workload": f"{kind.__module__}:{kind.__name__}",
    }
    for source in (settings, named):
        for key, value in source.items():
            if isinstance(value, Mapping) and isinstance(values.get(key), Mapping):
                values[key] = {**values[key], **value}
            else:
                values[key] = value
    for key in ("model", "data", "workload"):
        if key in settings:
            raise ConfigError(f"settings.{key}: the model and its data are given as objects; leave it out")
    return Config.from_dict(values)


def dense_model(
    config: Config,
    *,
    checkpoint: str | Path | None = None,
    callback: Callback | None = None,
    run: Path | None = None,
    workload: Workload | None = None,
) -> tuple[Workload, PruningSpace]:
    """The first part of `prepare`: the workload, its dense model trained, and the space of its groups."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    callback = callback or Callback()
    if workload is None:
        workload = build_workload(config, checkpoint=checkpoint, train=False)
    space = workload.adapter.trace(workload.model, workload.example_inputs, TraceOptions.of(config.prune))
    if config.budget.metric == "latency":
        space = timed_space(config, workload, space, run=run, progress=callback.training)
        callback.close()
    # An infeasible budget is refused before anything is trained.
    space.target(config.budget.target, config.budget.metric)
    callback.stage("prepare")
    if checkpoint is None and config.model.train.epochs > 0:
        train_dense(workload, config.model, callback.training)
        callback.close()
    return workload, space


def timed_space(
    config: Config,
    workload: Workload,
    space: PruningSpace,
    *,
    run: Path | None = None,
    progress: Progress | None = None,
) -> PruningSpace:
    """The space with the latency of its models: from ``budget.table``, the run's own table, or measured now."""
    settings = config.budget
    table = None
    if settings.table is not None:
        table = read_table(settings.table)
        if table.batch_size != settings.batch_size:
            raise ConfigError(
                f"budget.table: {settings.table} was measured at batch size {table.batch_size}, "
                f"budget.batch_size is {settings.batch_size}"
            )
        if table.fingerprint != space.fingerprint:
            raise ConfigError(f"budget.table: {settings.table} was measured on another architecture")
    elif run is not None and (run / TABLE_FILE).is_file():
        kept = read_table(run / TABLE_FILE)
        same = (kept.fingerprint, kept.batch_size, dict(kept.machine))
        if same == (space.fingerprint, settings.batch_size, machine(workload.device)):
            table = kept
    example = workload.example_inputs
    return with_latency(space, workload.model, example, settings.batch_size, table=table, progress=progress)
