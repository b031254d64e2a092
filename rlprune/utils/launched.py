"""What ``accelerate launch`` and ``torchrun`` tell the processes that they start."""

from __future__ import annotations

import os


def process_count() -> int:
    """Processes that a launcher has started; 1 without one."""
    return _number("WORLD_SIZE", 1)


def process_rank() -> int:
    """Number of this process among them, from 0."""
    return _number("RANK", 0)


def is_main_process() -> bool:
    """Whether this is the process that writes files and prints: the first of them."""
    return process_rank() == 0


def _number(name: str, otherwise: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdigit() else otherwise
