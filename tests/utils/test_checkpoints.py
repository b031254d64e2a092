"""The private files that a killed run goes on from."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from rlprune.errors import ArtifactError
from rlprune.utils.checkpoints import StateFile, forget, require_same, settings_key
from rlprune.utils.files import append_line, whole_lines


def test_a_state_comes_back_without_its_mark(tmp_path: Path) -> None:
    state = StateFile(tmp_path / "new" / "a.pt", {"key": "k"})
    assert state.load() is None
    state.save({"weights": torch.ones(2), "step": 3})
    found = StateFile(state.path, {"key": "k"}).load()
    assert found is not None and set(found) == {"weights", "step"}
    assert torch.equal(found["weights"], torch.ones(2)) and found["step"] == 3
    assert [path.name for path in state.path.parent.iterdir()] == ["a.pt"]


@pytest.mark.parametrize(
    ("mark", "message"),
    [
        ({"key": "other"}, "belongs to a run with other settings; delete it"),
        ({"key": "k", "seed": 2}, r"belongs to a run with other settings \(seed differ\); delete it"),
        ({"key": "k", "seed": 1, "agent": "ppo"}, r"\(agent differ\)"),
    ],
)
def test_the_state_of_another_run_is_refused(tmp_path: Path, mark: dict[str, Any], message: str) -> None:
    StateFile(tmp_path / "a.pt", {"key": "k", "seed": 1}).save({"step": 3})
    with pytest.raises(ArtifactError, match=message):
        StateFile(tmp_path / "a.pt", mark).load()


def test_another_version_and_what_is_no_state_are_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    StateFile(path, version=2).save({"step": 3})
    with pytest.raises(ArtifactError, match="state version 2, this program reads 1; delete it"):
        StateFile(path).load()
    torch.save([1, 2], path)
    with pytest.raises(ArtifactError, match="state version None"):
        StateFile(path).load()
    for content in (b"", b"nothing", pickle.dumps(Path)):
        path.write_bytes(content)
        with pytest.raises(ArtifactError, match="not a readable state of rlprune .*; delete it") as caught:
            StateFile(path).load()
        assert "\n" not in str(caught.value)


def test_a_state_that_cannot_be_written_is_one_line_and_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = StateFile(tmp_path / "a.pt")
    state.save({"step": 3})

    def full(*args: Any) -> None:
        raise RuntimeError("unexpected pos 64 vs 0")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(ArtifactError, match="cannot be written"):
        state.save({"step": 4})
    assert state.load() == {"step": 3}
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="cannot be written"):
        StateFile(tmp_path / "file" / "a.pt").save({})


def test_marks_and_keys() -> None:
    require_same("here", {"a": [1], "more": 2}, {"a": [1]})
    with pytest.raises(ArtifactError, match=r"here: .* \(a, b differ\)"):
        require_same("here", {"a": [1]}, {"a": [2], "b": None})
    assert settings_key({"a": 1, "b": 2}) == settings_key({"b": 2, "a": 1}) != settings_key({"a": 1, "b": 3})
    assert settings_key([Path("a")], str) == settings_key(["a"])


def test_forget(tmp_path: Path) -> None:
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    (tmp_path / "file").write_text("x")
    for state in (None, tmp_path / "folder", tmp_path / "file", tmp_path / "nothing"):
        forget(state)
    assert list(tmp_path.iterdir()) == []


def test_a_torn_line_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    assert whole_lines(path) == []
    append_line(path, "one")
    path.write_bytes(path.read_bytes() + b"tw")
    assert whole_lines(path) == [b"one"]
    append_line(path, "three")
    assert path.read_bytes() == b"one\nthree\n"
