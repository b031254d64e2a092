"""What every engine has in common: work that is handed in, a result to come, and values that workers keep."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from ..errors import RunError


class NoWorkers(RunError):
    """Not one worker could be started."""


Value = TypeVar("Value")
Result = TypeVar("Result")

_numbers = itertools.count()
Preparation = Callable[[], object]


@dataclass(frozen=True)
class Shared(Generic[Value]):
    """A value that each worker gets once and keeps; as an argument of `Executor.submit` it arrives as the value."""

    value: Value = field(repr=False)
    number: int = field(default_factory=lambda: next(_numbers))

    def __hash__(self) -> int:
        return self.number


class Executor(Protocol):
    """Who does work: `submit` hands it in, the future holds what it returned or raised.

    Work is a function of a module (not of the main script) and its arguments; it must give the same result when it is
    done twice, since a worker that dies is replaced and what it had in hand is done again.
    """

    @property
    def name(self) -> str:
        """`serial`, `processes` or `ray`."""

    @property
    def workers(self) -> int:
        """How much is worked on at the same time."""

    def submit(
        self, work: Callable[..., Result], *arguments: object
    ) -> Future[Result]:  # the arguments are those of the work, or `Shared`
        """Hand in work. Raises what pickling the arguments raises."""

    def drop(self, shared: Shared[Value]) -> None:
        """Let the workers forget a value."""

    def close(self) -> None:
        """End all workers, whatever they do; results that are not there are cancelled."""


_PREPARATIONS: list[Callable[[], Preparation]] = []


def in_every_worker(preparation: Callable[[], Preparation]) -> None:
    """Let every worker that starts from now on call what ``preparation()`` returns, before anything else.

    It is asked when workers start: for what has been registered in this process by then, say.
    """
    _PREPARATIONS.append(preparation)


def preparations() -> list[Preparation]:
    """What a worker that starts now has to call."""
    return [make() for make in _PREPARATIONS]
