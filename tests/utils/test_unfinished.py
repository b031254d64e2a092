"""What a killed writer leaves is removed by the next one, and what a living one writes stays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from rlprune.utils.checkpoints import forget
from rlprune.utils.files import lock_run, replacing_folder, write_tensors_atomic, write_text_atomic
from rlprune.utils.unfinished import CONTENT, OLD, fresh_file, fresh_folder, sweep

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="folders cannot be locked there")
# A process that is in the middle of writing a file, a folder and a folder in the place of another one.
WRITER = """
import contextlib, os, sys, time
from pathlib import Path
from rlprune.utils.unfinished import CONTENT, OLD, fresh_file, fresh_folder
place = Path(sys.argv[1])
with contextlib.ExitStack() as stack:
    handle, path = stack.enter_context(fresh_file(place / "a.json"))
    os.write(handle, b"half")
    (stack.enter_context(fresh_folder(place / "policy")) / "half").write_text("")
    old = stack.enter_context(fresh_folder(place / "pruned", OLD))
    if (place / "pruned").exists():
        os.rename(place / "pruned", old / CONTENT)
    print("writing", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    (tmp_path / "pruned").mkdir()
    (tmp_path / "pruned" / "plan.json").write_text("{}")
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        yield process
        process.kill()


def hidden(folder: Path) -> list[str]:
    return sorted(path.name.partition("rlprune")[0] for path in folder.glob(".*.rlprune-*"))


def test_the_living_are_left_alone_and_the_dead_are_swept(
    tmp_path: Path, writer: subprocess.Popen[str]
) -> None:
    sweep(tmp_path)
    assert hidden(tmp_path) == [".a.json.", ".policy.", ".pruned."]
    assert not (tmp_path / "pruned").exists()
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    sweep(tmp_path, "a.json")
    assert hidden(tmp_path) == [".policy.", ".pruned."]  # the other names are for others
    sweep(tmp_path)
    assert hidden(tmp_path) == []
    # What made room for a folder that never came is back.
    assert (tmp_path / "pruned" / "plan.json").read_text() == "{}"


def test_the_next_writer_and_the_next_run_sweep(tmp_path: Path, writer: subprocess.Popen[str]) -> None:
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    write_text_atomic(tmp_path / "a.json", "whole")
    assert hidden(tmp_path) == [".policy.", ".pruned."]
    with replacing_folder(tmp_path / "pruned", "plan.json") as folder:
        (folder / "plan.json").write_text("new")
    assert hidden(tmp_path) == [".policy."]
    assert (tmp_path / "pruned" / "plan.json").read_text() == "new"


def test_a_run_sweeps_all_of_its_folder(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with lock_run(run):
        (run / "state").mkdir()
        (run / "ledger.jsonl").write_text("")
    for left in (
        run / ".results.json.rlprune-new-abcdefgh",
        run / "state" / ".agent.pt.rlprune-new-01234567",
    ):
        left.write_text("half")
    (run / "state" / ".x.state.rlprune-new-abcdefgh" / CONTENT).mkdir(parents=True)
    mine = [run / ".env.settings", run / ".a.json.abcdefgh", run / ".a.rlprune-new-abc"]
    for path in mine:
        path.write_text("mine")
    with lock_run(run):
        assert sorted(p for p in run.rglob("*rlprune-*")) == [mine[2]]
        assert all(path.read_text() == "mine" for path in mine)


def test_links_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "x").write_text("x")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".a.rlprune-new-abcdefgh").symlink_to(tmp_path / "precious")
    sweep(tmp_path / "run")
    assert (tmp_path / "precious" / "x").read_text() == "x"


def test_nothing_is_left_by_one_that_fails(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), fresh_file(tmp_path / "a"):
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError), fresh_folder(tmp_path / "b", OLD):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_a_state_goes_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill in the middle of removing a state's folder leaves no half of it under its name."""
    state = tmp_path / "x.state"
    state.mkdir()
    for name in "abc":
        (state / name).write_text(name)

    class Killed(BaseException):
        pass

    def killed(*args: object, **kwargs: object) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(os, "unlink", killed)
        forget(state)
    assert not state.exists()
    assert len(hidden(tmp_path)) == 1
    sweep(tmp_path)
    assert hidden(tmp_path) == []
    forget(state)


def test_equal_tensors_are_equal_bytes(tmp_path: Path) -> None:
    """In every process: the library's own order of the metadata is that of a hash table."""
    metadata = {name: name * 2 for name in ("format", "rlprune", "model", "ä", "a", "z")}
    write_tensors_atomic(tmp_path / "a.safetensors", {"x": torch.arange(5), "y": torch.ones(2, 3)}, metadata)
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert file.metadata() == metadata
        assert torch.equal(file.get_tensor("x"), torch.arange(5))
    data = (tmp_path / "a.safetensors").read_bytes()
    script = (
        "import sys, torch\n"
        "from rlprune.utils.files import write_tensors_atomic\n"
        f"names = {list(metadata)[::-1]!r}\n"
        "write_tensors_atomic(sys.argv[1], {'y': torch.ones(2, 3), 'x': torch.arange(5)}, {n: n * 2 for n in names})\n"
    )
    for number in range(3):
        other = tmp_path / f"{number}.safetensors"
        subprocess.run([sys.executable, "-c", script, str(other)], check=True)
        assert other.read_bytes() == data
