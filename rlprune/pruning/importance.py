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

from ..errors import ConfigError, DataError, near_miss
from ..memory import return_freed_memory
from .elimination import eliminations
from .fisher import divergence_curves, fisher_eliminations, output_moments
from .grams import Consumer, Grams, group_consumers
from .grams import collect as collect_grams
from .space import Cut, PruningSpace
from .statistics import Statistics
from .statistics import collect as collect_statistics

Floats = NDArray[np.float64]
Scores = list[Floats]
Batches = Iterable[tuple[Tensor, Tensor]]
Loss = Callable[[Any, Tensor], Tensor]


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


def taylor_vector(model: nn.Module, space: PruningSpace, batches: Batches, loss: Loss) -> Scores:
    """LLM-Pruner's vector-wise Taylor score: sum over a unit's rows and columns of |sum w g| (arXiv 2305.11627).

    g is the gradient of the mean loss over ``batches``. As in the authors' code, a slice is one row or
    column of one weight matrix, biases are left out, and a unit's slices are summed.
    """
    return _per_slice(model, space, _expansion(model, space, batches, loss, 1.0, 0.0))


def taylor_param_first(model: nn.Module, space: PruningSpace, batches: Batches, loss: Loss) -> Scores:
    """LLM-Pruner's element-wise first-order score sum |w g| (Ma et al. 2023, arXiv 2305.11627, equation 5)."""
    return _per_weight(model, space, _expansion(model, space, batches, loss, 1.0, 0.0))


def taylor_param_second(model: nn.Module, space: PruningSpace, batches: Batches, loss: Loss) -> Scores:
    """LLM-Pruner's second-order score sum |w^2 acc|, acc = sum_j g_j^2 / N over N samples (arXiv 2305.11627)."""
    return _per_weight(model, space, _expansion(model, space, batches, loss, 0.0, 1.0))


def taylor_param_mix(model: nn.Module, space: PruningSpace, batches: Batches, loss: Loss) -> Scores:
    """LLM-Pruner's mixed score sum |w g - w^2 acc / 2|, acc = sum_j g_j^2 / N (arXiv 2305.11627)."""
    return _per_weight(model, space, _expansion(model, space, batches, loss, 1.0, -0.5))


def saap(model: nn.Module, space: PruningSpace, batches: Batches, loss: Loss) -> Scores:
    """SAAP's adaptive fusion of vector-wise and element-wise importance (arXiv 2412.15127).

    The vector-wise part is |sum (g w - w' H w / 2)| of a whole unit, the element-wise part the sum of
    |g w - H w^2 / 2| over its weights. Derived, where the paper leaves it open: H is the diagonal of the
    empirical Fisher matrix, sum_j g_j^2 / N; minimising the fusion I_v / (2 s1^2) + I_e / (2 s2^2) +
    log(s1 s2) over s1 and s2 gives s^2 = mean(I), so the score is I_v / mean(I_v) + I_e / mean(I_e), with
    means over all units of a kind (attention, feed-forward), whose sizes differ too much for one scale.
    """
    terms = _expansion(model, space, batches, loss, 1.0, -0.5)
    element = _per_weight(model, space, terms)
    vector = [np.abs(s) for s in _per_unit(model, space, lambda c, t: terms.get(c.tensor))]
    kinds = np.array([g.kind for g in space.groups])
    scores = [np.zeros(g.width) for g in space.groups]
    for kind in set(kinds.tolist()):
        members = np.flatnonzero(kinds == kind)
        for part in (vector, element):
            mean = np.concatenate([part[i] for i in members]).mean()
            for i in members:
                scores[i] += part[i] / (mean if mean > 0 else 1.0)
    return scores


def _expansion(
    model: nn.Module, space: PruningSpace, batches: Batches, loss: Loss, first: float, second: float
) -> dict[str, Tensor]:
    """``first * w g + second * w^2 acc`` of each cut weight matrix, in the matrix's shape.

    One buffer of the cut weights' size is all that is held: each gradient is added to it, times its
    weight, as soon as it is there, and freed. Squares are taken sample by sample, so ``second`` reads
    the data one sample at a time. Gradients, modes and requires_grad flags are left as they were.
    """
    parameters = dict(model.named_parameters())
    cut = {c.tensor for c in space.cuts if c.tensor in parameters and parameters[c.tensor].ndim > 1}
    terms = {n: torch.zeros_like(p, dtype=_accumulator(p)) for n, p in parameters.items() if n in cut}
    before = {p: (p.requires_grad, p.grad) for p in parameters.values()}
    modes = {m: m.training for m in model.modules()}
    size = 1

    def note(total: Tensor) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            assert parameter.grad is not None
            change = parameter.detach().to(total.dtype) * parameter.grad
            if first:
                total.add_(change, alpha=first * size)
            if second:
                total.addcmul_(change, change, value=second)
            parameter.grad = None

        return hook

    handles = []
    count = 0
    model.eval()
    try:
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in cut)
            parameter.grad = None
        handles = [parameters[n].register_post_accumulate_grad_hook(note(t)) for n, t in terms.items()]
        for inputs, targets in batches:
            parts = zip(inputs.split(1), targets.split(1)) if second else [(inputs, targets)]
            for x, y in parts:
                size = len(y)
                count += size
                with torch.enable_grad():
                    loss(model(x), y).backward()
    finally:
        for handle in handles:
            handle.remove()
        for parameter, (wanted, gradient) in before.items():
            parameter.requires_grad_(wanted)
            parameter.grad = gradient
        for module, mode in modes.items():
            module.training = mode
    if not count:
        raise DataError("importance: there are no calibration samples")
    for total in terms.values():
        total /= count
    return terms


def _accumulator(parameter: Tensor) -> torch.dtype:
    return torch.float64 if parameter.dtype == torch.float64 else torch.float32


def _per_weight(model: nn.Module, space: PruningSpace, terms: dict[str, Tensor]) -> Scores:
    return _per_unit(model, space, lambda c, t: terms[c.tensor].abs() if c.tensor in terms else None)


def _per_slice(model: nn.Module, space: PruningSpace, terms: dict[str, Tensor]) -> Scores:
    """Sum of |sum of a slice| over the rows and columns of each unit."""

    def slices(cut: Cut, tensor: Tensor) -> Tensor | None:
        if cut.tensor not in terms:
            return None
        others = [d for d in range(tensor.ndim) if d != cut.dim]
        return terms[cut.tensor].double().sum(dim=others, keepdim=True).abs()

    return _per_unit(model, space, slices)


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
