"""Importances from gradients of the loss: Taylor expansions per weight, per slice and per unit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import DataError
from ..pruning.space import Cut, PruningSpace
from ..utils.pytrees import Inputs, Nest, sample_count, take
from .unit_scores import Batches, Forward, Loss, Scores, per_unit, plain_forward, summed_dims


def taylor(
    model: nn.Module,
    space: PruningSpace,
    batches: Batches,
    loss: Loss,
    forward: Forward = plain_forward,
) -> Scores:
    """First-order Taylor score sum |w * dL/dw| of each unit (Molchanov et al. 2019, arXiv 1906.10771).

    The gradient is summed over all samples of ``batches`` of (inputs, targets) in eval mode, so scores are those of
    the mean loss times the number of samples, in the same order; ``forward`` gives the outputs that ``loss`` reads, by
    default the model's. The absolute value is taken per weight after
    summing, as RL-Pruner does (arXiv 2411.06463). Gradients, modes and requires_grad flags of the model are left as
    they were.
    """
    parameters = dict(model.named_parameters())
    weights = {c.tensor: parameters[c.tensor] for c in space.cuts if c.tensor in parameters}
    sums = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for gradients, samples in _gradients(model, weights, batches, (loss, forward), training=False):
        for total, gradient in zip(sums.values(), gradients, strict=True):
            if gradient is not None:
                total += gradient * samples
    with torch.no_grad():
        return per_unit(model, space, lambda c, t: (sums[c.tensor] * t).abs() if c.tensor in sums else None)


def taylor_filters(
    model: nn.Module, space: PruningSpace, batches: Batches, loss: Loss, forward: Forward = plain_forward
) -> Scores:
    """RL-Pruner's Taylor score sum |w * dL/dw| of the weights of a unit's own filters (arXiv 2411.06463).

    As in the authors' code: no norms, biases or consumers; gradients of the summed losses of the batches, in training
    mode; the mean over the layers whose filters are cut together. The model, its buffers included, is left as it was.
    """
    parameters = dict(model.named_parameters())
    wanted = {c.tensor for c in space.cuts if not c.consumer and c.tensor in parameters}
    weights = {name: parameters[name] for name in wanted if parameters[name].ndim > 1}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    sums = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    try:
        for gradients, _ in _gradients(model, weights, batches, (loss, forward), training=True):
            for total, gradient in zip(sums.values(), gradients, strict=True):
                if gradient is not None:
                    total += gradient
    finally:
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])

    def own(cut: Cut) -> Tensor | None:
        return None if cut.consumer else sums.get(cut.tensor)

    def share(cut: Cut, tensor: Tensor) -> Tensor | None:
        return None if own(cut) is None else torch.full_like(tensor, tensor.shape[cut.dim] / tensor.numel())

    with torch.no_grad():
        scores = per_unit(model, space, lambda c, t: None if (s := own(c)) is None else (s * t).abs())
        filters = per_unit(model, space, share)
    return [score / np.maximum(count, 1.0) for score, count in zip(scores, filters, strict=True)]


def _gradients(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    batches: Batches,
    objective: tuple[Loss, Forward],
    *,
    training: bool,
) -> Iterator[tuple[Sequence[Tensor | None], int]]:
    """Gradients of the loss of each batch by ``weights``, and its samples; flags and modes of the model come back."""
    flags = {p: p.requires_grad for p in model.parameters()}
    modes = {m: m.training for m in model.modules()}
    model.train(training)
    try:
        for parameter in flags:
            parameter.requires_grad_(False)
        for weight in weights.values():
            weight.requires_grad_()
        for inputs, targets in batches:
            with torch.enable_grad():
                value = _loss(objective, model, inputs, targets)
                gradients = torch.autograd.grad(value, [*weights.values()], allow_unused=True)
            yield gradients, sample_count(inputs, targets)
    finally:
        for parameter, trained in flags.items():
            parameter.requires_grad_(trained)
        for module, mode in modes.items():
            module.training = mode


def taylor_vector(
    model: nn.Module, space: PruningSpace, batches: Batches, loss: Loss, forward: Forward = plain_forward
) -> Scores:
    """LLM-Pruner's vector-wise Taylor score: sum over a unit's rows and columns of |sum w g| (arXiv 2305.11627).

    g is the gradient of the mean loss over ``batches``. As in the authors' code, a slice is one row or
    column of one weight matrix, biases are left out, and a unit's slices are summed.
    """
    return _per_slice(model, space, _expansion(model, space, batches, (loss, forward), 1.0, 0.0))


def taylor_param_first(
    model: nn.Module, space: PruningSpace, batches: Batches, loss: Loss, forward: Forward = plain_forward
) -> Scores:
    """LLM-Pruner's element-wise first-order score sum |w g| (Ma et al. 2023, arXiv 2305.11627, equation 5)."""
    return _per_weight(model, space, _expansion(model, space, batches, (loss, forward), 1.0, 0.0))


