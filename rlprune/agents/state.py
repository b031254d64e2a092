"""A trainer's own intermediate state on disk."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import ArtifactError
from ..utils.checkpoints import StateFile


class StateDir:
    """One state file in a private folder; holds tensors and plain Python types only."""

    def __init__(self, path: str | Path, name: str = "agent") -> None:
        self.file = Path(path) / f"{name}.pt"
        self._kept = StateFile(self.file)

    def save(self, state: Mapping[str, object]) -> None:
        """Replace the state, whole or not at all; ArtifactError when the disk refuses."""
        self._kept.save({"state": state})

    def load(self) -> dict[str, Any] | None:
        """The last saved state, or None where there is none; ArtifactError for one that is damaged."""
        kept = self._kept.load()
        state = None if kept is None else kept.get("state")
        if kept is not None and not isinstance(state, dict):
            raise ArtifactError(f"{self.file}: damaged: holds no state; delete it")
        return state
