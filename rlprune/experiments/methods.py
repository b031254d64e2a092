"""One method for the best plan within the budget: a rule that is scored, or an agent that searches."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..agents import AGENTS, Round, SearchRequest, StateDir, make_agent
from ..agents.ppo.agents import PPOAgent
from ..agents.ppo.policy import PortablePolicy
from ..config.config import Config
from ..envs.task import Task
from ..errors import ConfigError
from ..evaluation.candidate import Candidate
from ..evaluation.ledger import EvaluationBudget, EvaluationLog
from ..pruning.history import History, as_history
from ..utils.arrays import Ints
from ..workloads.adapter import adapter_named
from .prepare import Experiment, find_rule


@dataclass(frozen=True)
class MethodResult:
    """What one method found: its plan as a history of widths, its account, its policy if it has one."""

    method: str
    kind: str
    seed: int
    account: EvaluationBudget
    history: History
    seconds: float
    policy: Any = None
    memory: Mapping[str, Any] = field(default_factory=dict)
    learning: Mapping[str, int] = field(default_factory=dict)
    trained: Sequence[Mapping[str, Any]] = ()
    """Finalists that were fine-tuned to choose among them, and how good each was on validation then."""

    @property
    def best(self) -> Candidate:
        """The candidate of the plan; a fallback's plan need not be in the method's own account."""
        return self.account.evaluator.evaluate_staged(self.history)


def score_rule(experiment: Experiment, rule: str, ledger: EvaluationLog, seed: int = 0) -> MethodResult:
    """Score what a rule gives; its probes, where it needs any, are charged to it."""
    started = time.perf_counter()
    account = experiment.account(ledger, rule, seed, limit=find_rule(rule).probe_count(experiment.space) + 10)
    widths = experiment.rule_widths(rule, account.evaluate)
    account.evaluate(widths)
    return MethodResult(rule, "rule", seed, account, as_history(widths), time.perf_counter() - started)


def best_start_rule(experiments: Sequence[Experiment]) -> str:
    """The rule with the best mean score over the experiments of those that probe nothing: where the policy is applied
    later, its base rule has to be had without evaluations. All of them are among the starts, and charged."""
    names = experiments[0].free_start_rules()
    for experiment in experiments:
        experiment.prefetch_rules(names)
    scores = {
        n: float(np.mean([p.evaluator.evaluate(p.rule_widths(n)).score for p in experiments])) for n in names
    }
    return max(scores, key=scores.__getitem__)


def keep_logits(agent: Any, experiments: Sequence[Experiment]) -> None:
    """Before an agent's first score: what it will ask for again is kept, which would cost a candidate each."""
    if isinstance(agent, PPOAgent) and agent.reads_logits:
        for experiment in experiments:
            experiment.evaluator.logit_cache()


def _automatic_base(experiments: Sequence[Experiment], agent: Any) -> str:
    """The base rule of actions where none is configured: the best one at the budget that probes nothing.

    Over a range of budgets it is the adapter's rule for that: no rule is the best one throughout. A policy that is
    taught what the best plans of several checkpoints have in common has it too: a rule's plan is another one on each.
    """
    taught = len(experiments) > 1 and isinstance(agent, PPOAgent) and agent.settings.mode == "surrogate"
    if experiments[0].config.search.starts == "none":
        return "uniform"  # nothing is scored that the agent does not ask for
    fixed = experiments[0].workload.adapter.base_rule_over_budgets
    if fixed is not None and (taught or experiments[0].config.search.budget_range):
        return fixed
    return best_start_rule(experiments)


