"""What every agent has in common: its interface, its result, and the record of what it asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypedDict

from ..envs.task import Task
from ..errors import ConfigError
from ..evaluation.candidate import Scored
from ..evaluation.ledger import EvaluationBudget
from ..pruning.budget import BudgetLike
from ..pruning.history import History, PlanLike, as_history, final_widths
from ..utils.arrays import Ints
from ..utils.randomness import isolated_randomness

if TYPE_CHECKING:
    from .callbacks import Progress
    from .ppo.policy import GroupPolicy, PortablePolicy
    from .state import StateDir

Starts = Sequence[Sequence[PlanLike]]
"""For each task plans that are scored first: widths (G,)."""


Memory = Mapping[str, Any]
"""Plain values, as JSON has them, that one round of pruning leaves to the next."""


class Batch(TypedDict):
    """Plans that were compared by successive halving."""

    batch: list[History]


Call = History | Batch
"""What a recorder was asked to score."""


@dataclass(frozen=True)
class Round:
    """Which round of pruning a search is of (section `rounds`): ``number`` 1, 2, ... of ``count``.

    ``memory`` is what the agent's search of the round before left (`SearchResult.memory`), empty in the first;
    ``dense`` the costs of the model before any cut, by metric, empty where there is one round.
    """

    number: int = 1
    count: int = 1
    memory: Memory = field(default_factory=dict)
    dense: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    ``best``: for each task the best-scoring plan of its account within its (highest) budget, as one tuple
    of widths per stage (a single tuple with one stage). ``policy``: the trained policy, where the agent has one.
    ``memory``: plain values, as JSON has them, that the search of the next round is to know. ``learning``: what was
    read beside the evaluations by an agent that trains on the model itself: steps, sequences that went forward and
    backward through it, tokens of them.
    """

    best: tuple[History, ...]
    policy: GroupPolicy | None = None
    memory: Memory = field(default_factory=dict)
    learning: Mapping[str, int] = field(default_factory=dict)

    def widths(self, task: int = 0) -> Ints:
        """Final widths (G,) of a task's best plan."""
        return final_widths(self.best[task])


@dataclass(frozen=True)
class SearchRequest:
    """What an agent is asked to search, and with what.

    ``tasks``: what is searched; the plan of the first one is wanted. ``accounts``: one for each task, which scores
    its plans and charges for them. ``starts``: for each task plans that are scored first (uniform, the rules), or
    nothing at all. ``seed``: decides everything random. ``state``: where the search saves itself and continues from.
    ``progress``: called after every evaluation. ``tensorboard``: a folder for curves. ``policy``: a trained one whose
    plan is scored before the starts, and that training continues from. ``round``: where pruning goes in rounds.

    Raises:
        ConfigError: there is no task, not one account for each task, or starts for some of the tasks only.
    """

    tasks: Sequence[Task]
    accounts: Sequence[EvaluationBudget]
    _: KW_ONLY
    starts: Starts = ()
    seed: int = 0
    state: StateDir | None = None
    progress: Callable[[Progress], None] | None = None
    tensorboard: Path | None = None
    policy: PortablePolicy | None = None
    round: Round = field(default_factory=Round)

    def __post_init__(self) -> None:
        tasks, accounts = len(self.tasks), len(self.accounts)
        if tasks == 0 or tasks != accounts:
            raise ConfigError(f"search: {tasks} tasks need as many accounts, got {accounts}")
        if len(self.starts) not in (0, tasks):
            raise ConfigError(f"search: starts must hold a list for each of the {tasks} tasks")

    def starts_of(self, task: int) -> Sequence[PlanLike]:
        """The plans that the search of a task begins with."""
        return self.starts[task] if self.starts else ()


class Agent(Protocol):
    """Anything that searches. ``search`` spends the accounts of a request and returns the best plans."""

    def search(self, request: SearchRequest) -> SearchResult: ...


