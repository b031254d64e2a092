"""Candidates that are scored at the same time: an evaluator on the workers of an executor.

Each worker gets the prepared evaluator once, as it is, or prepares one of its own where it cannot be sent; it proves
that its dense model is ours before it scores anything. A candidate comes back with its logits, where a search wants
them, and with its parts, where successive halving goes on from them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from torch import Tensor

from ..errors import ConfigError, RunError, described
from ..execution.base import Executor, Shared
from ..pruning.history import History, PlanLike
from ..utils.exits import own_exits_named
from ..utils.progress import logger
from ..utils.randomness import isolated_randomness
from ..workloads.judge import Judgement
from .candidate import Candidate

if TYPE_CHECKING:
    from .evaluator import Evaluator

# Dense models that differ by more, relative to loss and metric, are not the same; by less, machines are not alike.
SAME = 1e-3
Rebuild = Callable[[], "Evaluator"]
Key = tuple[History, bool, int | None]
"""A plan, whether on the whole split, and on how many samples."""


@dataclass(frozen=True)
class Asked:
    """A candidate that a worker is to score."""

    history: History
    full: bool
    samples: int | None
    parts: Sequence[Judgement] = ()
    logits: bool = False


@dataclass(frozen=True)
class Answer:
    """What a worker found: the candidate, what was judged so far, and the rows of logits that are kept of it."""

    candidate: Candidate
    parts: Sequence[Judgement] = ()
    logits: Tensor | None = None


@runtime_checkable
class ScoresAhead(Protocol):
    """An evaluator that may begin with plans before it is asked for them."""

    def prefetch(
        self, plans: Sequence[PlanLike], *, full: bool = False, samples: int | None = None
    ) -> None: ...


class Prepared:
    """An evaluator on its way to a worker, with what proves that it has arrived as it was."""

    def __init__(
        self, evaluator: Evaluator | None, rebuild: Rebuild | None, proof: Mapping[str, float]
    ) -> None:
        self._evaluator, self._rebuild, self._proof = evaluator, rebuild, dict(proof)
        self._proved = False

    def score(self, asked: Asked) -> Answer:
        """In the worker: score a candidate."""
        with isolated_randomness(), own_exits_named():
            if self._evaluator is None:
                assert self._rebuild is not None
                self._evaluator = self._rebuild()
            if not self._proved:
                check_proof(proof_of(self._evaluator), self._proof)
                self._proved = True
            return self._evaluator.answer(asked)


def score(prepared: Prepared, asked: Asked) -> Answer:
    """The work of a worker."""
    return prepared.score(asked)


def proof_of(evaluator: Evaluator) -> dict[str, float]:
    """What tells this dense model and its validation data from others."""
    dense = evaluator.dense
    return {name: float(getattr(dense, name)) for name in ("score", "loss", "metric", "cost")}


def check_proof(found: Mapping[str, float], wanted: Mapping[str, float]) -> None:
    """RunError where the dense candidate of a worker is not ours; a warning where only its last digits differ."""
    wrong = [
        f"{name} {found[name]!r} instead of {value!r}"
        for name, value in wanted.items()
        if abs(found[name] - value) > SAME * max(1.0, abs(value))
        or math.isnan(found[name]) != math.isnan(value)
    ]
    if wrong:
        raise RunError(f"the dense model of a worker is another one: {', '.join(wrong)}")
    if dict(found) != dict(wanted):
        logger.warning(
            "a worker computes other last digits (dense score %r, here %r)", found["score"], wanted["score"]
        )


@dataclass
class Workers:
    """The workers of one evaluator and its forks."""

    executor: Executor
    shared: Shared[Prepared]

    def ask(self, asked: Asked) -> Future[Answer]:
        return self.executor.submit(score, self.shared, asked)


def workers_of(evaluator: Evaluator, executor: Executor, rebuild: Rebuild | None = None) -> Workers:
    """Get an executor ready for an evaluator.

    Args:
        rebuild: prepares the same evaluator in a worker, for one that cannot be sent there.

    Raises ConfigError: it cannot be sent, and nothing can rebuild it.
    """
    proof = proof_of(evaluator)
    shared = Shared(Prepared(evaluator.bare(), None, proof))
    try:
        executor.submit(_nothing, shared).result()
    except (RunError, ConfigError):
        raise
    except Exception as error:
        executor.drop(shared)
        if rebuild is None:
            raise ConfigError(
                f"execution.engine: {executor.name!r}, but the workload cannot be sent to another process "
                f"({described(error)}); give execution.engine=serial"
            ) from error
        logger.info("workers prepare the workload themselves: %s", described(error))
        shared = Shared(Prepared(None, rebuild, proof))
    return Workers(executor, shared)


def _nothing(prepared: Prepared) -> None:
    """Whether an evaluator arrives."""


@dataclass
class Ahead:
    """Candidates that workers have been asked for and that nobody has taken yet."""

    workers: Workers
    futures: dict[Key, Future[Answer]] = field(default_factory=dict)

    def ask(self, asked: Asked) -> None:
        key = asked.history, asked.full, asked.samples
        if key not in self.futures:
            self.futures[key] = self.workers.ask(asked)

    def take(self, key: Key) -> Answer | None:
        """What a worker found, once it is there; None where nobody was asked."""
        future = self.futures.pop(key, None)
        return None if future is None else future.result()

    def fork(self) -> Ahead:
        return Ahead(self.workers)
