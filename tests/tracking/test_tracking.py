"""Trackers by one protocol, and the evaluation log as Optuna studies."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import rlprune
from helpers.small import SMALL_RUN
from rlprune.cli.main import main
from rlprune.config.names import TRACKER_NAMES
from rlprune.tracking import TRACKERS, Together, TrackingCallback, make_tracker, to_optuna
from rlprune.utils.progress import Callback


class Recorder:
    """A tracker that keeps what it is told."""

    def __init__(self) -> None:
        self.settings: dict[str, Any] = {}
        self.logged: list[tuple[dict[str, float], int]] = []
        self.summary: dict[str, float] = {}
        self.files: list[Path] = []
        self.name = ""

    def begin(self, name: str, settings: Mapping[str, Any]) -> None:
        self.name, self.settings = name, dict(settings)

    def log(self, values: Mapping[str, float], step: int) -> None:
        self.logged.append((dict(values), step))

    def end(self, summary: Mapping[str, float], files: Sequence[Path]) -> None:
        self.summary, self.files = dict(summary), list(files)


class Counts(Callback):
    def __init__(self, stop: bool = False) -> None:
        self.seen, self.asked, self.stop = 0, 0, stop

    def on_progress(self, event: object) -> None:
        self.seen += 1

    def should_stop(self) -> bool:
        self.asked += 1
        return self.stop


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recorder, Path]:
    """A small run that a tracker of a user's own was told of."""
    out = tmp_path_factory.mktemp("tracked") / "run"
    recorder = Recorder()
    config = rlprune.load_config("digits", [*SMALL_RUN, "search.baselines=[]"])
    rlprune.train(config, out, callback=TrackingCallback(recorder))
    return recorder, out


def test_a_tracker_is_told_settings_figures_and_the_result(tracked: tuple[Recorder, Path]) -> None:
    recorder, out = tracked
    assert recorder.name == "digits" and recorder.settings["model.arguments.width"] == 4
    steps = [step for values, step in recorder.logged if "ppo/best_score" in values]
    assert steps == sorted(steps) and steps[-1] == 6
    assert any("/loss" in name for values, _ in recorder.logged for name in values), "the training's loss too"
    rows = {row["method"]: row for row in json.loads((out / "results.json").read_text())["rows"]}
    assert recorder.summary["ppo/test_finetuned"] == rows["ppo"]["test_finetuned"]
    assert "dense/test_loss" in recorder.summary
    assert [path.name for path in recorder.files] == ["report.html", "results.json"]


def test_together_tells_everybody_and_asks_everybody() -> None:
    first, second = Counts(stop=True), Counts()
    both = Together([first, second])
    both.status("ppo", 1, 2)
    assert (first.seen, second.seen) == (1, 1)
    assert both.should_stop() and second.asked == 1
    assert not Together([second]).should_stop()


def test_a_tracker_is_a_setting(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(TRACKERS) == set(TRACKER_NAMES)
    assert main(["train", "digits", "--set", "search.trackers=[mlfow]"]) == 2
    assert "search.trackers" in (text := capsys.readouterr().err) and "mlflow" in text
    for name in TRACKER_NAMES:
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(rlprune.ConfigError, match=rf"needs `pip install 'rlprune\[{name}\]'`"):
            make_tracker(name)
    assert main(["inspect", "digits", "--set", "search.trackers=[mlflow]"]) == 2


class Fake(ModuleType):
    """A package that notes every call by name and gives itself back, as their runs do."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        self.summary: dict[str, float] = {}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def called(*args: Any, **options: Any) -> Fake:
            self.calls.append((name, args, options))
            return self

        return called


@pytest.mark.parametrize("name", TRACKER_NAMES)
def test_each_package_gets_settings_curve_and_result(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Against fakes; `test_the_real_package` runs the packages themselves where they are installed."""
    fake = Fake(name)
    monkeypatch.setitem(sys.modules, name, fake)
    tracker = make_tracker(name)
    tracker.begin("digits", {"seed": 3})
    tracker.log({"ppo/best_score": -0.5}, 7)
    tracker.end({"ppo/test": 0.9}, [])
    text = repr(fake.calls) + repr(fake.summary)
    assert "'seed': " in text and "'ppo/best_score': -0.5" in text and "'result/ppo/test': 0.9" in text
    assert "step=7" in text or "'step': 7" in text or "'ppo/step': 7" in text
    assert fake.calls[-1][0] in ("end_run", "finish")


@pytest.mark.slow
@pytest.mark.parametrize("name", TRACKER_NAMES)
def test_the_real_package(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip(name)
    monkeypatch.chdir(tmp_path)
    for variable, value in {
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db",
        "WANDB_MODE": "offline",
        "TRACKIO_DIR": str(tmp_path / "trackio"),
    }.items():
        monkeypatch.setenv(variable, value)
    report = tmp_path / "report.html"
    report.write_text("<p>done</p>")
    tracker = make_tracker(name)
    tracker.begin("digits", {"seed": 3, "model.name": "cifar_resnet20"})
    for step in range(3):
        tracker.log({"ppo/best_score": -0.5 + step / 10}, step)
    tracker.log({"dense/loss": 0.2}, 0)  # another phase counts anew
    tracker.end({"ppo/test": 0.9}, [report])
    if name == "mlflow":
        import mlflow

        (run,) = mlflow.search_runs(experiment_names=["rlprune"], output_format="list")
        assert run.data.params["seed"] == "3" and run.data.metrics["result/ppo/test"] == 0.9
        history = mlflow.tracking.MlflowClient().get_metric_history(run.info.run_id, "ppo/best_score")
        assert [point.step for point in history] == [0, 1, 2]
    else:
        assert any(tmp_path.rglob("*.wandb" if name == "wandb" else "*rlprune*"))


def test_a_log_becomes_studies(tracked: tuple[Recorder, Path], tmp_path: Path) -> None:
    optuna = pytest.importorskip("optuna")
    _, out = tracked
    storage = f"sqlite:///{tmp_path / 'studies.db'}"
    assert main(["optuna", str(out), "--storage", storage, "--json"]) == 0
    rows = [json.loads(line) for line in (out / "ledger.jsonl").read_text().splitlines()]
    ours = [row for row in rows if row["method"] == "ppo"]
    study = optuna.load_study(study_name="run/ppo", storage=storage)
    assert len(study.trials) == len(ours) == 6
    assert study.best_value == max(row["score"] for row in ours)
    assert list(study.trials[0].params.values()) == ours[0]["widths"]
    groups = json.loads((out / "results.json").read_text())["groups"]
    assert list(study.trials[0].params) == [group["name"] for group in groups]
    assert study.trials[0].user_attrs["loss"] == ours[0]["loss"]
    took = study.trials[2].datetime_complete - study.trials[2].datetime_start
    assert took.total_seconds() == pytest.approx(ours[2]["seconds"], abs=1e-5)
    with pytest.raises(rlprune.ConfigError, match="--name: the storage holds a study"):
        to_optuna(out, storage)
    assert to_optuna(out, storage, "again")[0].startswith("again/")


def test_a_storage_that_cannot_be_opened_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("optuna")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "ledger.jsonl").touch()
    assert main(["optuna", str(tmp_path / "run"), "--storage", "nonsense://x"]) == 2
    assert main(["optuna", str(tmp_path), "--storage", "sqlite:///x.db"]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert "--storage: cannot open 'nonsense://x'" in first and "ledger.jsonl" in second
