"""Workers of a Ray cluster: actors, one piece of work at a time each (extra `ray`; ray.io).

With an address they run on the machines of that cluster, where rlprune has to be installed; without one Ray starts a
cluster on this machine, which ends with us.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

from ..errors import ConfigError, one_line
from . import worker

_REACH_SECONDS = 10.0


class Actor:
    """What runs in a Ray worker."""

    def begin(self, message: bytes) -> bytes:
        return worker.begin(message)

    def work(self, message: bytes, *payloads: bytes) -> bytes:
        return worker.work(message, *payloads)


class RayWorker:
    """One actor; Ray chooses its machine and, where it holds any, its GPU."""

    def __init__(self, ray: Any, actor: Any) -> None:
        self._ray, self._actor = ray, actor

    def begin(self, message: bytes) -> Future[bytes]:
        return self._future(self._actor.begin.remote(message))

    def work(self, message: bytes, payloads: Sequence[object]) -> Future[bytes]:
        return self._future(self._actor.work.remote(message, *payloads))

    def _future(self, reference: Any) -> Future[bytes]:
        future: Future[bytes] = reference.future()
        return future

    def end(self) -> None:
        self._ray.kill(self._actor)

    def ending(self, error: BaseException) -> str:
        return f"Ray lost its actor ({type(error).__name__})"


class RayEngine:
    """A cluster of others, or one of our own with ``workers`` places.

    Args:
        address: `auto`, host:port, or ray://host:port; None starts a cluster.
        gpus: whether each worker takes a GPU, or its share of one.

    Raises ConfigError: no ray, or no such cluster.
    """

    name = "ray"
    local = False

    def __init__(self, address: str | None, workers: int | None, threads: int | None, gpus: bool) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nobody asked for telling others
        try:
            import ray
        except ImportError:
            raise ConfigError("execution.engine: ray needs `pip install 'rlprune[ray]'`") from None
        self._ray, self._threads = ray, threads or 1
        self._ours = not ray.is_initialized()
        if self._ours:
            _connect(ray, address, workers, self._threads)
        resources = ray.cluster_resources()
        self.room = max(1, int(resources.get("CPU", 1) // self._threads))
        self.workers = workers or self.room
        if self.workers > self.room:
            self._close()
            raise ConfigError(
                f"execution.workers: {self.workers} asked for, but the cluster has room for {self.room} "
                f"({resources.get('CPU', 0):.0f} CPUs, {self._threads} a worker)"
            )
        held = float(resources.get("GPU", 0.0)) if gpus else 0.0
        # Ray gives whole GPUs, or parts of one.
        self._gpus = min(1.0, held / self.workers) if held else 0.0

    def start(self, index: int) -> RayWorker:
        remote = self._ray.remote(Actor)
        options = {"num_cpus": self._threads, "num_gpus": self._gpus, "max_restarts": 0}
        return RayWorker(self._ray, remote.options(scheduling_strategy="SPREAD", **options).remote())

    def payload(self, packed: bytes) -> object:
        return self._ray.put(packed)

    def close(self) -> None:
        self._close()

    def _close(self) -> None:
        if self._ours and self._ray.is_initialized():
            self._ray.shutdown()


def _connect(ray: Any, address: str | None, workers: int | None, threads: int) -> None:
    if address is not None:
        _check_reachable(address)
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    try:
        if address is None:
            count = None if workers is None else workers * threads
            ray.init(num_cpus=count, include_dashboard=False, **quiet)
        else:
            ray.init(address=address, **quiet)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ConfigError(f"execution.address: no Ray cluster at {address!r} ({one_line(error)})") from error


def _check_reachable(address: str) -> None:
    """ConfigError where nobody answers at a host and port: Ray would try for minutes, and then end the program."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not host or not port.isdigit():
        return  # `auto` and the like, which Ray looks up
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_REACH_SECONDS):
            pass
    except (OSError, OverflowError) as error:
        raise ConfigError(f"execution.address: no Ray cluster at {address!r} ({one_line(error)})") from error
