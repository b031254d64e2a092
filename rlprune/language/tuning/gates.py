"""Gates that learn whether a unit stays: the hard concrete distribution (Louizos et al. 2018, arXiv 1712.01312)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

TEMPERATURE = 2.0 / 3.0
"""Beta of the paper, section 4."""
LOW, HIGH = -0.1, 1.1
"""Gamma and zeta of the paper: the interval that the binary concrete variable is stretched to."""
SHARPNESS = 0.8
"""What the location is multiplied by for the value without noise (Wang et al. 2020, arXiv 1910.04732)."""
_NOISE = 1e-6  # the uniform noise keeps this distance from 0 and 1
_LEAST, _MOST = math.log(1e-2), math.log(1e2)


class Gates(nn.Module):
    """One gate in [0, 1] for each of ``count`` units, with a location log alpha that is learned.

    A sample is ``clamp(sigmoid((log u - log(1 - u) + log alpha) / beta) (zeta - gamma) + gamma, 0, 1)``, u uniform: it
    is 0 or 1 with a positive probability, and its gradient reaches log alpha wherever it is neither.

    Args:
        open_rate: probability-like start; log alpha begins at N(log(rate / (1 - rate)), 0.01).
        location: where log alpha begins instead.
    """

    def __init__(
        self,
        count: int,
        generator: torch.Generator,
        *,
        open_rate: float = 0.99,
        location: float | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        mean = math.log(open_rate) - math.log(1.0 - open_rate) if location is None else location
        self.location = nn.Parameter((mean + 0.01 * torch.randn(count, generator=generator)).to(device))

    def sample(self, generator: torch.Generator) -> Tensor:
        """Gates (count,) with noise of a CPU generator."""
        noise = torch.rand(self.location.shape, generator=generator).to(self.location.device)
        u = _NOISE + (1.0 - 2.0 * _NOISE) * noise
        relaxed = torch.sigmoid((torch.log(u) - torch.log1p(-u) + self.location) / TEMPERATURE)
        return (relaxed * (HIGH - LOW) + LOW).clamp(0.0, 1.0)

    def kept(self) -> Tensor:
        """P(gate > 0), (count,): ``sigmoid(log alpha - beta log(-gamma / zeta))``."""
        shift = TEMPERATURE * (math.log(-LOW) - math.log(HIGH))
        return torch.sigmoid(self.location - shift).clamp(_NOISE, 1.0 - _NOISE)

    def values(self) -> Tensor:
        """What a unit that stays is multiplied by at the end, (count,); also the order in which units go."""
        return torch.sigmoid(self.location.detach() * SHARPNESS / TEMPERATURE)

    def hold(self) -> None:
        """Keep log alpha within log 0.01 and log 100, as the authors of CoFi do: no gate is lost for ever."""
        with torch.no_grad():
            self.location.clamp_(_LEAST, _MOST)


class Lagrangian(nn.Module):
    """``l1 (s - t) + l2 (s - t)^2`` of a sparsity s and its target t, with multipliers that are raised by ascent.

    Wang et al. 2020 (arXiv 1910.04732); both multipliers begin at 0.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.second = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, sparsity: Tensor, target: float) -> Tensor:
        gap = sparsity - target
        return self.first * gap + self.second * gap * gap
