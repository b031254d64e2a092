"""Budgets of milliseconds through the command line: train, apply, inspect, and wrong settings."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.fake_clock import fake_clock
from helpers.small import SMALL_DIGITS, SMALL_RUN, without
from rlprune.artifacts.documents import read_plan
from rlprune.cli import main as cli
from rlprune.latency import profile as profiling
from rlprune.latency.profile import TABLE_FILE, read_table
from rlprune.report.results import read_results

LATENCY = ("budget.metric=latency", "budget.batch_size=16")
SETS = without((*SMALL_RUN, *LATENCY))
PRUNED = without((*SMALL_DIGITS, *LATENCY))
LOOKED_AT = without((*SMALL_DIGITS, *LATENCY), "model.train.")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("latency") / "run"
    with pytest.MonkeyPatch.context() as patch:
        fake_clock(patch)
        assert cli.main(["train", "digits", *SETS, "--set", "budget.target=0.6", "--out", str(out)]) == 0
    return out


def test_a_run_within_a_latency_budget(run: Path) -> None:
    table, results = read_table(run / TABLE_FILE), read_results(run)
    assert table.batch_size == 16
    assert results["budget"]["metric"] == "latency"
    assert results["budget"]["target"] == pytest.approx(0.6 * results["budget"]["dense"])
    pruned = [row for row in results["rows"] if row["method"] != "dense"]
    assert pruned and all(row["cost"] <= results["budget"]["target"] for row in pruned)
    plan = read_plan(run / "pruned")
    assert plan["cost"]["latency"] <= 0.6 * plan["dense_cost"]["latency"]
    assert plan["budget"]["metric"] == "latency"
    assert "latency (ms)" in (run / "report.html").read_text()


def test_apply_and_replay_use_the_numbers_of_the_run(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RLPRUNE_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr(profiling, "_measure_all", None)  # would fail if it were called
    out = tmp_path / "applied"
    again = [*PRUNED, "--set", "model.train.epochs=1"]
    assert cli.main(["apply", str(run), "digits", *again, "--budget", "0.6", "--out", str(out)]) == 0
    assert "latency kept" in capsys.readouterr().out
    assert read_plan(out)["dense_cost"]["latency"] == read_plan(run / "pruned")["dense_cost"]["latency"]
    replayed = tmp_path / "replayed"
    assert cli.main(["apply", str(run / "pruned"), "digits", *again, "--out", str(replayed)]) == 0
    assert " ms of " in capsys.readouterr().out


def test_inspect_shows_the_table(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--set", f"budget.table={run / TABLE_FILE}", "--set", "budget.target=0.6"]
    assert cli.main(["inspect", "digits", *LOOKED_AT, *words]) == 0
    text = capsys.readouterr().out
    assert "us/unit" in text and "batch size 16" in text and "budget: 0.6 of latency = " in text


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("budget.target=-1ms", "milliseconds"),
        ("budget.target=5M", "milliseconds"),
        ("budget.target=1e9ms", "above the dense model"),
        ("budget.target=0.000001ms", "below the feasible minimum"),
        ("budget.batch_size=0", "budget.batch_size"),
        ("budget.batch_size=8", "batch size 16"),
        ("budget.table=nowhere.json", "no such file"),
        ("model.arguments.width=5", "another architecture"),
        ("device=cuda:77", "device"),
    ],
)
def test_wrong_latency_settings_are_refused_in_one_line(
    run: Path, override: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--set", f"budget.table={run / TABLE_FILE}", "--set", override]
    assert cli.main(["inspect", "digits", *LOOKED_AT, *words]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and message in err
