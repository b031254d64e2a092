"""transformers' models by place: what is known of one without fetching anything, and reading it without noise."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CONFIG = "config.json"
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def local_config(place: str) -> dict[str, Any] | None:
    """The content of the config.json of a folder or of a cached hub id; None where there is none that can be read."""
    file = config_file(place)
    if file is None:
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def config_file(place: str) -> Path | None:
    """Where the config.json of a folder or of a cached hub id lies; None where it is not on this machine."""
    if not place:
        return None
    file = Path(place).expanduser() / CONFIG
    if file.is_file():
        return file
    if not HUB_ID.fullmatch(place) or place.startswith("."):
        return None
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(place, CONFIG)
    except ValueError:  # not an id that the hub could have
        return None
    return Path(found) if isinstance(found, str) else None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bars and notes; what matters in them is raised as an error."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
