"""Modes of a module that are put back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode for a while; every module gets its own mode back."""
    modes = _modes(model)
    model.eval()
    try:
        yield
    finally:
        _put_back(model, modes)


def refresh(model: nn.Module) -> None:
    """Let modules drop what they computed and kept for eval mode (position biases, say), as training would.

    Every module gets its own mode back.
    """
    modes = _modes(model)
    model.train()
    model.eval()
    _put_back(model, modes)


def _modes(model: nn.Module) -> list[tuple[nn.Module, bool]]:
    return [(module, module.training) for module in model.modules()]


def _put_back(model: nn.Module, modes: list[tuple[nn.Module, bool]]) -> None:
    # By train() first: some modules do more there than to set the flag.
    if model.training != modes[0][1]:
        model.train(modes[0][1])
    for module, mode in modes:
        module.training = mode
