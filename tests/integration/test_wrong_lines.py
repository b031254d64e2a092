"""Wrong inputs and the very line that each prints: exit code 2, nothing written."""

from __future__ import annotations

import shlex
import shutil
import stat
import sys
from pathlib import Path

import pytest

from helpers.whole_files import write_whole
from helpers.wrong_inputs import APPLY, RESUME, put
from helpers.wrong_inputs import CASES as GENERAL
from helpers.wrong_language_inputs import LANGUAGE_CASES
from rlprune.cli import main as cli

CASES = {**GENERAL, **LANGUAGE_CASES}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_whole(tmp_path_factory.mktemp("whole"))


def files(place: Path) -> dict[str, bytes]:
    """What stands in a folder; pipes are not read."""
    # The lock holds the number of the process.
    found = {path: path.lstat().st_mode for path in sorted(place.rglob("*")) if path.name != ".rlprune.lock"}
    return {
        str(path): path.read_bytes() if stat.S_ISREG(mode) else str(mode).encode()
        for path, mode in found.items()
    }


@pytest.mark.parametrize("name", CASES)
def test_one_line_and_exit_code_2(
    name: str, whole: Path, place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[name]
    shutil.copytree(whole, place, dirs_exist_ok=True)
    if case.edit is not None:
        case.edit(place)
    before = files(place)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.delitem(sys.modules, "own_exits", raising=False)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on standard input"))
    code = cli.main(shlex.split(case.words))
    out, err = capsys.readouterr()
    # A run that goes on says first what it works on, and what it trains.
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].replace(str(place), "PLACE").endswith(f"rlprune: error: {case.line}")
    after = files(place)
    assert {path: after.get(path) for path in before} == before, "nothing is lost"
    if case.words != RESUME:
        assert after == before, "nothing is left half-written"


def test_a_line_is_never_endless(whole: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(whole, place, dirs_exist_ok=True)
    put("policy/policy.json", "tensors.log_std", "x" * 10_000)(place)
    assert cli.main(shlex.split(APPLY)) == 2
    assert len(capsys.readouterr().err) < 1100
