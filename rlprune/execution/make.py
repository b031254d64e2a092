"""From settings to an executor."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch

from ..config.config import Config
from ..config.execution import ExecutionConfig
from .base import Executor
from .crew import Crew
from .serial import SerialExecutor

Settings = TypeVar("Settings", bound=Config)


def make_executor(config: Config, logs: Path | None = None) -> Executor:
    """The executor that the settings name; it has to be closed.

    Args:
        logs: folder for what workers of this machine print.

    Raises ConfigError: ray is not installed, or there is no such cluster, or no room in it.
    """
    settings, threads = config.execution, config.threads
    if settings.engine == "processes":
        from .processes import ProcessEngine

        workers = settings.workers or max(1, cores() // (threads or 1))
        engine = ProcessEngine(threads, gpus_in_turn(config.device))
        return Crew(engine, workers, threads=threads, logs=logs)
    if settings.engine == "ray":
        from .ray_cluster import RayEngine

        cluster = RayEngine(settings.address, settings.workers, threads, gpus_in_turn(config.device) > 0)
        return Crew(cluster, cluster.workers, threads=threads)
    return SerialExecutor()


def with_threads(config: Settings) -> Settings:
    """The settings, with threads of their own for each worker where they name none.

    All of a run computes on as many threads, workers or not: a sum rounds otherwise on another number of them.
    """
    settings = config.execution
    if settings.engine == "serial" or config.threads is not None:
        return config
    return replace(config, threads=default_threads(settings))


def default_threads(settings: ExecutionConfig) -> int:
    """The machine's cores shared out among its workers; 1 on a cluster, whose machines are not known."""
    if settings.engine == "ray" or settings.workers is None:
        return 1
    return max(1, cores() // settings.workers)


def gpus_in_turn(device: str) -> int:
    """GPUs that workers take turns with; 0 where they compute on the CPU or on the one that the settings name."""
    named_none = device in ("auto", "cuda")
    return torch.cuda.device_count() if named_none and torch.cuda.is_available() else 0


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
