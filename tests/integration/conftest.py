"""Fixtures of the runs through the command line: a folder of their own, and a command that must be refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from rlprune.cli import main as cli

Snapshot = dict[str, bytes]


def snapshot(folder: Path) -> Snapshot:
    """Every file and folder below a folder, with its content."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"<folder>"
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def refused(place: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that must be refused; returns its line."""

    def run(*words: str, unchanged: bool = True) -> str:
        before = snapshot(place)
        code = cli.main(list(words))
        out, err = capsys.readouterr()
        assert (code, out) == (2, ""), err
        assert err.startswith("rlprune: error: "), err
        assert err.count("\n") == 1, err
        assert len(err) < 500, err
        if unchanged:
            assert snapshot(place) == before
        return err

    return run
