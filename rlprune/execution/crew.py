"""Workers of any engine: who takes which piece of work, and what happens when one of them dies.

A worker does one piece of work at a time, so that what died with it is known. One thread of this process hands the
work out; the caller only waits for futures.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import cloudpickle

from ..errors import RlpruneError, RunError, described, one_line
from ..utils.progress import logger
from .base import NoWorkers, Result, Shared, Value, preparations
from .worker import Reply, Start, packed_message, packed_start, packed_work, unpacked

# Workers that may die over a piece of work before it is given up.
MOST_LOST = 3
# A worker that has not begun after so many seconds, while no other works, never will: a cluster has no room for it.
START_SECONDS = 600.0


class Worker(Protocol):
    """One worker of an engine. A future's error means that the worker is lost; what the work raises is in the reply."""

    def begin(self, message: bytes) -> Future[bytes]: ...
    def work(self, message: bytes, payloads: Sequence[object]) -> Future[bytes]: ...
    def end(self) -> None:
        """End it at once, whatever it does."""

    def ending(self, error: BaseException) -> str:
        """Why it was lost, in words."""


class Engine(Protocol):
    """Starts workers, and knows how a shared value gets to them."""

    @property
    def name(self) -> str: ...
    @property
    def local(self) -> bool:
        """Whether the workers are children of this process."""

    def start(self, index: int) -> Worker: ...
    def payload(self, packed: bytes) -> object:
        """What `Worker.work` takes for a shared value."""

    def close(self) -> None: ...


@dataclass
class _Piece:
    """Work that was handed in."""

    content: bytes
    payloads: dict[int, object]
    future: Future[Any]
    lost: int = 0


@dataclass
class _Place:
    """A worker, what it has in hand, and which shared values it holds."""

    index: int
    worker: Worker
    log: Path | None
    since: float
    ready: bool = False
    piece: _Piece | None = None
    holds: set[int] = field(default_factory=set)