def run_agent(
    method: str,
    experiments: Sequence[Experiment],
    ledger: EvaluationLog,
    *,
    seed: int,
    evaluations: int | None = None,
    state: Path | None = None,
    progress: Callable[[Any], None] | None = None,
    tensorboard: Path | None = None,
    policy: PortablePolicy | None = None,
    at: Round | None = None,
) -> MethodResult:
    """Let an agent search; the plan of the first experiment is wanted, the others train the policy.

    The starts are scored first and charged, and the best rule among them that probes nothing is what actions deviate
    from (see ``search.base_rule``). ``at`` is the round that the search is of. With a ``policy`` it starts from that
    one's plan and weights instead, and its base rule stays.
    """
    started = time.perf_counter()
    settings = experiments[0].config.search
    agent = make_agent(method, settings)
    check_wing(method, experiments[0].space.wing)
    check_learning(method, experiments[0].config)
    limit = evaluations or settings.evaluations
    accounts = [p.account(ledger, method, seed, limit) for p in experiments]
    if policy is None:
        keep_logits(agent, experiments)
    if policy is not None:
        base = str(policy.meta["base_rule"])
    else:
        base = settings.base_rule if settings.base_rule != "auto" else _automatic_base(experiments, agent)
    tasks = [_task(p, base) for p in experiments]
    starts: list[list[Ints]] = [[] for _ in experiments]
    if policy is None:
        starts = [
            p.starts(task.anchor_budgets if task.is_range else ())
            for p, task in zip(experiments, tasks, strict=True)
        ]
    result = agent.search(
        SearchRequest(
            tasks,
            accounts,
            starts=starts,
            seed=seed,
            state=StateDir(state, f"{method}-{seed}") if state is not None else None,
            progress=progress,
            tensorboard=tensorboard,
            policy=policy,
            round=at or Round(),
        )
    )
    kind = "agent" if method == settings.agent else "baseline"
    own = settings.starts == "none"  # the agent's choice, which need not be its highest score
    history = result.best[0] if own else best_within(experiments[0], accounts[0])
    seconds = time.perf_counter() - started
    return MethodResult(
        method, kind, seed, accounts[0], history, seconds, result.policy, result.memory, result.learning
    )


def check_learning(method: str, config: Config) -> None:
    """ConfigError where an agent ranks the units itself and something else is to be scored under that ranking."""
    if method not in AGENTS or not AGENTS[method].learns_units:
        return
    search = config.search
    if search.starts != "none":
        raise ConfigError(
            f"search.starts: {method!r} learns which units stay, so that no rule's plan is scored before; allowed: none"
        )
    if method == search.agent and search.baselines:
        raise ConfigError(
            f"search.baselines: {method!r} learns which units stay, so that no other agent can follow it; allowed: []; "
            "`rlprune benchmark` compares methods"
        )
    if config.rounds.count > 1:
        raise ConfigError(
            f"rounds.count: what {method!r} learns holds for the dense model, not for further rounds; allowed: 1"
        )


def check_wing(method: str, of_model: str) -> None:
    """ConfigError where an agent is not for models of a wing."""
    wing = AGENTS[method].wing
    if wing not in (None, of_model):
        allowed = ", ".join(n for n, a in AGENTS.items() if a.wing in (None, of_model) and not a.on_request)
        raise ConfigError(
            f"search.agent: {method!r} is for {adapter_named(wing).models} only; allowed here: {allowed}"
        )


def _task(experiment: Experiment, base: str) -> Task:
    """What an agent sees of an experiment; ``base`` is the rule that actions deviate from."""
    return Task(
        experiment.evaluator,
        experiment.config.search.budget_range or experiment.budget,
        experiment.metric,
        base_rule=find_rule(base).name,
        name=experiment.name,
        common_plans=experiment.workload.adapter.common_plans,
    )


def best_within(experiment: Experiment, account: EvaluationBudget) -> History:
    """The best-scoring plan of an account that meets the budget (a search over a range scores others too)."""
    target = experiment.target * (1 + 1e-12)
    fits = {history: c for history, c in account.plans.items() if c.cost <= target}
    if not fits:
        raise ConfigError("search.evaluations: too few to score a plan within the budget")
    return max(fits, key=lambda history: fits[history].score)


def finalists(experiment: Experiment, account: EvaluationBudget, count: int) -> list[History]:
    """The best plans of an account within the budget, by score."""
    target = experiment.target * (1 + 1e-12)
    fits = [h for h, c in account.plans.items() if c.cost <= target]
    return sorted(fits, key=lambda h: account.plans[h].score, reverse=True)[:count]
