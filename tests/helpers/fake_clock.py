"""A clock for latency tables that reads a known function of each layer's sizes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rlprune.latency import calibrate as calibration
from rlprune.latency import profile as profiling
from rlprune.utils.pytrees import Inputs, call


def fake_seconds(module: nn.Module) -> float:
    """A latency that is a known function of a layer's sizes, for tests that must not depend on the clock."""
    return 1e-6 * (2.0 + sum(p.numel() for p in module.parameters()))


def fake_clock(patch: pytest.MonkeyPatch) -> None:
    """Layers take what `fake_seconds` says, models twice the sum of their layers and 0.25 ms."""

    def measure(models, inputs, batch_sizes, *_, **__):
        ms = {n: 2e3 * sum(map(fake_seconds, called(m, inputs))) for n, m in models.items()}
        return {name: {batch_sizes[0]: 0.25 + own} for name, own in ms.items()}

    patch.setattr(profiling, "timed", lambda module, inputs: (module(inputs), fake_seconds(module))[1])
    patch.setattr(profiling, "in_turns", lambda calls, *_: {n: [s] for n, s in calls.items()})
    patch.setattr(calibration, "measure", measure)


def called(model: nn.Module, inputs: Inputs) -> list[nn.Module]:
    """The leaf modules with parameters that a forward pass runs, once for each call."""
    found: list[nn.Module] = []
    leaves = [m for m in model.modules() if not list(m.children()) and list(m.parameters())]
    handles = [m.register_forward_hook(lambda module, *_: found.append(module)) for m in leaves]
    with torch.no_grad():
        call(model, inputs)
    for handle in handles:
        handle.remove()
    return found
