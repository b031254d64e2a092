"""What scripts that measure workloads seed by seed share: their options, and what was measured, in one file.

A run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

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


class SeededCase(Protocol):
    """A workload that is measured once a seed; ``needs`` is the option that names its data, "" where it has them."""

    @property
    def seeds(self) -> int: ...
    @property
    def needs(self) -> str: ...


def options(doc: str | None, cases: Mapping[str, SeededCase], state: Path) -> argparse.ArgumentParser:
    """The command line of a script with a docstring."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--workloads", nargs="*", choices=cases, default=list(cases), metavar="NAME")
    parser.add_argument("--seeds", type=int, help="at most so many seeds a workload")
    parser.add_argument("--cifar", type=Path)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--state", type=Path, default=state)
    return parser


def every_seed(
    arguments: argparse.Namespace, cases: Mapping[str, SeededCase], measure: Callable[[str, int], None]
) -> None:
    """``measure(workload, seed)`` of all that is asked for and whose data are there, on one thread."""
    torch.set_num_threads(1)
    for name in arguments.workloads:
        case = cases[name]
        if not case.needs or getattr(arguments, case.needs) is not None:
            for seed in range(min(case.seeds, arguments.seeds or case.seeds)):
                measure(name, seed)
