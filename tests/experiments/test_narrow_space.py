"""What commands say of a model that can be cut by less than half."""

from __future__ import annotations

from pathlib import Path

import pytest

import rlprune
from rlprune.cli.main import main

SETTINGS = ["model.arguments={width: 2}", "prune.ignore=['layer1*', 'layer2*']", "budget.target=95%"]
SEARCH = [
    "model.train.epochs=1", "data.train=64", "data.calibration=32", "threads=1", "data.validation=32",
    "data.test=32", "search.agent=random", "search.baselines=[]", "search.evaluations=2", "finish.epochs=0",
    "finish.rules=false",
]  # fmt: skip
SAID = "the lowest budget of macs is 0."


class Notes(rlprune.Callback):
    """Keeps what is said during a run."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def on_note(self, text: str) -> None:
        self.texts.append(text)


def test_train_says_that_most_of_the_model_stays_and_why(tmp_path: Path) -> None:
    notes = Notes()
    rlprune.train(rlprune.load_config("digits", [*SETTINGS, *SEARCH]), tmp_path / "run", callback=notes)
    (line,) = [text for text in notes.texts if SAID in text]
    assert line.startswith("warning: ")
    assert "layer1.*.conv1 (3 layers)" in line
    assert "ignored by 'layer1*'" in line
    assert "\n" not in line


def test_inspect_says_the_same_and_a_budget_below_names_the_largest_part(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["inspect", "digits", "--set", *SETTINGS]) == 0
    text = capsys.readouterr().out
    assert f"warning: {SAID}" in text
    assert main(["inspect", "digits", "--set", *SETTINGS, "budget.target=30%"]) == 2
    line = capsys.readouterr().err.strip()
    assert "below the feasible minimum" in line
    assert "alone keeps" in line
    assert "\n" not in line
