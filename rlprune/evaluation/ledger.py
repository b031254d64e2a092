"""Every scored candidate on disk, and who pays for which."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NotRequired, Protocol, TypedDict, cast

from ..errors import ArtifactError, one_line
from ..pruning.history import History, PlanLike, as_history, as_widths
from ..utils.files import append_line, whole_lines
from ..utils.reading import parse_json
from ..utils.values import is_number, is_whole, show_value
from .candidate import Candidate
from .parallel import ScoresAhead


class BudgetExhausted(Exception):
    """Raised by an account that has nothing left."""


class LogRow(TypedDict):
    """A scored candidate, and whose it is.

    ``widths`` is a list of stages where there are several; ``samples`` counts the validation images or sequences read,
    from the first one: a candidate that successive halving took further has a row for each rung.
    """

    index: NotRequired[int]  # the log's own
    seconds: float
    method: str
    seed: int
    task: str
    widths: list[int] | list[list[int]]
    cost: float
    score: float
    loss: float
    metric: float
    error: float
    samples: NotRequired[int]  # version 0.1 did not say


class EvaluationLog:
    """Every scored candidate, one JSON line each (`LogRow`), on disk as soon as it is scored."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.rows: list[LogRow] = []
        if path is not None:
            self._read(path)

    def append(self, row: LogRow) -> None:
        """Add a row and wait until it is on the disk."""
        row = {"index": len(self.rows), **row}
        if self.path is not None:
            append_line(self.path, json.dumps(row))
        self.rows.append(row)

    def of(self, method: str, seed: int, task: str) -> list[LogRow]:
        """Rows of one method, seed and task, in order."""
        key = (method, seed, task)
        return [r for r in self.rows if (r["method"], r["seed"], r["task"]) == key]

    def _read(self, path: Path) -> None:
        # Of a line that was torn by a kill the candidate is scored again.
        for number, line in enumerate(whole_lines(path), start=1):
            try:
                row = _checked(parse_json(line))
                if row["index"] != len(self.rows):
                    raise ValueError("index out of order")
            except ValueError as error:
                raise ArtifactError(f"{path}: line {number} is damaged ({one_line(error)})") from None
            self.rows.append(row)


_NUMBERS = ("cost", "score", "loss", "metric", "error", "seconds")


def _checked(row: object) -> LogRow:
    """A row of a file whose fields have their types; ValueError names the first that has not."""
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    fields = {
        "method": _is_text,
        "task": _is_text,
        "seed": is_whole,
        "index": is_whole,
        "widths": _are_widths,
    }
    fields |= dict.fromkeys(_NUMBERS, is_number)
    for field, fits in fields.items():
        if field not in row:
            raise ValueError(f"{field} is missing")
        if not fits(row[field]):
            raise ValueError(f"{field} cannot be {show_value(row[field])}")
    if not is_whole(row.get("samples", 0)):
        raise ValueError(f"samples cannot be {show_value(row['samples'])}")
    return cast(LogRow, row)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _are_widths(value: object) -> bool:
    """Widths of a plan, or of each of its stages."""
    if not isinstance(value, list) or not value:
        return False
    stages = value if isinstance(value[0], list) else [value]
    return all(isinstance(stage, list) and stage and all(map(is_whole, stage)) for stage in stages)


def candidate_of(row: LogRow) -> Candidate:
    """The candidate that a ledger row records."""
    return Candidate(
        cost=float(row["cost"]),
        score=float(row["score"]),
        loss=float(row["loss"]),
        metric=float(row["metric"]),
        error=float(row["error"]),
        seconds=float(row["seconds"]),
        widths=history_of(row)[-1],
        samples=int(row.get("samples", 0)),
    )


def history_of(row: LogRow) -> History:
    """The widths of each stage that a ledger row records."""
    return as_history(row["widths"])


