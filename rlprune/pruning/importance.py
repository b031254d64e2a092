"""Unit importances: which units of a group go first. Every function returns G float arrays, one score a unit.

A unit's score sums over everything that would be cut with it, as in DepGraph (Fang et al. 2023,
arXiv 2301.12900): the producers' rows, the norm layers' entries and the consumers' columns where the
formula says so. Higher scores are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..errors import ConfigError, near_miss
from .space import Cut, PruningSpace

Scores = list[NDArray[np.float64]]


def _per_unit(
    model: nn.Module, space: PruningSpace, element: Callable[[Cut, Tensor], Tensor | None]
) -> Scores:
    """Sum ``element(cut, tensor)`` (same shape as the tensor, or None to leave it out) over each unit's slots."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    total = np.zeros(int(space.widths.sum()) + 1)
    for cut in space.cuts:
        values = element(cut, tensors[cut.tensor])
        if values is None:
            continue
        others = [d for d in range(values.ndim) if d != cut.dim]
        sums = (values.double().sum(dim=others) if others else values.double()).cpu().numpy()
        np.add.at(total, space.axes[cut.axis].slots, sums)
    return np.split(total[:-1], space.offsets[1:])


def magnitude(model: nn.Module, space: PruningSpace, p: int = 2) -> Scores:
    """Lp norm of the producers' weight rows of each unit (p = 1: Li et al. 2017, arXiv 1608.08710)."""
    if p not in (1, 2):
        raise ConfigError(f"importance: magnitude p={p!r}; allowed: 1, 2")
    with torch.no_grad():
        scores = _per_unit(
            model, space, lambda c, t: None if c.consumer or t.ndim < 2 else t.detach().double().abs() ** p
        )
    return [s ** (1.0 / p) for s in scores]


def l1(model: nn.Module, space: PruningSpace) -> Scores:
    """L1 norm of each unit's producing weights (Li et al. 2017, arXiv 1608.08710)."""
    return magnitude(model, space, p=1)


def l2(model: nn.Module, space: PruningSpace) -> Scores:
    """L2 norm of each unit's producing weights (He et al. 2018, arXiv 1808.06866, use it for filters)."""
    return magnitude(model, space, p=2)


def bn_scale(model: nn.Module, space: PruningSpace) -> Scores:
    """|gamma| of the batch norms that a unit passes (Liu et al. 2017, arXiv 1708.06519).

    A group without a batch norm falls back to its L2 norm; groups are never compared by these scores.
    """
    gammas = {
        f"{name}.weight"
        for name, m in model.named_modules()
        if isinstance(m, nn.modules.batchnorm._BatchNorm)
    }
    with torch.no_grad():
        scores = _per_unit(model, space, lambda c, t: t.detach().abs() if c.tensor in gammas else None)
    spare = l2(model, space)
    return [s if s.any() else other for s, other in zip(scores, spare, strict=True)]


def taylor(
    model: nn.Module,
    space: PruningSpace,
    batches: Iterable[tuple[Tensor, Tensor]],
    loss: Callable[[Any, Tensor], Tensor],
) -> Scores:
    """First-order Taylor score sum |w * dL/dw| of each unit (Molchanov et al. 2019, arXiv 1906.10771).

    The gradient is averaged over ``batches`` of (inputs, targets) in eval mode. The absolute value is
    taken per weight after averaging, as RL-Pruner does (arXiv 2411.06463). Gradients, modes and
    requires_grad flags of the model are left as they were.
    """
    parameters = dict(model.named_parameters())
    wanted = {c.tensor for c in space.cuts if c.tensor in parameters}
    trainable = {name: p.requires_grad for name, p in parameters.items()}
    modes = {m: m.training for m in model.modules()}
    sums = {name: torch.zeros_like(parameters[name]) for name in wanted}
    model.eval()
    try:
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in wanted)
        for inputs, targets in batches:
            with torch.enable_grad():
                value = loss(model(inputs), targets)
                gradients = torch.autograd.grad(value, [parameters[n] for n in sums], allow_unused=True)
            for total, gradient in zip(sums.values(), gradients, strict=True):
                if gradient is not None:
                    total += gradient * len(targets)
    finally:
        for name, parameter in parameters.items():
            parameter.requires_grad_(trainable[name])
        for module, mode in modes.items():
            module.training = mode
    with torch.no_grad():
        return _per_unit(model, space, lambda c, t: (sums[c.tensor] * t).abs() if c.tensor in sums else None)


def random(model: nn.Module, space: PruningSpace, seed: int = 0) -> Scores:
    """Uniform random scores: what an importance has to beat."""
    rng = np.random.default_rng(seed)
    return [rng.random(g.width) for g in space.groups]


IMPORTANCES: dict[str, Callable[..., Scores]] = {
    "l1": l1,
    "l2": l2,
    "bn_scale": bn_scale,
    "taylor": taylor,
    "random": random,
}


def compute(
    name: str, workload: Any, space: PruningSpace, seed: int = 0, model: nn.Module | None = None
) -> Scores:
    """Scores by name for a workload's dense model (or ``model``); Taylor reads the calibration split.

    Raises:
        ConfigError: unknown name.
    """
    if name not in IMPORTANCES:
        hint = near_miss(name, IMPORTANCES)
        raise ConfigError(f"prune.importance: unknown {name!r}{hint}; allowed: {', '.join(IMPORTANCES)}")
    subject = workload.model if model is None else model
    if name == "taylor":
        return taylor(subject, space, workload.batches("calibration"), workload.loss)
    if name == "random":
        return random(subject, space, seed)
    return IMPORTANCES[name](subject, space)
