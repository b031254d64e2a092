"""The folder that trained weights and measurements are kept in."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Where rlprune keeps what it can make again: $RLPRUNE_CACHE, or rlprune in the user's cache folder."""
    given = os.environ.get("RLPRUNE_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rlprune"
