"""Every scored candidate on disk, and who pays for which."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any, Protocol

from .errors import ArtifactError
from .evaluation import Candidate, History


class SearchSpent(Exception):
    """Raised by an account that has nothing left."""


class Ledger:
    """Every scored candidate, one JSON line each, on disk as soon as it is scored.

    Columns: index, seconds, method, seed, task, widths (a list of stages where there are several),
    cost, score, metric, loss, error.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        if path is not None and path.exists():
            self._read(path)

    def append(self, row: dict[str, Any]) -> None:
        """Add a row and wait until it is on the disk."""
        row = {"index": len(self.rows), **row}
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
                file.flush()
                os.fsync(file.fileno())
        self.rows.append(row)

    def of(self, method: str, seed: int, task: str) -> list[dict[str, Any]]:
        """Rows of one method, seed and task, in order."""
        key = (method, seed, task)
        return [r for r in self.rows if (r["method"], r["seed"], r["task"]) == key]

    def _read(self, path: Path) -> None:
        raw = path.read_bytes()
        whole = raw[: raw.rfind(b"\n") + 1]
        if len(whole) < len(raw):  # the last line was torn by a kill: its candidate is scored again
            with path.open("r+b") as file:
                file.truncate(len(whole))
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                row = json.loads(line)
                candidate_of(row)
                if row["index"] != len(self.rows):
                    raise ValueError("index out of order")
            except (ValueError, KeyError, TypeError) as error:
                raise ArtifactError(f"{path}: line {number} is damaged ({error})") from None
            self.rows.append(row)


def candidate_of(row: dict[str, Any]) -> Candidate:
    """The candidate that a ledger row records."""
    numbers = {name: float(row[name]) for name in ("cost", "score", "loss", "metric", "error", "seconds")}
    return Candidate(widths=history_of(row)[-1], **numbers)


def history_of(row: dict[str, Any]) -> History:
    """The widths of each stage that a ledger row records."""
    widths = row["widths"]
    stages = widths if widths and isinstance(widths[0], list) else [widths]
    return tuple(tuple(int(w) for w in stage) for stage in stages)


class Judge(Protocol):
    """The part of an evaluator that an account needs."""

    def evaluate_staged(self, history: Any) -> Candidate: ...
    def remember(self, history: History, candidate: Candidate) -> None: ...


class Account:
    """Charges one method and seed for every distinct plan it has scored (DESIGN: contract 6).

    A plan that another method has scored before costs this one an evaluation all the same; its own
    repeats are free, up to three times its limit of calls in all. Rows that the ledger already holds
    for this account are replayed in their order instead of being scored again.

    Raises (from ``evaluate``):
        SearchSpent: nothing is left.
        ArtifactError: the ledger holds other plans than the ones asked for, so its run had other settings.
    """

    def __init__(
        self, evaluator: Judge, ledger: Ledger, *, method: str, seed: int, limit: int, task: str = ""
    ) -> None:
        self.evaluator = evaluator
        self.ledger = ledger
        self.method, self.seed, self.task = method, seed, task
        self.limit = limit
        self.calls = 0
        self.history: list[Candidate] = []
        self.plans: dict[History, Candidate] = {}
        self._recorded = ledger.of(method, seed, task)
        for row in ledger.rows:
            if row["task"] == task:
                evaluator.remember(history_of(row), candidate_of(row))

    @property
    def spent(self) -> int:
        return len(self.plans)

    @property
    def left(self) -> int:
        return self.limit - self.spent if self.calls < 3 * self.limit else 0

    @property
    def best(self) -> Candidate | None:
        """The highest score so far, the earliest of equals."""
        return max(self.history, key=lambda c: c.score, default=None)

    def evaluate(self, widths: Any) -> Candidate:
        return self.evaluate_staged((widths,))

    def evaluate_staged(self, history: Any) -> Candidate:
        key: History = tuple(tuple(int(w) for w in widths) for widths in history)
        if self.calls >= 3 * self.limit:
            raise SearchSpent
        self.calls += 1
        if key in self.plans:
            return self.plans[key]
        if self.spent >= self.limit:
            raise SearchSpent
        place = self.spent
        candidate = self.evaluator.evaluate_staged(key)
        if place < len(self._recorded):
            if history_of(self._recorded[place]) != key:
                raise ArtifactError(
                    f"{self.ledger.path or 'ledger'}: evaluation {place} of {self.method!r} is of another plan; "
                    "the run was started with other settings"
                )
        else:
            self.ledger.append(self._row(key, candidate))
        self.plans[key] = candidate
        self.history.append(candidate)
        return candidate

    def _row(self, key: History, candidate: Candidate) -> dict[str, Any]:
        row = dataclasses.asdict(candidate)
        widths: Any = [list(stage) for stage in key]
        row["widths"] = widths[0] if len(key) == 1 else widths
        return {
            "seconds": row.pop("seconds"),
            "method": self.method,
            "seed": self.seed,
            "task": self.task,
            **row,
        }
