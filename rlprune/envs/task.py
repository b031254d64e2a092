"""A task: one model under one budget (or a range of them), and who scores its candidates."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar, cast, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike

from ..config.config import AUTO
from ..errors import BudgetError, ConfigError, near_miss
from ..evaluation.builder import Change
from ..evaluation.candidate import Scored
from ..evaluation.evaluator import Evaluator
from ..evaluation.parallel import ScoresAhead
from ..pruning.budget import BudgetLike, Limits
from ..pruning.history import PlanLike, as_history
from ..pruning.space import PruningSpace
from ..rules import RULES, rules_for
from ..rules.context import Context, rule_widths
from ..utils.arrays import Floats, Floats32, Ints
from ..utils.randomness import isolated_randomness
from ..workloads.adapter import DefaultImportance
from ..workloads.base import Workload
from .observation import (
    EXPECTED_SHARES,
    EXPECTING,
    FEATURE_VERSIONS,
    feature_version,
    fill_dynamic,
    static_features,
)
from .reward import RewardScale, reward_scale

# d = base * exp(ACTION_SCALE * (a - mean a)): two groups can differ by a factor of e^3 from the base rule.
ACTION_SCALE = 1.5
# A range of budgets is searched at this many of them.
KNOTS = 5
# Share of the mean that a group keeps in the base distribution, so that an action can reach every group.
BASE_FLOOR = 0.05


TaskBudget = BudgetLike | tuple[BudgetLike, ...] | list[BudgetLike]
"""A budget, or a (low, high) pair."""
Made = TypeVar("Made")


class Scorer(Protocol):
    """What scores plans: an evaluator, or an account that charges for each of them."""

    def evaluate(self, widths: PlanLike) -> Scored: ...
    def evaluate_staged(self, history: PlanLike) -> Scored: ...


class Judge(Scorer, Protocol):
    """What a task needs of an evaluator (see :class:`rlprune.evaluation.evaluator.Evaluator`)."""

    @property
    def space(self) -> PruningSpace: ...
    @property
    def importance(self) -> Sequence[Floats]: ...
    @property
    def dense(self) -> Scored: ...
    # Any: it is asked only of what the judge has scored itself, and each has a type of its own.
    def standard_error(self, candidate: Any) -> float: ...
    def context(
        self, budget: BudgetLike, metric: str | None = None, evaluate: Callable[[Ints], Scored] | None = None
    ) -> Context: ...


@runtime_checkable
class Reranks(Protocol):
    """A judge whose units an agent may rank anew, with weights of its own, before any plan is scored
    (`Evaluator.rerank`)."""

    def rerank(self, scores: Sequence[Floats], change: Change | None = None) -> None: ...


@runtime_checkable
class Expects(Protocol):
    """An evaluator that may know what cuts are expected to cost."""

    @property
    def ranks_by_divergence(self) -> bool: ...

    def expected(self, widths: ArrayLike) -> Floats | None: ...


@runtime_checkable
class Ranks(Protocol):
    """An evaluator that knows the name of the importance that ranks its units."""

    @property
    def ranking(self) -> DefaultImportance | None: ...


Source = Workload | Judge
"""What a task is made of: a workload, which is traced then, or an evaluator that exists already."""


def deviate(base: Floats, action: ArrayLike) -> Floats:
    """The distribution of an action: ``max(d, 0.05 mean d) * exp(c (a - mean a))`` with c = 1.5.

    Args:
        base: (G,) base distribution, non-negative.
        action: (G,) or (N, G), each in [-1, 1]; 0 gives the base, and a shift of all changes nothing.
    """
    a = np.asarray(action, dtype=np.float64)
    floor = np.maximum(base, BASE_FLOOR * base.mean())
    distribution: Floats = floor * np.exp(ACTION_SCALE * (a - a.mean(axis=-1, keepdims=True)))
    return distribution


@dataclass(frozen=True)
class Task:
    """One model under one budget, with the base rule that actions deviate from.

    Args:
        evaluator: gives space, importances and the dense candidate.
        budget: 0.5, "50%", "150M", or a (low, high) pair from which a ratio is drawn at every reset.
        metric: the cost that the budget limits.
        base_rule: name of a rule (``rlprune list rules``), recomputed on every checkpoint.
        scorer: who scores candidates and charges for them; the evaluator itself by default.
        sensitivity: two ratios; each group alone is cut by them and scored (charged) for the observation.
        name: shown in messages.
        common_plans: whether a policy of several tasks is taught what their best plans have in common.
        shown: feature version of the observations, instead of the one that the kinds of the groups call for.
    """

    evaluator: Judge
    budget: TaskBudget = 0.5
    metric: str = "macs"
    base_rule: str = "uniform"
    scorer: Scorer | None = None
    sensitivity: tuple[float, ...] = ()
    name: str = ""
    common_plans: bool = True
    shown: int | None = None
    _cache: dict[str, object] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if len(self.sensitivity) not in (0, 2):
            raise ConfigError(f"sensitivity: {self.sensitivity!r} must be two ratios, or empty")
        low, high = self.budget_range
        if low > high:
            raise BudgetError(f"budget: the range {self.budget!r} must name the lower one first")

    def __deepcopy__(self, memo: dict[int, object]) -> Task:
        # A copy would score everything again and charge a copied account: environments share the task.
        return self

    @property
    def space(self) -> PruningSpace:
        return self.evaluator.space

    @property
    def feature_version(self) -> int:
        """Which of ``observation.FEATURE_VERSIONS`` a policy is shown."""
        if self.shown is not None:
            return self.shown
        found = feature_version([self.space])
        return EXPECTING if found == 1 and self.prior(self.space.widths[None]) is not None else found

    @property
    def features(self) -> tuple[str, ...]:
        """Names of the F columns of :meth:`observe`."""
        return FEATURE_VERSIONS[self.feature_version]

    @property
    def is_range(self) -> bool:
        return isinstance(self.budget, (tuple, list))

    @property
    def highest_budget(self) -> BudgetLike:
        """Its budget, or the highest of its range as a ratio."""
        return self.budget_range[1] if isinstance(self.budget, (tuple, list)) else self.budget

    @property
    def budget_range(self) -> tuple[float, float]:
        """Lowest and highest budget as ratios of the dense cost; BudgetError where one is not feasible."""
        if not isinstance(self.budget, (tuple, list)):
            ratio = self.ratio(self.budget)
            return ratio, ratio
        if len(self.budget) != 2:
            raise BudgetError(f"budget: {self.budget!r} must be one budget or a (low, high) pair")
        return self.ratio(self.budget[0]), self.ratio(self.budget[1])

    @property
    def anchor_budgets(self) -> tuple[BudgetLike, ...]:
        """The budgets at which the task is searched: its own, or several over its range, the lowest first."""
        if not isinstance(self.budget, (tuple, list)):
            return (self.budget,)
        return tuple(float(b) for b in np.linspace(*self.budget_range, KNOTS))

    def expected(self, widths: Ints) -> Floats | None:
        """What each group's cut is expected to cost at widths (N, G) before any evaluation, (N, G); None where nothing
        is (see `Evaluator.expected`)."""
        return self.evaluator.expected(widths) if isinstance(self.evaluator, Expects) else None

    def prior(self, widths: Ints) -> Floats | None:
        """As `expected`, where the ranking of the units comes with the curves: a rule that has measured them by the way
        changes neither what a policy sees nor what a search begins with."""
        ranked = isinstance(self.evaluator, Expects) and self.evaluator.ranks_by_divergence
        return self.expected(widths) if ranked else None

    @property
    def importance_name(self) -> str | None:
        """The importance that ranks the units; None where scores were given or an agent has learned them."""
        ranking = self.evaluator.ranking if isinstance(self.evaluator, Ranks) else None
        return None if ranking is None else ranking.name

    def ratio(self, budget: BudgetLike) -> float:
        """A budget as a ratio of the dense cost."""
        return self.space.target(budget, self.metric) / self.space.dense_cost(self.metric)

    def draw_budget(self, generator: np.random.Generator) -> BudgetLike:
        """The budget itself, or a ratio drawn uniformly from the range."""
        if isinstance(self.budget, (tuple, list)):
            return float(generator.uniform(*self.budget_range))
        return self.budget

    def with_scorer(self, scorer: Scorer) -> Task:
        """The same task, charged to another account."""
        return replace(self, scorer=scorer)

    def showing(self, version: int) -> Task:
        """The same task, observed in a feature version."""
        return self if version == self.feature_version else replace(self, shown=version)

    def evaluate(self, history: Sequence[Ints]) -> Scored:
        """Score the last widths of a history of stages (one stage: a plain candidate)."""
        scorer = self.scorer or self.evaluator
        if len(history) == 1:
            return scorer.evaluate(history[0])
        return scorer.evaluate_staged(as_history(history))

    def prefetch(self, plans: Sequence[Ints] | Ints) -> None:
        """Plans that will be evaluated next: where the evaluator has workers, they begin with them."""
        if isinstance(self.evaluator, ScoresAhead):
            self.evaluator.prefetch(list(plans))

    def base(self, budget: BudgetLike) -> Floats:
        """Base distribution (G,) of the named rule at a budget."""
        return self._cached(("base", budget), lambda: self._rule(self.base_rule, budget))

    def base_plan(self, budget: BudgetLike) -> Ints:
        """Widths (G,) that the named rule gives at a budget."""
        return rule_widths(RULES[self.base_rule], self._context(budget))

    def uniform_widths(self, budget: BudgetLike) -> Ints:
        return self.space.project(np.ones(len(self.space.groups)), budget, self.metric)

    def rule_plans(self, budget: BudgetLike) -> Ints:
        """What the shipped rules that need no probes give, uniform aside: (N, G)."""
        rules = {n: rule for n, rule in rules_for(self.space).items() if rule.shipped and not rule.probes}
        plans = [
            rule_widths(rule, self._context(budget)) for name, rule in rules.items() if name != "uniform"
        ]
        return np.array(plans, dtype=np.int64).reshape(-1, len(self.space.groups))

    def scale(self, budget: BudgetLike) -> RewardScale:
        """The reward's scale at a budget; costs one evaluation, of uniform pruning."""
        return self._cached(("scale", budget), lambda: self._scale(budget))

    def widths(self, action: ArrayLike, budget: BudgetLike) -> Ints:
        """Widths of one action (G,) or of many (N, G)."""
        return self.space.project(self.deviated(action, budget), budget, self.metric)

    def deviated(self, action: ArrayLike, budget: BudgetLike) -> Floats:
        """The distribution of an action (G,) or of many (N, G); groups of one width share their first one's."""
        own = self.space.led(np.asarray(action, dtype=np.float64))
        return deviate(self.base(budget), own)

    def stage_widths(
        self, action: ArrayLike, budget: BudgetLike, stage: int, stages: int, before: Ints
    ) -> Ints:
        """Widths (G,) after stage 1..stages; nothing that an earlier stage cut comes back."""
        return self.project_stage(self.deviated(action, budget), budget, stage, stages, before)

    def project_stage(
        self, distribution: Floats, budget: BudgetLike, stage: int, stages: int, before: Ints
    ) -> Ints:
        """Widths, (G,) or (N, G) as the distribution, of stage 1..stages.

        Stage t projects to ``dense - (t / T) (dense - budget)`` and shares out what is left by then. Where a step is
        so large that the stages before went below that, nothing is cut.
        """
        dense = self.space.dense_cost(self.metric)
        target = dense - stage / stages * (dense - self.space.target(budget, self.metric))
        target = min(target, self.space.cost(before, self.metric))
        limits = Limits(before, np.minimum(self.space.minimums, before), self.space.steps)
        return self.space.project_cost(distribution, target, self.metric, limits)

    def observe(self, budget: BudgetLike, widths: Ints | None = None) -> Floats32:
        """Feature table (G, F) at a budget, with what is kept now (nothing cut by default)."""
        space = self.space
        base = self.base(budget)
        base_widths = self._cached(
            ("base widths", budget), lambda: self.widths(np.zeros(len(space.groups)), budget)
        )
        static = self._cached("static", self._static)
        now = space.widths if widths is None else widths
        target = space.target(budget, self.metric)
        return fill_dynamic(static, space, base, base_widths, now, target, self.metric)

    def _cached(self, key: object, make: Callable[[], Made]) -> Made:
        name = str(key)
        if name not in self._cache:
            with isolated_randomness():  # made once a process: a resumed search makes it at another moment
                self._cache[name] = make()
        return cast("Made", self._cache[name])

    def _rule(self, name: str, budget: BudgetLike) -> Floats:
        if name == "uniform" and all(g.exact and g.block < 0 for g in self.space.groups):
            return np.ones(len(self.space.groups))
        if not RULES.knows(name):
            allowed = ", ".join(RULES)
            raise ConfigError(f"base_rule: unknown rule {name!r}{near_miss(name, RULES)}; allowed: {allowed}")
        distribution = RULES[name].function(self._context(budget))
        return np.asarray(distribution, dtype=np.float64)

    def _context(self, budget: BudgetLike) -> Context:
        # A rule that probes is charged for it like everybody else.
        return self.evaluator.context(budget, self.metric, lambda widths: self.evaluate([widths]))

    def _scale(self, budget: BudgetLike) -> RewardScale:
        uniform = self.evaluate([self.uniform_widths(budget)])
        error = self.evaluator.standard_error(uniform)
        return reward_scale(
            uniform.score, self.evaluator.dense.score, error, lambda: self._rule_scores(budget)
        )

    def _rule_scores(self, budget: BudgetLike) -> list[float]:
        """Scores of the rules that cost nothing to compute; charged like everything else."""
        plans = self.rule_plans(budget)
        self.prefetch(plans)
        return [self.evaluate([plan]).score for plan in plans]

    def _static(self) -> Floats32:
        space = self.space
        losses = self._sensitivities() if self.sensitivity else None
        importance = self.evaluator.importance
        dense = space.widths.astype(np.float64)
        wanted = [space.limits.floor(dense * (1.0 - share)) for share in EXPECTED_SHARES]
        expected = self.prior(np.array(wanted))
        return static_features(space, importance, self.metric, losses, self.feature_version, expected)

    def _sensitivities(self) -> Floats:
        """Loss of score (G, 2) when one group alone is cut."""
        space = self.space
        dense = self.evaluator.dense.score
        losses = np.zeros((len(space.groups), 2))
        probes = {}
        for column, share in enumerate(self.sensitivity):
            wanted = space.limits.floor(space.widths.astype(np.float64) * (1.0 - share))
            for g in range(len(space.groups)):
                widths = space.widths.copy()
                widths[space.leaders == space.leaders[g]] = wanted[g]
                probes[g, column] = widths
        self.prefetch([*probes.values()])
        for place, widths in probes.items():
            losses[place] = dense - self.evaluate([widths]).score
        return losses if math.isfinite(losses.sum()) else np.nan_to_num(losses)


def make_task(
    workload: Source,
    budget: TaskBudget = 0.5,
    *,
    metric: str = "macs",
    base_rule: str = "uniform",
    name: str = "",
    importance: str = AUTO,
) -> Task:
    """A task for a workload (which is traced now, and its units ranked by ``importance``), or for an evaluator that
    exists already."""
    if isinstance(workload, Workload):
        evaluator = Evaluator(workload, metric=metric, importance=importance)
        return Task(evaluator, budget, metric, base_rule, name=name or workload.name)
    return Task(workload, budget, metric, base_rule, name=name)
