"""An executor that stands for workers elsewhere: all that goes there and back is pickled, in this process."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import cloudpickle

from rlprune.execution import Shared


class Elsewhere:
    """As many workers as are asked for, which take turns; each has its own copies of the shared values."""

    name = "processes"

    def __init__(self, workers: int = 3) -> None:
        self.workers = workers
        self.done = 0
        self.closed = False
        self._kept: list[dict[int, Any]] = [{} for _ in range(workers)]

    def submit(self, work: Callable[..., Any], *arguments: object) -> Future[Any]:
        kept = self._kept[self.done % self.workers]
        self.done += 1
        future: Future[Any] = Future()
        filled = [self._value(a, kept) if isinstance(a, Shared) else a for a in arguments]
        function, plain = cloudpickle.loads(
            cloudpickle.dumps((work, [None if isinstance(a, Shared) else a for a in arguments]))
        )
        own = [
            p if not isinstance(a, Shared) else f for a, p, f in zip(arguments, plain, filled, strict=True)
        ]
        try:
            future.set_result(cloudpickle.loads(cloudpickle.dumps(function(*own))))
        except Exception as error:
            future.set_exception(error)
        return future

    def drop(self, shared: Shared[Any]) -> None:
        for kept in self._kept:
            kept.pop(shared.number, None)

    def close(self) -> None:
        self.closed = True

    def _value(self, shared: Shared[Any], kept: dict[int, Any]) -> Any:
        if shared.number not in kept:
            kept[shared.number] = cloudpickle.loads(cloudpickle.dumps(shared.value))
        return kept[shared.number]