def charged_scores(rows: Iterable[Mapping[str, object]], limit: float = math.inf) -> list[float]:
    """Scores of one account's rows in the order charged, one for each plan.

    A plan over ``limit`` (a probe of the sensitivity rule, say) is NaN: it takes its place in the order and cannot
    be the best. So is one that successive halving dropped: its score is over fewer samples. A plan with a
    row for each rung takes one place.
    """
    plans: dict[str, tuple[float, float]] = {}
    for row in rows:
        score, cost, read = row.get("score"), row.get("cost"), row.get("samples")
        samples = float(read) if isinstance(read, int | float) else 0.0
        if isinstance(score, int | float):
            fits = not isinstance(cost, int | float) or cost <= limit * (1 + 1e-9)
            # Rows without samples (version 0.1) are one to a plan, all of them whole.
            plan = str(row.get("widths")) if samples else str(len(plans))
            plans[plan] = (samples, float(score) if fits else math.nan)
    most = max((samples for samples, _ in plans.values()), default=0.0)
    return [score if samples == most else math.nan for samples, score in plans.values()]


class Scorer(Protocol):
    """The part of an evaluator that an account needs."""

    @property
    def rungs(self) -> tuple[int, ...]: ...
    def evaluate_staged(self, history: PlanLike) -> Candidate: ...
    def evaluate_partial(self, widths: PlanLike, samples: int) -> Candidate: ...
    def remember(self, history: History, candidate: Candidate) -> None: ...


