"""What runs in a worker: it is told how to begin, then does one piece of work after the other.

Only messages of the process that started it reach it, through the engine's own channel; no file is read.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import cloudpickle

from .base import Preparation, Shared

_KEPT: dict[int, object] = {}
_WATCH_SECONDS = 0.5
_FORGOT = 70


@dataclass(frozen=True)
class Start:
    """How a worker begins.

    ``threads`` are torch's; ``path`` is where the parent imports from; ``log`` takes what is printed; ``parent`` is the
    process without which a worker of the same machine ends.
    """

    threads: int | None
    path: Sequence[str] = ()
    log: Path | None = None
    parent: int | None = None
    preparations: Sequence[Preparation] = field(default_factory=tuple)


@dataclass(frozen=True)
class Reference:
    """The place of a shared value among the arguments."""

    number: int


@dataclass(frozen=True)
class Reply:
    """What became of a piece of work: a result, or an error with its traceback in words."""

    result: object = None
    error: BaseException | None = None
    trace: str = ""


def begin(message: bytes) -> bytes:
    """The first message of a worker: a `Start`, whose path is needed to read the rest of it."""
    _ignore_interrupts()
    path, rest = cloudpickle.loads(message)
    sys.path += [folder for folder in path if folder not in sys.path]
    try:
        start = cloudpickle.loads(rest)
        if start.log is not None:
            _print_to(start.log)
        if start.parent is not None:
            threading.Thread(target=_watch, args=(start.parent,), daemon=True).start()
        if start.threads is not None:
            import torch

            torch.set_num_threads(start.threads)
        for preparation in start.preparations:
            preparation()
    except BaseException as error:
        return _packed(Reply(error=error, trace=traceback.format_exc()))
    return _packed(Reply())


def packed_start(start: Start) -> bytes:
    return bytes(cloudpickle.dumps((list(start.path), cloudpickle.dumps(start))))


def work(message: bytes, *payloads: bytes) -> bytes:
    """Do a piece of work; ``payloads`` are the shared values that it is the first here to need."""
    try:
        content, new, kept = cloudpickle.loads(message)
        for number in set(_KEPT) - set(kept):
            del _KEPT[number]
        for number, payload in zip(new, payloads, strict=True):
            _KEPT[number] = cloudpickle.loads(payload)
        if any(number not in _KEPT for number in kept):
            os._exit(
                _FORGOT
            )  # a fresh process in the place of one that was told: it counts as lost, and is told anew
        function, arguments = cloudpickle.loads(content)
        filled = [_KEPT[a.number] if isinstance(a, Reference) else a for a in arguments]
        return _packed(Reply(function(*filled)))
    except BaseException as error:
        return _packed(Reply(error=error, trace=traceback.format_exc()))


def packed_work(function: object, arguments: Sequence[object]) -> bytes:
    """Function and arguments, with the numbers of shared values in their places."""
    plain = [Reference(a.number) if isinstance(a, Shared) else a for a in arguments]
    return bytes(cloudpickle.dumps((function, plain)))


def packed_message(content: bytes, new: Sequence[int], kept: Sequence[int]) -> bytes:
    """The message of a piece of work to a worker that gets the values ``new`` with it and keeps ``kept``."""
    return bytes(cloudpickle.dumps((content, list(new), list(kept))))


def unpacked(reply: bytes) -> Reply:
    found: Reply = cloudpickle.loads(reply)
    return found


def _packed(reply: Reply) -> bytes:
    try:
        packed = cloudpickle.dumps(reply)
        if reply.error is not None:
            cloudpickle.loads(packed)  # errors with arguments of their own are pickled, but not read
        return bytes(packed)
    except Exception as error:
        told = reply.error if reply.error is not None else error
        return bytes(
            cloudpickle.dumps(Reply(error=RuntimeError(f"{type(told).__name__}: {told}"), trace=reply.trace))
        )


def _ignore_interrupts() -> None:
    # Ctrl-C goes to the whole group of processes: the parent decides, and then ends its workers.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _print_to(log: Path) -> None:
    stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(stream, 1)
    os.dup2(stream, 2)


def _watch(parent: int) -> None:
    """End with the parent, wherever the work is: it is made to be killed."""
    while os.getppid() == parent:
        time.sleep(_WATCH_SECONDS)
    os._exit(1)


def environment(index: int, threads: int | None, gpus: int, visible: str | None) -> Mapping[str, str]:
    """Environment of worker ``index`` of a machine: its CPU threads, and one of the ``gpus`` in turn.

    Args:
        gpus: how many to take turns with; 0 leaves the choice to the settings.
        visible: CUDA_VISIBLE_DEVICES of the parent, whose GPUs these are.
    """
    found: dict[str, str] = {}
    if threads is not None:
        found |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    if gpus:
        names = [name.strip() for name in visible.split(",")] if visible else [str(i) for i in range(gpus)]
        found["CUDA_VISIBLE_DEVICES"] = names[index % gpus]
    return found
