"""Where work runs: in this process, in processes of this machine, or on the machines of a Ray cluster."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..utils.lazy import lazy_names

if TYPE_CHECKING:
    from .base import Executor, Shared, in_every_worker
    from .crew import Crew, Engine, Worker
    from .make import make_executor, with_threads
    from .serial import SerialExecutor

__all__ = [
    "Crew",
    "Engine",
    "Executor",
    "SerialExecutor",
    "Shared",
    "Worker",
    "in_every_worker",
    "make_executor",
    "with_threads",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "Crew": "crew",
        "Engine": "crew",
        "Executor": "base",
        "SerialExecutor": "serial",
        "Shared": "base",
        "Worker": "crew",
        "in_every_worker": "base",
        "make_executor": "make",
        "with_threads": "make",
    },
)
