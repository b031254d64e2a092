"""Unit importances: which units of a group go first. Every function returns G float arrays, one score a unit.

A unit's score sums over everything that would be cut with it, as in DepGraph (Fang et al. 2023,
arXiv 2301.12900): the producers' rows, the norm layers' entries and the consumers' columns where the
formula says so. Higher scores are kept. Those from gradients stand in `gradient_importance`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from ..arrays import Floats
from ..errors import ConfigError, near_miss
from ..memory import return_freed_memory
from .elimination import eliminations
from .fisher import divergence_curves, fisher_eliminations, output_moments
from .gradient_importance import (
    saap,
    taylor,
    taylor_param_first,
    taylor_param_mix,
    taylor_param_second,
    taylor_vector,
)
from .grams import Consumer, Grams, group_consumers
from .grams import collect as collect_grams
from .space import PruningSpace
from .statistics import Statistics
from .statistics import collect as collect_statistics
from .torch_internals import BATCH_NORM
from .unit_scores import Batches, Scores, per_unit


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
    return [rng.random(g.width) for g in space.groups]


def _by_column(
    model: nn.Module, space: PruningSpace, name: str, score: Callable[[Consumer, Floats], Floats]
) -> Scores:
    """``score(consumer, weights (I, O))`` gives scores (units,); a hidden size that is a group gets its L2 norm."""
    consumers = group_consumers(space, f"prune.importance: {name!r}")
    found = {c.group: score(c, c.matrix(model).double().cpu().numpy()) for c in consumers}
    spare = l2(model, space) if len(found) < len(space.groups) else []
    return [found[g] if g in found else spare[g] for g in range(len(space.groups))]


def wanda_sp(model: nn.Module, space: PruningSpace, statistics: Statistics) -> Scores:
    """Wanda-sp: mean over outputs i of |W_ij| * ||X_j||, summed over a unit's input columns j.

    Wanda's metric (Sun et al. 2023, arXiv 2306.11695) made structured as in FLAP's code (arXiv 2312.11983);
    ||X_j|| is the root mean square over tokens of the consumer's (o_proj's, down_proj's) input column.
    """

    def score(consumer: Consumer, weights: Floats) -> Floats:
        norms = np.sqrt(statistics.inputs[consumer.module].second)
        return (np.abs(weights).mean(axis=1) * norms)[consumer.columns].sum(axis=1)

    return _by_column(model, space, "wanda_sp", score)


def flap(model: nn.Module, space: PruningSpace, statistics: Statistics) -> Scores:
    """FLAP's fluctuation: Var(X_j) * ||W_:j||^2, squared in attention, averaged over a unit's input columns j.

    An et al. 2023, arXiv 2312.11983, equation 5; the square is in the authors' code. Their standardisation
    within a layer changes no ranking within it and belongs to the rule `flap`.
    """

    def score(consumer: Consumer, weights: Floats) -> Floats:
        values = statistics.inputs[consumer.module].variance * (weights**2).sum(axis=1)
        if space.groups[consumer.group].kind == "attention":
            values = values**2
        return values[consumer.columns].mean(axis=1)

    return _by_column(model, space, "flap", score)


def obs(model: nn.Module, space: PruningSpace, grams: Grams, ridge: float = 1e-3) -> Scores:
    """Greedy elimination: the unit that the others replace best, by ridge regression, goes first.

    Structured Optimal Brain Surgeon (ZipLM, arXiv 2302.04089, see :mod:`.elimination`). Scores are the
    places in that order, 0 for the first unit to go.
    """
    found = eliminations(model, space, grams, ridge)
    return _by_column(model, space, "obs", lambda consumer, weights: found[consumer.group].ranks)


def obs_fisher(
    model: nn.Module,
    space: PruningSpace,
    grams: Callable[[], Grams],
    batches: Batches,
    ridge: float = 1e-3,
    seed: int = 0,
    measured: dict[str, Any] | None = None,
) -> Scores:
    """Greedy elimination that counts nats: output errors are weighted by the Fisher information (`fisher`).

    K-FAC (arXiv 1503.05671) in structured Optimal Brain Surgeon (ZipLM, arXiv 2302.04089). Scores are the
    places in the order, 0 for the first unit to go. The expected divergence of every width is left in
    ``measured["fisher"]``, where the rule `fisher` finds it. ``grams`` is called after the backward pass: the
    matrices beside its activations would be the peak of a search's memory.
    """
    moments = output_moments(model, space, batches, seed)
    return_freed_memory()
    found = fisher_eliminations(model, space, grams(), moments, ridge)
    if measured is not None:
        measured["fisher"] = divergence_curves(found)
    return _by_column(model, space, "obs_fisher", lambda consumer, weights: found[consumer.group].ranks)


IMPORTANCES: dict[str, Callable[..., Scores]] = {
    "l1": l1,
    "l2": l2,
    "bn_scale": bn_scale,
    "taylor": taylor,
    "taylor_vector": taylor_vector,
    "taylor_param_first": taylor_param_first,
    "taylor_param_second": taylor_param_second,
    "taylor_param_mix": taylor_param_mix,
    "saap": saap,
    "random": random,
}
"""Importances that any model's units can have."""

