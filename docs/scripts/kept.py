"""What a script has measured, in one file: a run that was stopped goes on where it was."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlprune.utils import read_json, write_text_atomic


class Kept:
    """Measurements by key, one a line of a JSON file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.cells: dict[str, Any] = dict(read_json(path)) if path.exists() else {}

    def ask(self, key: str, measure: Callable[[], Any]) -> Any:
        """What is known under a key, measured now where nothing is."""
        if key not in self.cells:
            started = time.perf_counter()
            value = measure()
            self.keep(key, value, f"{time.perf_counter() - started:.0f} s")
        return self.cells[key]

    def keep(self, key: str, value: object, shown: object = None) -> None:
        """Take a value in and write all of them; ``shown`` is printed instead of the value."""
        self.cells[key] = value
        lines = [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in sorted(self.cells.items())]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomic(self.path, "{\n" + ",\n".join(lines) + "\n}\n")
        print(f"{key}: {value if shown is None else shown}", flush=True)
