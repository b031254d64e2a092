"""A worker of a benchmark: ``python -m rlprune.benchmarks.worker``, started by `benchmarks.pool`.

It reads JSON lines: first the order {"config", "cells", "plugins"}, then one cell after the other. It answers on its
standard output with {"ready": true}, {"progress": [spent, limit, best score]} and, for each cell, {"done": true} or
{"failed": reason}; what a cell holds goes into the cell's file. Whatever else is printed goes to standard error.

When its standard input ends (the benchmark has stopped or was killed) it ends at once, wherever it is: cells are
made to be killed, and no worker outlives its benchmark. It stands outside of the package `benchmark` so that it
listens before the seconds that importing torch takes.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from ..agents.callbacks import Progress

PROGRESS_SECONDS = 1.0


def main() -> int:
    """Prepare the first experiment, then work until the standard input ends."""
    # Ctrl-C goes to the whole group of processes: the benchmark decides, and then closes our input.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    work: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(work,), daemon=True).start()
    order = json.loads(work.get())

    from ..config.config import Config
    from ..plugins import load
    from ..utils.exits import own_exits_named
    from ..utils.progress import Callback
    from .cells import Cell, PreparedExperiments, compute, reason

    load(order["plugins"])
    experiments = PreparedExperiments(Config.from_dict(order["config"]))
    with own_exits_named():
        experiments.of(0)
    _answer(answers, {"ready": True})
    while True:
        cell = Cell(**json.loads(work.get()))
        try:
            with own_exits_named():
                compute(experiments, cell, Path(order["cells"]), Callback(), _reporter(answers))
        except Exception as error:
            traceback.print_exc()
            _answer(answers, {"failed": reason(error)})
        else:
            _answer(answers, {"done": True})


def _listen(work: queue.SimpleQueue[str]) -> None:
    for line in sys.stdin:
        work.put(line)
    os._exit(0)


def _answer(answers: TextIO, message: Mapping[str, object]) -> None:
    answers.write(json.dumps(message) + "\n")
    answers.flush()


def _reporter(answers: TextIO) -> Callable[[Progress], None]:
    """Passes the progress of a search on, at most once a second."""
    last = 0.0

    def report(state: Progress) -> None:
        nonlocal last
        if time.monotonic() - last >= PROGRESS_SECONDS:
            last = time.monotonic()
            best = state.best_score if state.best_score > float("-inf") else None
            _answer(answers, {"progress": [state.spent, state.limit, best]})

    return report


if __name__ == "__main__":
    sys.exit(main())