LANGUAGE_IMPORTANCES: dict[str, Callable[..., Scores]] = {
    "wanda_sp": wanda_sp,
    "flap": flap,
    "obs": obs,
    "obs_fisher": obs_fisher,
}
"""Importances that read the inputs of o_proj and down_proj: for language models only."""

# Calibration samples of the backward pass of `obs_fisher`: (O, O) moments need fewer than (I, I) ones.
_FISHER_SAMPLES = 64
_ELIMINATIONS = ("obs", "obs_fisher")  # those that read Gram matrices

_GRADIENTS = (taylor, taylor_vector, taylor_param_first, taylor_param_second, taylor_param_mix, saap)


def compute(
    name: str,
    workload: Any,
    space: PruningSpace,
    seed: int = 0,
    model: nn.Module | None = None,
    grams: Callable[[], Grams] | None = None,
    statistics: Statistics | None = None,
    *,
    limit: int | None = None,
    ridge: float = 1e-3,
    measured: dict[str, Any] | None = None,
) -> Scores:
    """Scores by name for a workload's dense model (or ``model``), on its calibration split where data are read.

    Args:
        grams: gives what ``grams.collect`` made, for `obs` and `obs_fisher`; collected here when not given.
        statistics: from ``statistics.collect``, for `wanda_sp` and `flap`; collected here when not given.
        limit: calibration samples that are read (LLM-Pruner's published setting is 10); None for all.
        ridge: penalty of `obs` and `obs_fisher`.
        measured: takes what an importance measured on its way and a rule can use.

    Raises:
        ConfigError: unknown name, or one that this kind of model cannot use.
    """
    allowed = {**IMPORTANCES, **LANGUAGE_IMPORTANCES}
    if name not in allowed:
        hint = near_miss(name, allowed)
        raise ConfigError(f"prune.importance: unknown {name!r}{hint}; allowed: {', '.join(allowed)}")
    subject = workload.model if model is None else model
    function = allowed[name]
    if name == "random":
        return random(subject, space, seed)
    if function in _GRADIENTS:
        return function(subject, space, workload.batches("calibration", limit), workload.loss)
    if name in LANGUAGE_IMPORTANCES:
        group_consumers(space, f"prune.importance: {name!r}")  # refuse before the data are read
        batches = workload.batches("calibration", limit)
        if name in _ELIMINATIONS:
            collected = grams or (
                lambda: collect_grams(subject, space, workload.batches("calibration", limit))
            )
            if name == "obs":
                return obs(subject, space, collected(), ridge)
            most = _FISHER_SAMPLES if limit is None else min(limit, _FISHER_SAMPLES)
            few = workload.batches("calibration", most)
            return obs_fisher(subject, space, collected, few, ridge, seed, measured)
        if statistics is None:
            statistics = collect_statistics(subject, space, batches)
        return function(subject, space, statistics)
    return function(subject, space)
