"""Unit importances: which units of a group go first. Every function returns G float arrays, one score a unit.

A unit's score sums over everything that would be cut with it, as in DepGraph (Fang et al. 2023,
arXiv 2301.12900): the producers' rows, the norm layers' entries and the consumers' columns where the
formula says so. Higher scores are kept. Those from gradients stand in `gradient_importance`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from ..config.config import AUTO
from ..errors import ConfigError, near_miss
from ..pruning.space import PruningSpace
from ..utils.registry import Registry
from ..utils.torch_internals import BATCH_NORM
from .calibration_cache import CURVES, CalibrationCache
from .gradient import (
    saap,
    taylor,
    taylor_filters,
    taylor_param_first,
    taylor_param_mix,
    taylor_param_second,
    taylor_vector,
)
from .unit_scores import Batches, Forward, Loss, Scores, per_unit


def magnitude(model: nn.Module, space: PruningSpace, p: int = 2) -> Scores:
    """Lp norm of the producers' weight rows of each unit (p = 1: Li et al. 2017, arXiv 1608.08710)."""
    if p not in (1, 2):
        raise ConfigError(f"importance: magnitude p={p!r}; allowed: 1, 2")
    with torch.no_grad():
        scores = per_unit(
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
    gammas = {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, BATCH_NORM)}
    with torch.no_grad():
        scores = per_unit(model, space, lambda c, t: t.detach().abs() if c.tensor in gammas else None)
    spare = l2(model, space)
    return [s if s.any() else other for s, other in zip(scores, spare, strict=True)]


def random(model: nn.Module, space: PruningSpace, seed: int = 0) -> Scores:
    """Uniform random scores: what an importance has to beat."""
    rng = np.random.default_rng(seed)
    return [rng.random(g.units) for g in space.groups]


Function = Callable[[CalibrationCache], Scores]
Gradient = Callable[[nn.Module, PruningSpace, Batches, Loss, Forward], Scores]


@dataclass(frozen=True)
class Importance:
    """A registered importance: ``function(calibration)`` gives G arrays, one score a unit.

    ``wing`` names the only wing whose models have it (see ``ModelAdapter.wing``); None for all models.
    """

    name: str
    summary: str
    function: Function
    wing: str | None = None


IMPORTANCES: Registry[Importance] = Registry("importance", reserved=(AUTO,))


def register(
    summary: str, *, wing: str | None = None, name: str | None = None
) -> Callable[[Function], Function]:
    """Register an importance under the name of the function below, or under ``name``.

    The function takes a :class:`CalibrationCache` (``model``, ``space``, ``seed``, ``batches(limit)``, and
    ``source.loss``) and returns G arrays, one score a unit; higher scores are kept.

    Raises (when applied):
        ConfigError: the name is taken, or the summary is missing.
    """
    return IMPORTANCES.decorator(
        "importance", summary, lambda own, function: Importance(own, summary, function, wing), name
    )


def find_importance(name: str) -> Importance:
    """An importance by name; ConfigError with the near miss for an unknown one."""
    if not IMPORTANCES.knows(name):
        hint = near_miss(name, [AUTO, *IMPORTANCES])
        raise ConfigError(
            f"prune.importance: unknown {name!r}{hint}; allowed: {AUTO}, {', '.join(IMPORTANCES)}"
        )
    return IMPORTANCES[name]


def _of_weights(function: Callable[[nn.Module, PruningSpace], Scores]) -> None:
    register(first_sentence(function), name=function.__name__)(lambda c: function(c.model, c.space))


def _of_gradients(function: Gradient) -> None:
    register(first_sentence(function), name=function.__name__)(
        lambda c: function(c.model, c.space, c.batches(c.limit), c.source.loss_of, c.source.outputs_for_loss)
    )


def first_sentence(function: Callable[..., object]) -> str:
    """The first line of a function's docstring, as a summary."""
    return (function.__doc__ or "").strip().partition("\n")[0]


for _function in (l1, l2, bn_scale):
    _of_weights(_function)
for _gradient in (
    taylor,
    taylor_filters,
    taylor_vector,
    taylor_param_first,
    taylor_param_second,
    taylor_param_mix,
    saap,
):
    _of_gradients(_gradient)
register(first_sentence(random), name="random")(lambda c: random(c.model, c.space, c.seed))


@register("place in the order in which units go at the least expected divergence: elimination in nats")
def obs_fisher(cache: CalibrationCache) -> Scores:
    """Greedy elimination by closed-form errors that are weighted by the Fisher information of the outputs.

    K-FAC (arXiv 1503.05671; for convolutions 1602.01407) in structured Optimal Brain Surgeon (ZipLM, arXiv 2302.04089).
    Scores are the places in the order, 0 for the first unit to go. With them comes the expected divergence of every
    width, which the rule `fisher` spreads the pruning by.
    """
    scores, curves = cache.ranked_by_divergence()
    cache.keep(CURVES, curves)
    return scores
