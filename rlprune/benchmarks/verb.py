"""``rlprune.benchmark``: methods compared from Python, as the command does it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..config.config import Config
from ..errors import ConfigError
from ..experiments.usage import check_usage
from ..report.results import Results
from ..utils.progress import Callback, default_callback
from .benchmark import run


def default_folder(config: Config) -> Path:
    """Where a benchmark is kept unless told: ``runs/NAME-benchmark``."""
    return Path("runs") / f"{config.name}-benchmark"


def benchmark(
    config: Config,
    methods: Sequence[str] | None = None,
    *,
    seeds: int = 5,
    evaluations: int | None = None,
    out: str | Path | None = None,
    budgets: Sequence[str | float] = (),
    checkpoints: int = 1,
    jobs: int | None = None,
    callback: Callback | None = None,
) -> Results:
    """Compare rules and agents under the same budget, recovery, evaluations and fine-tune, with paired seeds.

    Args:
        methods: names of rules and agents; all that can run when not given.
        seeds: seeds of each method, from ``config.seed`` upwards.
        evaluations: distinct plans that each agent may have scored; those of the settings when not given.
        out: folder of the tables, plots and finished cells, which are reused; ``runs/NAME-benchmark`` when not given.
        budgets: several budgets, instead of that of the settings.
        checkpoints: dense models, which the seeds take in turn.
        jobs: short for the settings ``execution.engine: processes`` with so many ``execution.workers``.
        callback: is told of the progress; by default bars on a terminal, else nothing.

    Returns:
        The content of results.json: ``rows`` (one for each method, seed and budget) and ``summary``.

    Raises:
        ConfigError: an unknown method, or one that cannot run here; or a setting that nothing uses; or jobs and an
            engine.
        RunError: cells have failed; the others are finished.
    """
    check_usage(config, "benchmark", methods=methods)
    config = _with_jobs(config, jobs)
    folder = default_folder(config) if out is None else Path(out)
    asked = config.search.evaluations if evaluations is None else evaluations
    return run(
        config,
        methods,
        seeds,
        asked,
        folder,
        budgets=budgets,
        checkpoints=checkpoints,
        callback=callback or default_callback(),
    )


def _with_jobs(config: Config, jobs: int | None) -> Config:
    if jobs is None:
        return config
    if jobs < 1:
        raise ConfigError(f"--jobs {jobs}: must be at least 1")
    engine = config.execution.engine
    if engine != "serial":
        raise ConfigError(
            f"--jobs {jobs}: is short for processes, and the engine is {engine}; give --workers"
        )
    if jobs == 1:
        return config
    return replace(config, execution=replace(config.execution, engine="processes", workers=jobs))