class Crew:
    """An executor on the workers of an engine.

    Args:
        workers: most that work at the same time; they start when there is work for them.
        threads: torch's CPU threads in each; None leaves torch's choice.
        logs: folder for worker-N.log, what the workers of this machine print; an empty one is removed.
    """

    def __init__(
        self, engine: Engine, workers: int, *, threads: int | None = None, logs: Path | None = None
    ) -> None:
        self._engine, self.workers, self._threads, self._logs = engine, workers, threads, logs
        self._events: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._waiting: deque[_Piece] = deque()
        self._places: list[_Place] = []
        self._payloads: dict[int, object] = {}
        self._closing = False
        self._failed_starts = 0
        self._thread: threading.Thread | None = None

    @property
    def name(self) -> str:
        return self._engine.name

    def submit(self, work: Callable[..., Result], *arguments: object) -> Future[Result]:
        """See :class:`Executor`.

        The future raises NoWorkers where none can be started, and RunError where three have died over this work.
        """
        payloads = {a.number: self._payload(a) for a in arguments if isinstance(a, Shared)}
        piece = _Piece(packed_work(work, arguments), payloads, Future())
        self._tell(partial(self._add, piece))
        return piece.future

    def _payload(self, shared: Shared[Any]) -> object:
        if shared.number not in self._payloads:
            self._payloads[shared.number] = self._engine.payload(cloudpickle.dumps(shared.value))
        return self._payloads[shared.number]

    def drop(self, shared: Shared[Value]) -> None:
        self._payloads.pop(shared.number, None)

    def close(self) -> None:
        if self._thread is not None:
            self._tell(self._end)
            self._thread.join()
        self._engine.close()

    def _tell(self, event: Callable[[], None]) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, daemon=True, name="rlprune-crew")
            self._thread.start()
        self._events.put(event)

    # All that follows runs in the one thread that hands out work.

    def _run(self) -> None:
        try:
            while not self._closing:
                try:
                    self._events.get(timeout=5.0)()
                except queue.Empty:
                    self._check_starts()
                self._hand_out()
        except Exception as error:  # nobody else would answer those who wait
            logger.exception("handing out work failed")
            self._end(f"handing out work failed: {described(error)}")

    def _add(self, piece: _Piece) -> None:
        self._waiting.append(piece)

    def _end(self, why: str = "the workers were ended before this was done") -> None:
        self._closing = True
        for place in self._places:
            place.worker.end()
            self._forget_log(place)
        for piece in [*self._waiting, *(p.piece for p in self._places if p.piece is not None)]:
            if not piece.future.cancel() and not piece.future.done():
                piece.future.set_exception(RunError(why))

    def _hand_out(self) -> None:
        idle = [place for place in self._places if place.ready and place.piece is None]
        while idle and self._waiting:
            piece = self._waiting.popleft()
            if piece.lost or piece.future.set_running_or_notify_cancel():
                self._give(idle.pop(0), piece)
        starting = sum(not place.ready for place in self._places)
        while len(self._waiting) > starting and len(self._places) < self.workers and not self._closing:
            self._start()
            starting += 1

    def _give(self, place: _Place, piece: _Piece) -> None:
        new = [number for number in piece.payloads if number not in place.holds]
        place.piece = piece
        place.holds = {n for n in place.holds if n in self._payloads} | set(piece.payloads)
        message = packed_message(piece.content, new, sorted(place.holds))
        try:
            answer = place.worker.work(message, [piece.payloads[n] for n in new])
        except Exception as error:  # it has died since its last answer
            answer = Future()
            answer.set_exception(error)
        answer.add_done_callback(lambda done: self._events.put(partial(self._done, place, done)))

    def _done(self, place: _Place, answer: Future[bytes]) -> None:
        if self._closing or place not in self._places:
            return
        if answer.exception() is not None:
            self._lost(place, answer.exception() or RunError())
            return
        piece, place.piece = place.piece, None
        assert piece is not None
        _settle(piece.future, answer.result())

    def _start(self) -> None:
        taken = {place.index for place in self._places}
        index = next(i for i in range(self.workers) if i not in taken)
        log = None
        if self._logs is not None and self._engine.local:
            log = (self._logs / f"worker-{index + 1}.log").absolute()
            log.write_bytes(b"")
        start = Start(
            self._threads,
            [folder or os.getcwd() for folder in sys.path],
            log,
            os.getpid() if self._engine.local else None,
            preparations(),
        )
        place = _Place(index, self._engine.start(index), log, time.monotonic())
        self._places.append(place)
        answer = place.worker.begin(packed_start(start))
        answer.add_done_callback(lambda done: self._events.put(partial(self._begun, place, done)))

    def _begun(self, place: _Place, answer: Future[bytes]) -> None:
        if self._closing or place not in self._places:
            return
        error = answer.exception()
        reply = Reply(error=error) if error is not None else unpacked(answer.result())
        if reply.error is None:
            place.ready, self._failed_starts = True, 0
        elif error is None:
            ours = isinstance(reply.error, RlpruneError)
            self._remove(place, one_line(reply.error, None) if ours else described(reply.error, None))
        elif (
            self._failed_starts < MOST_LOST - 1
        ):  # it may have been the machine's fault: another one may begin
            self._failed_starts += 1
            logger.warning(
                "a worker was lost before it began (%s); another one starts", self._why(place, error)
            )
            self._places.remove(place)
            place.worker.end()
        else:
            self._remove(place, self._why(place, error))

    def _why(self, place: _Place, error: BaseException) -> str:
        said = ""
        if place.log is not None:
            lines = [text for text in place.log.read_text(errors="replace").splitlines() if text.strip()]
            said = f": {lines[-1].strip()}" if lines else ""
        return f"{place.worker.ending(error)}{said}" + (f"; see {place.log}" if said else "")

    def _remove(self, place: _Place, why: str) -> None:
        """A worker that cannot start is not replaced: another one would fare no better; those that are there go on."""
        self._places.remove(place)
        place.worker.end()
        self.workers = max(1, self.workers - 1)
        if not self._places:
            self._give_up(f"no worker could be started: {why}")

    def _give_up(self, why: str) -> None:
        while self._waiting:
            piece = self._waiting.popleft()
            if piece.lost or piece.future.set_running_or_notify_cancel():
                piece.future.set_exception(NoWorkers(why))

    def _lost(self, place: _Place, error: BaseException) -> None:
        """A worker has died: what it had in hand is done again by another one."""
        why = self._why(place, error)
        self._places.remove(place)
        place.worker.end()
        piece = place.piece
        assert piece is not None
        piece.lost += 1
        if piece.lost < MOST_LOST:
            logger.warning("a worker was lost (%s); its work is done again", why)
            self._waiting.appendleft(piece)
        else:
            piece.future.set_exception(RunError(f"{MOST_LOST} workers were lost over the same work: {why}"))

    def _check_starts(self) -> None:
        late = [p for p in self._places if not p.ready and time.monotonic() - p.since > START_SECONDS]
        if late and len(late) == len(self._places):
            for place in late:
                self._remove(
                    place, f"not begun after {START_SECONDS:.0f} s; is there room for {self.workers}?"
                )

    def _forget_log(self, place: _Place) -> None:
        if place.log is not None and place.log.is_file() and not place.log.stat().st_size:
            place.log.unlink()


def _settle(future: Future[Any], answer: bytes) -> None:
    reply = unpacked(answer)
    if reply.error is None:
        future.set_result(reply.result)
    elif isinstance(reply.error, Exception):
        reply.error.add_note(reply.trace)
        future.set_exception(reply.error)
    else:  # Ctrl-C and sys.exit end the work, not this process
        future.set_exception(RunError(f"{type(reply.error).__name__} in a worker: {reply.error}"))
