"""``rlprune.benchmark``: methods compared from Python, as the command does it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..config.config import Config
from ..experiments.usage import check_usage
from ..report.results import Results
from ..utils.progress import Callback
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
    jobs: int = 1,
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
        jobs: processes.
        callback: is told of the progress; nothing is shown without one.

    Returns:
        The content of results.json: ``rows`` (one for each method, seed and budget) and ``summary``.

    Raises:
        ConfigError: an unknown method, or one that cannot run here; or a setting that nothing uses.
        RunError: cells have failed; the others are finished.
    """
    check_usage(config, "benchmark", methods=methods)
    folder = default_folder(config) if out is None else Path(out)
    asked = config.search.evaluations if evaluations is None else evaluations
    return run(
        config,
        methods,
        seeds,
        asked,
        folder,
        budgets=budgets,
        jobs=jobs,
        checkpoints=checkpoints,
        callback=callback or Callback(),
    )
