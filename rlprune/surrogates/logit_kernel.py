"""The kernel of the process of the logits, and how its hyperparameters are adapted to what is known.

Shape legend: P plans, K known plans, G groups.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from ..utils.arrays import Floats
from .kernels import Levels, additive, additive_gradient, distances, lengths_gradient, matern

# Prior of the kernel's logarithms (centre of each kind, one spread) and where the first fit starts.
_CENTRES = {"alone": -2.0, "alone_length": 0.5, "joint": -1.0, "joint_length": 1.0, "noise": -6.0}
_STARTS = {"alone": 0.0, "alone_length": 0.0, "joint": 0.0, "joint_length": 0.7, "noise": -4.0}
_SPREAD = 1.5
# Part of the noise that no fit can take away.
_JITTER = 1e-5
# Logits of one model hang together: they count as so many independent outputs.
_OUTPUTS = 30.0
# How far a logarithm may go from the prior's centre, and the gain of a step, as a share of the whole, that is not worth
# another one.
_REACH, _GAIN = 5 * _SPREAD, 1e-4


@dataclass(frozen=True)
class LogitKernel:
    """A sum of one Matern 2.5 kernel a group (cuts do not know of each other) and one over all groups (they do).

    Args:
        scales: logarithms of the hyperparameters (3 G + 2,): each group's height and length, the joint height, the
            joint lengths, the noise.
    """

    scales: Tensor

    def __call__(self, known: Tensor, x: Tensor, levels: Levels | None = None) -> Tensor:
        """Covariance (K, P) of plans known (K, G) with plans x (P, G), whose levels may be known already."""
        alone, length, joint, joint_length, _ = self.parts
        alike = matern(distances(known, x, joint_length)).mul_(joint)
        return alike.add_(additive(known, levels or Levels.of(x), alone, length).T)

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """Heights (G,), lengths (G,), joint height (1,), joint lengths (G,) and fitted noise (1,)."""
        groups = (len(self.scales) - 2) // 3
        return self.scales.exp().split([groups, groups, 1, groups, 1])

    @property
    def own(self) -> float:
        """Covariance of a plan with itself."""
        alone, _, joint, _, _ = self.parts
        return float(alone.sum() + joint[0])

    @property
    def noise(self) -> float:
        """Variance of what is not the kernel's."""
        return float(self.scales[-1].exp()) + _JITTER


def first_scales(groups: int) -> Tensor:
    """Where the first fit starts."""
    return _per_group(_STARTS, groups)


class Posterior:
    """Minus the logarithm of the posterior of a kernel's hyperparameters, up to a constant, and its gradient.

    Args:
        x: plans (K, G).
        gram: second moments (K, K) of their logits' changes.
    """

    def __init__(self, x: Tensor, gram: Tensor) -> None:
        self._x, self._gram, self._levels = x, gram, Levels.of(x)
        self._centre = _per_group(_CENTRES, x.shape[1])

    def __call__(self, scales: Tensor) -> tuple[float, Tensor]:
        """Its value, and its gradient (3 G + 2,), in closed form (Rasmussen & Williams 2006, equation 5.9)."""
        kernel, x = LogitKernel(scales), self._x
        alone, length, joint, joint_length, noise = kernel.parts
        distance = distances(x, x, joint_length)
        alike = matern(distance).mul_(joint)
        covariance = alike + additive(x, self._levels, alone, length).T
        covariance.diagonal().add_(kernel.noise)
        lower, failed = torch.linalg.cholesky_ex(covariance)
        if failed:
            return math.inf, torch.zeros_like(scales)
        inverse = torch.cholesky_inverse(lower)
        explained = inverse @ self._gram
        off = (scales - self._centre) / _SPREAD
        fit = 0.5 * float(explained.diagonal().sum()) + float(lower.diagonal().log().sum())
        # How the value changes with every entry of the covariance.
        weights = torch.addmm(inverse, explained, inverse, alpha=-1.0).mul_(0.5 * _OUTPUTS)
        weights = (weights + weights.T) / 2.0
        by_height, by_length = additive_gradient(x, self._levels, alone, length, weights)
        gradient = torch.cat(
            [
                by_height,
                by_length,
                (weights * alike).sum()[None],
                joint * lengths_gradient(x, joint_length, distance, weights),
                weights.diagonal().sum() * noise,
            ]
        )
        return _OUTPUTS * fit + 0.5 * float(off.square().sum()), gradient + off / _SPREAD


def adapted(scales: Tensor, x: Tensor, gram: Tensor, steps: int) -> Tensor:
    """Hyperparameters nearer to the highest posterior; gram (K, K) is the logits' second moment over plans.

    At most so many steps of L-BFGS from where the last fit ended, fewer where they gain nothing any more.
    """
    posterior = Posterior(x, gram)

    def objective(values: Floats) -> tuple[float, Floats]:
        value, gradient = posterior(torch.from_numpy(values))
        return value, gradient.numpy()

    centre = _per_group(_CENTRES, x.shape[1]).numpy()
    bounds = np.stack([centre - _REACH, centre + _REACH], axis=1)
    options = {"maxiter": steps, "ftol": _GAIN}
    found = minimize(objective, scales.numpy(), jac=True, method="L-BFGS-B", bounds=bounds, options=options)
    return torch.from_numpy(found.x)


def _per_group(values: dict[str, float], groups: int) -> Tensor:
    """Logarithms of the kernel's hyperparameters (3 G + 2,)."""
    counts = {"alone": groups, "alone_length": groups, "joint": 1, "joint_length": groups, "noise": 1}
    return torch.cat([torch.full((n,), values[name], dtype=torch.float64) for name, n in counts.items()])
