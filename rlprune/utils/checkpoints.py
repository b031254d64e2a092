"""What a killed run goes on from: private files, whole or absent, that only the very run that left them takes up."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import ArtifactError, one_line
from .files import replacing_file
from .unfinished import CONTENT, fresh_folder


class StateFile:
    """One file of tensors and plain Python values; reading it never runs code.

    Args:
        path: the file; its folder is made when it is needed.
        mark: what has to be equal for a state to be of this very run, by name.
        version: of what the content means; a state of another version is refused.
    """

    def __init__(self, path: str | Path, mark: Mapping[str, object] | None = None, version: int = 1) -> None:
        self.path = Path(path)
        self._mark = dict(mark or {})
        self._version = version

    def save(self, content: Mapping[str, object]) -> None:
        """Replace the state, whole or not at all; ArtifactError when the disk refuses."""
        try:
            with replacing_file(self.path) as stream:
                torch.save({"version": self._version, **self._mark, **content}, stream)
        except RuntimeError as error:  # what torch makes of a full disk
            raise ArtifactError(f"{self.path}: the state cannot be written ({one_line(error)})") from error

    def load(self) -> dict[str, Any] | None:
        """The saved content, None where there is none; ArtifactError when it is damaged or of another run."""
        if not self.path.is_file():
            return None
        try:
            kept = torch.load(self.path, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
            raise ArtifactError(
                f"{self.path}: truncated or not a readable state of rlprune ({type(error).__name__}); delete it"
            ) from error
        version = kept.pop("version", None) if isinstance(kept, dict) else None
        if version != self._version:
            raise ArtifactError(
                f"{self.path}: state version {version!r}, this program reads {self._version}; delete it"
            )
        require_same(self.path, kept, self._mark)
        return {name: value for name, value in kept.items() if name not in self._mark}


def require_same(place: str | Path, kept: Mapping[str, object], wanted: Mapping[str, object]) -> None:
    """Refuse, with ArtifactError, what ``kept`` says was left by a run with other values than ``wanted``."""
    if not isinstance(kept, Mapping):
        raise ArtifactError(f"{place}: damaged: no record of the run that left it; delete it")
    differing = [name for name, value in wanted.items() if name not in kept or kept[name] != value]
    if differing:
        # A hash says nothing to a person.
        names = ", ".join(name for name in differing if name != "key")
        detail = f" ({names} differ)" if names else ""
        raise ArtifactError(f"{place}: belongs to a run with other settings{detail}; delete it")


def settings_key(facts: object, default: Callable[[Any], object] | None = None) -> str:
    """Hash of what determines a state; ``default`` makes plain values of what JSON cannot hold."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=default).encode()).hexdigest()


def forget(state: Path | None) -> None:
    """Remove the state of what is done: a file or a folder, where there is one.

    A folder loses its name first: half of a state that a kill has left is never taken for one.
    """
    if state is not None and state.is_dir():
        with fresh_folder(state) as gone:
            os.rename(state, gone / CONTENT)
    elif state is not None:
        state.unlink(missing_ok=True)