class EvaluationBudget:
    """Charges one method and seed for every distinct plan it has scored (DESIGN: contract 6).

    A plan that another method has scored before costs this one an evaluation all the same; its own
    repeats are free, up to three times its limit of calls in all. Rows that the ledger already holds
    for this account are replayed in their order instead of being scored again.

    ``stop`` is asked before each new evaluation, once there is a plan: True ends the search as if nothing were left.

    ``plans`` and ``history`` hold what was scored on all samples, ``dropped`` what successive halving gave
    up on fewer; both are charged. ``samples`` is the number of samples read for this account, each of
    them by one candidate.

    Raises (from ``evaluate``):
        SearchSpent: nothing is left.
        ArtifactError: the ledger holds other plans than the ones asked for, so its run had other settings.
    """

    def __init__(
        self,
        evaluator: Scorer,
        ledger: EvaluationLog,
        *,
        method: str,
        seed: int,
        limit: int,
        task: str = "",
        stop: Callable[[], bool] | None = None,
    ) -> None:
        self.evaluator = evaluator
        self.ledger = ledger
        self.method, self.seed, self.task = method, seed, task
        self.limit = limit
        self._stop = stop
        self.calls = 0
        self.samples = 0
        self.history: list[Candidate] = []
        self.plans: dict[History, Candidate] = {}
        self.dropped: dict[History, Candidate] = {}
        self._rows = 0
        self._recorded = ledger.of(method, seed, task)
        for row in ledger.rows:
            if row["task"] == task:
                evaluator.remember(history_of(row), candidate_of(row))

    @property
    def spent(self) -> int:
        return len(self.plans) + len(self.dropped)

    @property
    def left(self) -> int:
        return self.limit - self.spent if self.calls < 3 * self.limit else 0

    @property
    def best(self) -> Candidate | None:
        """The highest score on all samples so far, the earliest of equals."""
        return max(self.history, key=lambda c: c.score, default=None)

    def evaluate(self, widths: PlanLike) -> Candidate:
        return self.evaluate_staged((as_widths(widths),))

    def evaluate_staged(self, history: PlanLike) -> Candidate:
        key = as_history(history)
        self._called()
        if key in self.plans:
            return self.plans[key]
        if key not in self.dropped and self.spent >= self.limit:
            raise BudgetExhausted
        return self._finished(key)

    def evaluate_many(self, plans: Sequence[PlanLike]) -> list[Candidate]:
        """Score a batch of widths (G,) or histories by successive halving (Jamieson and Talwalkar, arXiv 1502.07943).

        All are scored on the first rung of samples (``score.rungs``), the better half of them on to the
        next, and those that are left on all samples. Each distinct plan is charged once, however far it
        gets. Without rungs this is `evaluate` for each. Returns the furthest candidate of each plan, in
        order, for as many plans as the account can pay.

        Raises SearchSpent when not one of them can be paid.
        """
        keys = [as_history(plan) for plan in plans]
        if not self.evaluator.rungs:
            return [self.evaluate_staged(key) for key in keys[: self._payable(keys)]]
        keys = keys[: self._payable(keys)]
        alive = []
        for key in dict.fromkeys(keys):
            self._called()
            if key not in self.plans and key not in self.dropped:
                alive.append(key)
        for rung in self.evaluator.rungs:
            self._begin(alive, rung)
            for key in alive:
                self.dropped[key] = self._recorded_or_new(key, self.evaluator.evaluate_partial(key, rung))
            # The first of equals stays, so that a resumed search halves as the first one did.
            alive = sorted(alive, key=lambda k: -self.dropped[k].score)[: -(-len(alive) // 2)]
        self._begin(alive)
        for key in alive:
            self._finished(key)
        return [self.plans.get(key) or self.dropped[key] for key in keys]

    def prefetch(self, plans: Sequence[PlanLike]) -> None:
        """Let the evaluator's workers, if it has any, begin with what of a batch is new and can be paid.

        Nothing is charged or written before a plan is asked for: `evaluate` of each, in this order, gives what it
        would give without.
        """
        if self.left > 0 and not self.evaluator.rungs:
            new = dict.fromkeys(key for key in map(as_history, plans) if key not in self.plans)
            self._begin([*new][: self.limit - self.spent])

    def _begin(self, keys: Sequence[History], rung: int | None = None) -> None:
        if isinstance(self.evaluator, ScoresAhead):
            self.evaluator.prefetch(keys, samples=rung)

    def _payable(self, keys: Sequence[History]) -> int:
        """How many of these plans, from the first on, the account can still pay for."""
        new: set[History] = set()
        for count, key in enumerate(keys):
            if key not in self.plans and key not in self.dropped:
                new.add(key)
            if self.spent + len(new) > self.limit:
                if count == 0:
                    raise BudgetExhausted
                return count
        return len(keys)

    def _called(self) -> None:
        replayed = self._rows < len(self._recorded)
        stopped = self._stop is not None and bool(self.plans) and not replayed and self._stop()
        if stopped or self.calls >= 3 * self.limit:
            raise BudgetExhausted
        self.calls += 1

    def _finished(self, key: History) -> Candidate:
        """Score a plan on all samples and enter it."""
        candidate = self._recorded_or_new(key, self.evaluator.evaluate_staged(key))
        self.dropped.pop(key, None)
        self.plans[key] = candidate
        self.history.append(candidate)
        return candidate

    def _recorded_or_new(self, key: History, candidate: Candidate) -> Candidate:
        """Check the candidate against the ledger's next row of this account, or write that row."""
        before = self.dropped[key].samples if key in self.dropped else 0
        self.samples += candidate.samples - before
        if self._rows < len(self._recorded):
            row = self._recorded[self._rows]
            if history_of(row) != key or row.get("samples", 0) not in (0, candidate.samples):
                raise ArtifactError(
                    f"{self.ledger.path or 'ledger'}: evaluation {self._rows} of {self.method!r} is of another "
                    "plan; the run was started with other settings"
                )
        else:
            self.ledger.append(self._row(key, candidate))
        self._rows += 1
        return candidate

    def _row(self, key: History, candidate: Candidate) -> LogRow:
        stages = [list(stage) for stage in key]
        return {
            "seconds": candidate.seconds,
            "method": self.method,
            "seed": self.seed,
            "task": self.task,
            "widths": stages[0] if len(key) == 1 else stages,
            "cost": candidate.cost,
            "score": candidate.score,
            "loss": candidate.loss,
            "metric": candidate.metric,
            "error": candidate.error,
            "samples": candidate.samples,
        }
