"""Published methods from the command line, in small: rc 0 and a table; a killed run in rounds goes on."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.scripts import load_script
from rlprune.cli.main import main
from rlprune.experiments import incremental as rounds
from rlprune.utils.files import read_json

SCRIPT = load_script("published")
TINY = {
    "images": ("model.arguments={width: 4}", "model.train.epochs=1", "data.calibration=64", "data.validation=100"),
    "text": (
        "model.arguments={layers: 3, hidden: 32, heads: 4, kv_heads: 2, intermediate: 64, vocab: 300}",
        "model.train.epochs=1", "data.train=64", "data.calibration=8", "data.validation=8", "data.test=8",
        "data.sequence_length=32",
    ),
}  # fmt: skip
QUICK = {
    "flap_al_mm": (),
    "compresso": ("search.compresso.steps=12", "finish.steps=2", "data.prompt=Be small."),
    "rl_pruner": (
        "rounds.count=2", "rounds.epochs=1", "search.rl_pruner_published.batches=1",
        "search.rl_pruner_published.samples=3", "search.evaluations=6",
    ),
}  # fmt: skip


def words(name: str, out: Path, *more: str) -> list[str]:
    tiny = TINY["images" if set(SCRIPT.IMAGES) <= set(SCRIPT.SMALL[name]) else "text"]
    return [*SCRIPT.arguments(name, out), *(w for override in (*tiny, *more) for w in ("--set", override))]


@pytest.mark.parametrize("name", QUICK)
def test_a_published_method_ends_in_a_table(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(name, tmp_path / "run", *QUICK[name])) == 0
    printed = capsys.readouterr().out
    results = read_json(tmp_path / "run" / "results.json")
    rows = {row["kind"]: row for row in results["rows"]}
    assert set(rows) == {"dense", "agent"}, "no rule stands beside a published method"
    assert rows["agent"]["cost"] <= results["budget"]["target"]
    assert (rows["agent"]["method"] in printed and "pruned weights" in printed) or "report" in printed
    assert (tmp_path / "run" / "pruned" / "plan.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(SCRIPT.SMALL) - set(QUICK)))
def test_every_other_published_method_too(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(name, tmp_path / "run")) == 0
    rows = {row["kind"] for row in read_json(tmp_path / "run" / "results.json")["rows"]}
    assert rows == {"dense", "agent"}


def test_killed_rounds_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert main(words("rl_pruner", whole, *QUICK["rl_pruner"])) == 0
    trained, calls = rounds._trained, []

    def dying(*args: object) -> object:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return trained(*args)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(rounds, "_trained", dying)
        assert main(words("rl_pruner", broken, *QUICK["rl_pruner"])) != 0
    assert main([*words("rl_pruner", broken, *QUICK["rl_pruner"]), "--resume"]) == 0
    expected, found = (read_json(out / "results.json")["rows"][1] for out in (whole, broken))
    skipped = {"seconds", "finish_seconds", "latency_ms"}
    assert {k: v for k, v in found.items() if k not in skipped} == {
        k: v for k, v in expected.items() if k not in skipped
    }
    assert read_json(whole / "pruned" / "plan.json") == read_json(broken / "pruned" / "plan.json")


def test_rounds_refuse_what_they_cannot_have(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words("rl_pruner", tmp_path / "run", "search.starts=rules", "model.train.epochs=1")) == 2
    assert "rounds.count: with several rounds search.starts has to be none" in capsys.readouterr().err
