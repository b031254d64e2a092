"""A trainer's own intermediate state on disk, written so that a kill at any moment leaves a whole file."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import torch

from ..errors import ArtifactError

STATE_VERSION = 1


class StateDir:
    """One state file in a private folder; holds tensors and plain Python types only."""

    def __init__(self, path: str | Path, name: str = "agent") -> None:
        self.path = Path(path)
        self.file = self.path / f"{name}.pt"

    def save(self, state: dict[str, Any]) -> None:
        """Replace the state: written beside it, flushed to the disk, then renamed over it."""
        self.path.mkdir(parents=True, exist_ok=True)
        temporary = self.file.with_suffix(".tmp")
        try:
            with open(temporary, "wb") as stream:
                torch.save({"version": STATE_VERSION, "state": state}, stream)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, self.file)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    def load(self) -> dict[str, Any] | None:
        """The last saved state, or None where there is none."""
        if not self.file.exists():
            return None
        try:
            payload = torch.load(self.file, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
            raise ArtifactError(
                f"{self.file}: not a readable search state ({type(error).__name__})"
            ) from None
        version = payload.get("version") if isinstance(payload, dict) else None
        if version != STATE_VERSION:
            raise ArtifactError(f"{self.file}: state version {version!r}; this program reads {STATE_VERSION}")
        state: dict[str, Any] = payload["state"]
        return state