def taylor_param_second(
    model: nn.Module, space: PruningSpace, batches: Batches, loss: Loss, forward: Forward = plain_forward
) -> Scores:
    """LLM-Pruner's second-order score sum |w^2 acc|, acc = sum_j g_j^2 / N over N samples (arXiv 2305.11627)."""
    return _per_weight(model, space, _expansion(model, space, batches, (loss, forward), 0.0, 1.0))


def taylor_param_mix(
    model: nn.Module, space: PruningSpace, batches: Batches, loss: Loss, forward: Forward = plain_forward
) -> Scores:
    """LLM-Pruner's mixed score sum |w g - w^2 acc / 2|, acc = sum_j g_j^2 / N (arXiv 2305.11627)."""
    return _per_weight(model, space, _expansion(model, space, batches, (loss, forward), 1.0, -0.5))


def saap(
    model: nn.Module, space: PruningSpace, batches: Batches, loss: Loss, forward: Forward = plain_forward
) -> Scores:
    """SAAP's adaptive fusion of vector-wise and element-wise importance (arXiv 2412.15127).

    The vector-wise part is |sum (g w - w' H w / 2)| of a whole unit, the element-wise part the sum of
    |g w - H w^2 / 2| over its weights. Derived, where the paper leaves it open: H is the diagonal of the
    empirical Fisher matrix, sum_j g_j^2 / N; minimising the fusion I_v / (2 s1^2) + I_e / (2 s2^2) +
    log(s1 s2) over s1 and s2 gives s^2 = mean(I), so the score is I_v / mean(I_v) + I_e / mean(I_e), with
    means over all units of a kind (attention, feed-forward), whose sizes differ too much for one scale.
    """
    terms = _expansion(model, space, batches, (loss, forward), 1.0, -0.5)
    element = _per_weight(model, space, terms)
    vector = [np.abs(s) for s in per_unit(model, space, lambda c, t: terms.get(c.tensor))]
    kinds = np.array([g.kind for g in space.groups])
    scores = [np.zeros(g.units) for g in space.groups]
    for kind in set(kinds.tolist()):
        members = np.flatnonzero(kinds == kind)
        for part in (vector, element):
            mean = np.concatenate([part[i] for i in members]).mean()
            for i in members:
                scores[i] += part[i] / (mean if mean > 0 else 1.0)
    return scores


def _expansion(
    model: nn.Module,
    space: PruningSpace,
    batches: Batches,
    objective: tuple[Loss, Forward],
    first: float,
    second: float,
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
            for x, y in _singles(inputs, targets) if second else [(inputs, targets)]:
                size = sample_count(x, y)
                count += size
                with torch.enable_grad():
                    _loss(objective, model, x, y).backward()
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


def _loss(objective: tuple[Loss, Forward], model: nn.Module, inputs: Inputs, targets: Nest) -> Tensor:
    loss, forward = objective
    return loss(forward(model, inputs, targets), targets)


def _singles(*batch: Nest) -> Iterator[tuple[Any, ...]]:
    """The samples of (inputs, targets), one at a time."""
    for i in range(sample_count(*batch)):
        yield tuple(take(part, slice(i, i + 1)) for part in batch)


def _accumulator(parameter: Tensor) -> torch.dtype:
    return torch.float64 if parameter.dtype == torch.float64 else torch.float32


def _per_weight(model: nn.Module, space: PruningSpace, terms: dict[str, Tensor]) -> Scores:
    return per_unit(model, space, lambda c, t: terms[c.tensor].abs() if c.tensor in terms else None)


def _per_slice(model: nn.Module, space: PruningSpace, terms: dict[str, Tensor]) -> Scores:
    """Sum of |sum of a slice| over the rows and columns of each unit."""

    def slices(cut: Cut, tensor: Tensor) -> Tensor | None:
        if cut.tensor not in terms:
            return None
        others = summed_dims(space, cut, tensor.ndim)
        return terms[cut.tensor].double().sum(dim=others, keepdim=True).abs()

    return per_unit(model, space, slices)
