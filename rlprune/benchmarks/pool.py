"""The cells of a benchmark in parallel processes: who takes which, and what happens when one fails."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from ..errors import RunError
from .cells import Cell, to_message

MODULE = "rlprune.benchmarks.worker"
Events = queue.SimpleQueue[tuple["Worker", dict[str, Any] | None]]


@dataclass
class Worker:
    """A process, the cell that it works on, and how far its search is."""

    process: subprocess.Popen[str]
    log: Path
    cell: Cell | None = None
    ready: bool = False
    progress: Sequence[Any] = field(default_factory=tuple)

    def send(self, message: Mapping[str, object]) -> None:
        """Write a line to the worker; one that has just died is noticed by the end of its answers."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()

    def dismiss(self) -> None:
        """Close the worker's input, which ends it."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()

    def ending(self) -> str:
        """Why the process has ended, in words."""
        code = self.process.wait()
        if code < 0:
            name = signal.Signals(-code).name
            more = " (out of memory?)" if name == "SIGKILL" else ""
            return f"its process was ended by {name}{more}"
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return f"its process ended with exit code {code}: {lines[-1].strip() if lines else 'no message'}"


class Pool:
    """``jobs`` workers, each with the experiment prepared once; used as a context that leaves none behind.

    Args:
        order: what every worker is told first (see `benchmark_worker`).
        threads: CPU threads of each of them.
        logs: folder for worker-N.log, what the workers print.
    """

    def __init__(self, order: Mapping[str, object], jobs: int, threads: int, logs: Path) -> None:
        self._order, self._jobs, self._threads, self._logs = order, jobs, threads, logs
        self._events: Events = queue.SimpleQueue()
        self.workers: list[Worker] = []

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.workers:
            worker.dismiss()
        for worker in self.workers:
            try:
                worker.process.wait(timeout=5.0)
            except subprocess.TimeoutExpired:
                worker.process.kill()
                worker.process.wait()
            if not worker.log.stat().st_size:
                worker.log.unlink()

    def run(
        self,
        pending: Sequence[Cell],
        take: Callable[[list[Cell]], Cell],
        ended: Callable[[Cell, str | None], None],
        progress: Callable[[Sequence[Worker]], None],
    ) -> None:
        """Compute all cells; a cell that fails is not tried again, and the others go on.

        Args:
            take: which of the cells that are left comes next.
            ended: called after every cell, with the reason where it has failed.
            progress: called with the workers that are at work whenever one of them reports.

        Raises RunError when no worker can prepare the experiment.
        """
        left = list(pending)
        while len(self.workers) < min(self._jobs, len(left)):
            self._start()
        while left or any(worker.cell for worker in self.workers):
            worker, message = self._next_event()
            if message is None:
                self._lost(worker, bool(left), ended)
            elif "progress" in message:
                worker.progress = message["progress"]
                progress([w for w in self.workers if w.cell])
                continue
            else:
                cell, worker.cell, worker.ready = worker.cell, None, True
                if cell is not None:
                    ended(cell, message.get("failed"))
            for idle in self.workers:
                if idle.ready and idle.cell is None and left:
                    idle.cell, idle.progress = take(left), ()
                    left.remove(idle.cell)
                    idle.send(to_message(idle.cell))

    def _next_event(self) -> tuple[Worker, dict[str, Any] | None]:
        while True:
            try:  # with a time limit, since on Windows nothing interrupts a wait without one
                return self._events.get(timeout=1.0)
            except queue.Empty:
                continue

    def _lost(self, worker: Worker, more: bool, ended: Callable[[Cell, str | None], None]) -> None:
        """A worker has died: its cell has failed, and another worker takes its place where there is work."""
        self.workers.remove(worker)
        worker.dismiss()
        why = worker.ending()
        if not worker.ready:  # another one would fare no better; those that are there go on
            if not self.workers:
                raise RunError(f"no worker could prepare the experiment: {why}; see {worker.log}")
            return
        if worker.cell is not None:
            ended(worker.cell, f"{why}; see {worker.log}")
        if more:
            self._start()

    def _start(self) -> None:
        numbers = {worker.log.name for worker in self.workers}
        name = next(n for i in range(1, self._jobs + 1) if (n := f"worker-{i}.log") not in numbers)
        environment = os.environ | {
            "OMP_NUM_THREADS": str(self._threads),
            "MKL_NUM_THREADS": str(self._threads),
            # What this process can import its workers can import as well.
            "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
        }
        with (self._logs / name).open("w", encoding="utf-8") as log:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", MODULE],  # -P: not the folder we stand in
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
                text=True,
                encoding="utf-8",
            )
        worker = Worker(process, self._logs / name)
        self.workers.append(worker)
        assert process.stdout is not None
        threading.Thread(target=self._read, args=(worker, process.stdout), daemon=True).start()
        worker.send(self._order)

    def _read(self, worker: Worker, answers: IO[str]) -> None:
        with answers:
            for line in answers:
                self._events.put((worker, json.loads(line)))
        self._events.put((worker, None))
