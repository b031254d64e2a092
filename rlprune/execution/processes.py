"""Workers of this machine: processes of joblib's loky, one executor each, so that one that dies takes none with it."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from concurrent.futures import Future

from joblib.externals.loky import ProcessPoolExecutor

from . import worker
from .loky_internals import keep_this_worker


class ProcessWorker:
    """A process with its own environment."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._pool = ProcessPoolExecutor(max_workers=1, env=environment)

    def begin(self, message: bytes) -> Future[bytes]:
        return self._submit(_begin, message)

    def work(self, message: bytes, payloads: Sequence[object]) -> Future[bytes]:
        return self._submit(worker.work, message, *payloads)

    def _submit(self, *call: object) -> Future[bytes]:
        future: Future[bytes] = self._pool.submit(*call)
        return future

    def end(self) -> None:
        self._pool.shutdown(wait=True, kill_workers=True)

    def ending(self, error: BaseException) -> str:
        text = str(error)
        for code in signal.Signals:
            if f"{code.name}(-{code.value})" in text:
                more = " (out of memory?)" if code.name == "SIGKILL" else ""
                return f"its process was ended by {code.name}{more}"
        return f"its process ended ({type(error).__name__})"


def _begin(message: bytes) -> bytes:
    keep_this_worker()
    return worker.begin(message)


class ProcessEngine:
    """Starts processes with so many threads, on the GPUs in turn (0: where the settings say)."""

    name = "processes"
    local = True

    def __init__(self, threads: int | None, gpus: int) -> None:
        self._threads, self._gpus = threads, gpus

    def start(self, index: int) -> ProcessWorker:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        return ProcessWorker(dict(worker.environment(index, self._threads, self._gpus, visible)))

    def payload(self, packed: bytes) -> object:
        return packed

    def close(self) -> None:
        """Each worker has been ended by itself."""
