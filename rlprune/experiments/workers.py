"""The workers of a run: they score the candidates of its experiments and end with it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..config.config import Config
from ..evaluation.parallel import workers_of
from ..execution import make_executor
from .prepare import Experiment


@contextlib.contextmanager
def working(config: Config, experiments: Sequence[Experiment], logs: Path | None = None) -> Iterator[None]:
    """While active, the candidates of the experiments are scored by the workers that ``config.execution`` names.

    ``logs`` is a folder for what workers of this machine print. Raises ConfigError: see `execution.make_executor` and
    `evaluation.parallel.workers_of`.
    """
    executor = make_executor(config, logs)
    if executor.name == "serial":
        yield
        return
    try:
        for experiment in experiments:
            experiment.evaluator.use_workers(workers_of(experiment.evaluator, executor, experiment.rebuild))
        yield
    finally:
        for experiment in experiments:
            experiment.evaluator.use_workers(None)
        executor.close()
