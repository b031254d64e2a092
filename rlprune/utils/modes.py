"""Modes of a module that are put back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode for a while; every module gets its own mode back."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def refresh(model: nn.Module) -> None:
    """Let modules drop what they computed and kept for eval mode (position biases, say), as training would.

    Every module gets its own mode back.
    """
    modes = [(m, m.training) for m in model.modules()]
    model.train()
    model.eval()
    for module, mode in modes:
        module.training = mode