class TrialRecorder:
    """Stands between an agent and one account: remembers every plan asked for, in order.

    The order is what a resumed search repeats: the account answers from its ledger, so that its
    counters, charges and history come out as they were.
    """

    def __init__(self, account: EvaluationBudget, after: Callable[[], None] | None = None) -> None:
        self.account = account
        self.calls: list[Call] = []
        self.scores: dict[History, Scored] = {}
        self._after = after

    def evaluate(self, widths: PlanLike) -> Scored:
        return self._score(as_history(widths))

    def evaluate_staged(self, history: PlanLike) -> Scored:
        return self._score(as_history(history))

    def evaluate_batch(self, plans: Sequence[PlanLike] | Ints) -> None:
        """Score a batch of widths (N, G): one by one, or by successive halving where the account knows rungs.

        What halving drops is charged and known, but has no score to be compared with the others'.
        """
        if not self.halves:
            self.prefetch(plans)
            for plan in plans:
                self.evaluate(plan)
        elif len(plans):
            self._halve([as_history(plan) for plan in plans])

    def prefetch(self, plans: Sequence[PlanLike] | Ints) -> None:
        """Plans that will be asked for next, in this order: where there are workers, they begin with them."""
        begin = getattr(self.account, "prefetch", None)
        if begin is not None:
            begin(list(plans))

    @property
    def workers(self) -> int:
        """Candidates that are scored at the same time."""
        return int(getattr(getattr(self.account, "evaluator", None), "workers", 1))

    @property
    def halves(self) -> bool:
        """Whether batches are scored by successive halving (``score.rungs``)."""
        return bool(getattr(getattr(self.account, "evaluator", None), "rungs", ()))

    @property
    def known(self) -> set[History]:
        """Every plan that was asked for, dropped ones too."""
        return {*self.scores, *getattr(self.account, "dropped", ())}

    def repeat(self, calls: Iterable[Call]) -> None:
        """Ask for all of a saved record again."""
        for call in calls:
            if isinstance(call, dict):
                self._halve([as_history(plan) for plan in call["batch"]])
            else:
                self._score(as_history(call))

    def score_starts(
        self, task: Task, starts: Sequence[PlanLike], policy: PortablePolicy | None = None
    ) -> None:
        """Score the plan of a trained policy, then the starts, as far as the account allows."""
        plans = list(starts)
        if policy is not None:
            plans.insert(0, policy.widths(task, task.highest_budget, task.metric))
        self.prefetch(plans)
        for plan in plans:
            if self.account.left > 0:
                self.evaluate(plan)

    def within(self, task: Task, budget: BudgetLike) -> list[History]:
        """Scored plans that keep a budget, the best first (probes of a rule, for one, keep none)."""
        limit = task.space.target(budget, task.metric)
        plans = [plan for plan in self.scores if task.space.cost(final_widths(plan), task.metric) <= limit]
        return sorted(plans, key=lambda plan: -self.scores[plan].score)

    def best(self, task: Task) -> History:
        """The best-scoring plan within the task's (highest) budget."""
        plans = self.within(task, task.highest_budget)
        if not plans:
            raise ConfigError("search.evaluations: too few to score a single plan within the budget")
        return plans[0]

    def _halve(self, plans: Sequence[History]) -> None:
        with isolated_randomness():
            found = self.account.evaluate_many(plans)
        self.calls.append({"batch": list(plans)})
        for plan, candidate in zip(plans, found):  # as many as could be paid
            if plan not in self.account.dropped:
                self.scores.setdefault(plan, candidate)
        if self._after is not None:
            self._after()

    def _score(self, plan: History) -> Scored:
        with isolated_randomness():
            if len(plan) == 1:
                candidate = self.account.evaluate(plan[0])
            else:
                candidate = self.account.evaluate_staged(plan)
        self.calls.append(plan)
        self.scores.setdefault(plan, candidate)
        if self._after is not None:
            self._after()
        return candidate
