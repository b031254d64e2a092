"""Limits on time and memory for work that may explode: looked at between steps, and by a process that can be killed."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import torch

from ..errors import GraphError, RlpruneError, described

_POLL_SECONDS = 0.05
_LOOKS = 64  # a look at the memory costs as much as many small operations

Result = TypeVar("Result")


def resident_gigabytes(process: int | None = None) -> float:
    """Memory that a process holds now, in GiB (this one's peak where the system has no /proc)."""
    try:
        with open(f"/proc/{process or 'self'}/statm") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**30
    except (OSError, ValueError, IndexError):
        try:
            import resource
        except ImportError:  # Windows
            return 0.0
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (2**30 if sys.platform == "darwin" else 2**20)


class Limits:
    """What a piece of work may take: seconds, and GiB of memory on top of what the process holds already."""

    def __init__(self, what: str, seconds: float, memory_gb: float) -> None:
        self.what, self.seconds, self.memory_gb = what, seconds, memory_gb
        self._start, self._memory = time.monotonic(), resident_gigabytes()
        self._looks = 0

    @property
    def left(self) -> float:
        return self.seconds - (time.monotonic() - self._start)

    def check(self) -> None:
        """GraphError where the time is over or the memory is used up; called between steps, often."""
        if self.left < 0:
            raise self.error(f"{self.seconds:g} s")
        self._looks += 1
        if self._looks % _LOOKS == 0 and resident_gigabytes() - self._memory > self.memory_gb:
            raise self.error(f"{self.memory_gb:g} GiB of memory")

    def error(self, most: str) -> GraphError:
        return GraphError(
            f"{self.what} took more than {most}; the model is not supported within these limits"
        )


def in_place(work: Callable[[], Result]) -> Result:
    """What ``work`` returns, in this process; GraphError for exceptions that are not rlprune's own."""
    try:
        return work()
    except (RlpruneError, KeyboardInterrupt):
        raise
    except BaseException as error:  # a model may raise anything, and call sys.exit
        raise GraphError(f"tracing failed: {described(error)}") from error


@dataclass(frozen=True)
class _Message:
    result: Any
    error: RlpruneError | None
    warned: list[tuple[str, type[Warning]]]


def in_child(limits: Limits, work: Callable[[], Result]) -> Result:
    """What ``work`` returns, run in a forked process that is killed when a limit is reached.

    Its warnings are given here again. It runs on one thread: a fork has none of the others. Where the system cannot
    fork, ``work`` runs here, and only its own looks at the limits hold it.

    Raises GraphError for a limit, or a process that died; rlprune's own exceptions from ``work`` pass through.
    """
    forks = sys.platform not in ("win32", "darwin") and "fork" in multiprocessing.get_all_start_methods()
    if not forks or multiprocessing.current_process().daemon:  # which may have no children
        return in_place(work)
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(sender, work), daemon=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks in a process with threads, see above
        process.start()
    sender.close()
    assert process.pid is not None
    try:
        message = _received(limits, receiver, process.pid)
    finally:
        process.kill()
        process.join()
        receiver.close()
    if message is None:
        raise GraphError(
            f"{limits.what}: its process died (exit code {process.exitcode}), perhaps for lack of memory"
        )
    for warning, category in message.warned:
        warnings.warn(warning, category, stacklevel=6)
    if message.error is not None:
        raise message.error
    found: Result = message.result
    return found


def _sendable(category: type[Warning]) -> type[Warning]:
    """The class of a warning, or a plain one where the other process could not find it."""
    try:
        pickle.dumps(category)
    except Exception:
        return UserWarning
    return category


def _received(limits: Limits, receiver: Connection, pid: int) -> _Message | None:
    """The child's message; None where it died without one."""
    before = resident_gigabytes(pid)
    while not receiver.poll(_POLL_SECONDS):
        if limits.left < 0:
            raise limits.error(f"{limits.seconds:g} s")
        if resident_gigabytes(pid) - before > limits.memory_gb:
            raise limits.error(f"{limits.memory_gb:g} GiB of memory")
    try:
        message = pickle.loads(receiver.recv_bytes())
    except (EOFError, OSError):
        return None
    assert isinstance(message, _Message)
    return message


def _run(sender: Connection, work: Callable[[], object]) -> None:
    torch.set_num_threads(1)
    result, error = None, None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result = in_place(work)
        except RlpruneError as ours:
            error = ours
    warned = [(str(w.message), _sendable(w.category)) for w in caught]
    try:
        sender.send_bytes(pickle.dumps(_Message(result, error, warned)))
    except Exception as failure:
        text = GraphError(f"tracing: the result cannot be handed over ({described(failure)})")
        sender.send_bytes(pickle.dumps(_Message(None, text, [])))
