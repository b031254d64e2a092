"""What a run says of itself while it goes on, on a stream that is no terminal."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.lm_folder import write_config, write_folder
from helpers.small import SMALL_DIGITS
from rlprune.cli import main as cli


def test_stages_and_lines_of_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "model")
    write_config(tmp_path / "tiny.yaml", "model")
    words = ["--set", "search.agent=random", "search.baselines=[]", "finish.steps=2", "finish.method=full"]
    assert cli.main(["train", "tiny.yaml", "--out", "run", *words]) == 0
    lines = capsys.readouterr().err.splitlines()
    places = [line for line in lines if line.startswith("[")]
    assert places == ["[1/4] prepare", "[2/4] rules", "[3/4] random", "[4/4] finish"]
    counted = [line for line in lines if " of " in line and "run " in line]
    assert counted[0].startswith("rules: ") and " left" in counted[0]
    shares = [int(line.partition("run ")[2].partition("%")[0]) for line in counted]
    assert shares == sorted(shares) and 0 < shares[0] < shares[-1] == 100
    assert any(line.startswith("random: 4 of 4 (100%), best score ") for line in counted)
    assert counted[-1].startswith("fine-tune random: 2 of 2 (100%), loss ") and ", run 100%" in counted[-1]
    assert "[3/4] random" in (tmp_path / "run" / "run.log").read_text()


@pytest.mark.parametrize("where", ["before", "after"])
def test_nothing_is_said_where_that_is_asked_for(
    where: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["prune", "digits", "--rule", "uniform", "--out", str(tmp_path / "out"), "--set", *SMALL_DIGITS]
    option = ["--progress", "none"]
    assert cli.main([*option, *words] if where == "before" else [*words[:1], *option, *words[1:]]) == 0
    assert capsys.readouterr().err == ""


def test_inspect_says_why_memory_is_not_predicted(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", "digits"]) == 0
    assert "\nmemory: not predicted for such a model: " in capsys.readouterr().out


def test_inspect_predicts_the_memory_of_a_language_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path / "tiny.yaml", write_folder(tmp_path / "model"))
    assert cli.main(["inspect", str(config)]) == 0
    out = capsys.readouterr().out
    assert "\nmemory, prepare: " in out and "\nmemory, search: " in out


def test_a_way_that_nobody_knows(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", "digits", "--progress", "bars"]) == 2
    assert "--progress 'bars': unknown (did you mean 'bar'?)" in capsys.readouterr().err
