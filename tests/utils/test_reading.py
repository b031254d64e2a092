"""Reading what anybody may have written, and writing through no link."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from rlprune.errors import ArtifactError
from rlprune.utils.files import append_line, lock_run, whole_lines, write_text_atomic
from rlprune.utils.progress import log_to
from rlprune.utils.reading import parse_json, read_bytes, read_json

WRITERS: dict[str, Callable[[Path], object]] = {
    "append_line": lambda path: append_line(path, "line"),
    "whole_lines": whole_lines,
    "write_text_atomic": lambda path: write_text_atomic(path, "text"),
    "log_to": log_to,
}


@pytest.mark.parametrize("writer", WRITERS)
def test_nothing_is_written_through_a_link(writer: str, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious, and without a last line break")
    (tmp_path / "file").symlink_to(tmp_path / "precious")
    with pytest.raises(ArtifactError, match="file: is a symbolic link, where a file is to be written"):
        WRITERS[writer](tmp_path / "file")
    assert (tmp_path / "precious").read_text() == "precious, and without a last line break"
    assert (tmp_path / "file").is_symlink()


@pytest.mark.skipif(os.name != "posix", reason="needs pipes")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for read in (read_bytes, read_json, whole_lines):
        with pytest.raises(ArtifactError, match="pipe: is a pipe, where a file is to be"):
            read(tmp_path / "pipe")
    with pytest.raises(ArtifactError, match="device"):
        read_bytes("/dev/zero")


def test_links_within_a_run_may_stay(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with lock_run(run):
        (run / "ledger.jsonl").write_text("")
        (run / "newest").symlink_to(run / "ledger.jsonl")
    with lock_run(run):
        pass
    (run / "state").symlink_to(tmp_path)
    with pytest.raises(ArtifactError, match="state: is a symbolic link that leads out of"):
        lock_run(run).__enter__()


def test_a_run_may_lie_behind_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    with lock_run(tmp_path / "run") as folder:
        write_text_atomic(folder / "a", "b")
    assert (tmp_path / "disk" / "a").read_text() == "b"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b"[" * 100_000, "nested too deeply"),
        (b"9" * 101, "too large a number"),
        (b"1e999", "too large a number"),
        (b"\xff", "invalid start byte"),
        (b"\xef\xbb\xbf{}", "BOM"),
        (b"", "Expecting value"),
    ],
)
def test_json_that_is_none(text: bytes, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        parse_json(text)
