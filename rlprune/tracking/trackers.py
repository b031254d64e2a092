"""MLflow, Weights & Biases and trackio behind the protocol of :class:`Tracker`; each needs the extra of its name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from ..config.names import TRACKER_NAMES
from ..errors import ConfigError, near_miss
from .base import Tracker

# MLflow refuses parameters whose value is longer.
_LONGEST = 500


def _package(name: str) -> ModuleType:
    try:
        return import_module(name)
    except ImportError:
        raise ConfigError(f"search.trackers: {name} needs `pip install 'rlprune[{name}]'`") from None


class MLflowTracker:
    """An MLflow run (https://mlflow.org/docs/latest/ml/tracking): parameters, metrics, artifacts.

    Where it goes is MLflow's own business: MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME, or a local store.

    Args:
        experiment: MLflow's experiment; that of its environment, or `rlprune`, when not given.
    """

    def __init__(self, experiment: str | None = None) -> None:
        self._mlflow = _package("mlflow")
        self._experiment = experiment

    def begin(self, name: str, settings: Mapping[str, object]) -> None:
        """See :class:`Tracker`."""
        import os

        wanted = self._experiment or (None if "MLFLOW_EXPERIMENT_NAME" in os.environ else "rlprune")
        if wanted is not None:
            self._mlflow.set_experiment(wanted)
        self._mlflow.start_run(run_name=name)
        self._mlflow.log_params({key: str(value)[:_LONGEST] for key, value in settings.items()})

    def log(self, values: Mapping[str, float], step: int) -> None:
        """See :class:`Tracker`."""
        self._mlflow.log_metrics(dict(values), step=step)

    def end(self, summary: Mapping[str, float], files: Sequence[Path]) -> None:
        """See :class:`Tracker`."""
        self._mlflow.log_metrics({f"result/{name}": value for name, value in summary.items()})
        for path in files:
            self._mlflow.log_artifact(str(path))
        self._mlflow.end_run()


class WandbTracker:
    """A run of Weights & Biases (https://docs.wandb.ai): config, history, summary, files.

    Log in, project and offline mode are those of `wandb` (WANDB_MODE=offline needs no account).

    Args:
        project: that of the environment (WANDB_PROJECT), or `rlprune`, when not given.
    """

    def __init__(self, project: str | None = None) -> None:
        self._wandb = _package("wandb")
        self._project = project
        self._run: Any = None

    def begin(self, name: str, settings: Mapping[str, object]) -> None:
        """See :class:`Tracker`."""
        import os

        project = self._project or os.environ.get("WANDB_PROJECT", "rlprune")
        self._run = self._wandb.init(project=project, name=name, config=dict(settings))
        self._axes: set[str] = set()

    def log(self, values: Mapping[str, float], step: int) -> None:
        """See :class:`Tracker`; each phase has an axis of its own, for wandb's step may only grow."""
        for phase in {name.partition("/")[0] for name in values} - self._axes:
            self._run.define_metric(f"{phase}/*", step_metric=f"{phase}/step")
            self._axes.add(phase)
        steps = {f"{name.partition('/')[0]}/step": step for name in values}
        self._run.log({**values, **steps})

    def end(self, summary: Mapping[str, float], files: Sequence[Path]) -> None:
        """See :class:`Tracker`."""
        self._run.summary.update({f"result/{name}": value for name, value in summary.items()})
        for path in files:
            self._run.save(str(path), base_path=str(path.parent), policy="now")
        self._run.finish()


class TrackioTracker:
    """A run of trackio (https://huggingface.co/docs/trackio), which keeps everything in a local file.

    Args:
        project: trackio's project.
    """

    def __init__(self, project: str = "rlprune") -> None:
        self._trackio = _package("trackio")
        self._project = project

    def begin(self, name: str, settings: Mapping[str, object]) -> None:
        """See :class:`Tracker`."""
        self._trackio.init(project=self._project, name=name, config=dict(settings))

    def log(self, values: Mapping[str, float], step: int) -> None:
        """See :class:`Tracker`; the step is a figure of the phase, for trackio's own counts all calls."""
        steps = {f"{name.partition('/')[0]}/step": step for name in values}
        self._trackio.log({**values, **steps})

    def end(self, summary: Mapping[str, float], files: Sequence[Path]) -> None:
        """See :class:`Tracker`; files stay where they are."""
        self._trackio.log({f"result/{name}": value for name, value in summary.items()})
        self._trackio.finish()


TRACKERS: dict[str, Callable[[], Tracker]] = {
    "mlflow": MLflowTracker,
    "wandb": WandbTracker,
    "trackio": TrackioTracker,
}
"""Name in `search.trackers` -> what makes one."""
assert set(TRACKERS) == set(TRACKER_NAMES)


def make_tracker(name: str) -> Tracker:
    """A tracker by its name; ConfigError for an unknown one, or where its package is not installed."""
    if name not in TRACKERS:
        raise ConfigError(
            f"search.trackers: unknown tracker {name!r}{near_miss(name, TRACKERS)}; allowed: {', '.join(TRACKERS)}"
        )
    return TRACKERS[name]()
