"""A limit on time and memory for work that is not ours and may explode."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import threading
import time
from collections.abc import Iterator

from ..errors import GraphError

_POLL_SECONDS = 0.05


class _LimitReached(BaseException):
    """Raised inside the watched thread; a BaseException, so that `except Exception` lets it pass."""


def resident_gigabytes() -> float:
    """Memory this process holds now, in GiB (its peak where the system has no /proc)."""
    try:
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**30
    except (OSError, ValueError):
        try:
            import resource
        except ImportError:  # Windows
            return 0.0
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (2**30 if sys.platform == "darwin" else 2**20)


@contextlib.contextmanager
def limited(what: str, max_seconds: float, max_memory_gb: float) -> Iterator[None]:
    """Stop the Python code of the block with a GraphError when it runs too long or takes too much memory.

    ``max_memory_gb`` counts what the block adds to the process. A thread looks every 50 ms and raises
    in the watched one, which works for loops in Python (dependency tracing is one), not inside one
    long call into C.
    """
    finished = threading.Event()
    reason: list[str] = []
    lock = threading.Lock()
    caller = ctypes.c_ulong(threading.get_ident())
    start, memory = time.monotonic(), resident_gigabytes()

    def watch() -> None:
        while not finished.wait(_POLL_SECONDS):
            if time.monotonic() - start > max_seconds:
                text = f"took more than {max_seconds:g} s"
            elif resident_gigabytes() - memory > max_memory_gb:
                text = f"took more than {max_memory_gb:g} GiB of memory"
            else:
                continue
            with lock:
                if finished.is_set():
                    return
                reason[:] = [text]
                # Again at every look: foreign code may swallow it in a bare `except`.
                ctypes.pythonapi.PyThreadState_SetAsyncExc(caller, ctypes.py_object(_LimitReached))

    watcher = threading.Thread(target=watch, daemon=True, name="rlprune-watchdog")
    watcher.start()
    try:
        try:
            yield
        finally:
            with lock:
                finished.set()
                if reason:  # one may still be pending: it is cleared here
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(caller, None)
    except BaseException as error:
        if isinstance(error, _LimitReached) or reason:
            raise GraphError(f"{what} {reason[0]}; the model is not supported within these limits") from None
        raise
    if reason:
        raise GraphError(f"{what} {reason[0]}; the model is not supported within these limits")
