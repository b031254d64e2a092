"""The engine without workers: this process does the work when it is handed in."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future

from .base import Result, Shared, Value


class SerialExecutor:
    """Does the work at once; what it raises is in the future, but for Ctrl-C and the like."""

    name = "serial"
    workers = 1

    def submit(self, work: Callable[..., Result], *arguments: object) -> Future[Result]:
        future: Future[Result] = Future()
        try:
            future.set_result(work(*(a.value if isinstance(a, Shared) else a for a in arguments)))
        except Exception as error:
            future.set_exception(error)
        return future

    def drop(self, shared: Shared[Value]) -> None:
        """Nothing is kept."""

    def close(self) -> None:
        """There is nothing to end."""
