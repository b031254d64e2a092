"""How far the predictions move with a layer's output: second moments of gradients of the log-likelihood.

Near the dense model, an error d in the output z of a layer costs ``KL = E[d' F d] / 2`` nats a token, where
``F = E[g g']`` and g is the gradient of log p(y) with respect to z under labels y that the model itself
draws (the Fisher information; Martens 2020, arXiv 1412.1193). With the layer's input moments ``E[x x']``
(:mod:`.grams`) and the two taken as independent (K-FAC, Martens and Grosse 2015, arXiv 1503.05671), the
cost of cutting units is known for every width without running the cut model: the weights are multiplied by
the root of F, and greedy elimination (:mod:`.elimination`) then counts nats instead of squared activations.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...errors import DataError
from ...pruning.space import PruningSpace
from ...recovery.elimination import Elimination, eliminate
from ...utils.arrays import Floats
from ...utils.modes import evaluating
from ..tuning.loss import learned
from .elimination import Ranked, note_elimination
from .grams import GramSource, group_consumers, token_rows, unit_consumers

# Share of F's mean diagonal that is added before the root: directions that no gradient has shown count a little.
_DAMPING = 1e-4


def output_moments(
    model: nn.Module, space: PruningSpace, batches: Iterable[tuple[Tensor, object]], seed: int = 0
) -> dict[str, Tensor]:
    """``F = E[g g']`` of every consumer's output (O, O), by module name, in float32 (float64 for such a model).

    One forward and backward pass over ``batches``, sequence by sequence to save memory; labels are drawn
    from the model's own predictions by ``seed``, where targets leave tokens out (-100) for the others only. No
    gradient reaches the parameters.

    Raises:
        DataError: there are no batches.
    """
    sums: dict[str, Tensor] = {}
    tokens = 0
    trainable = [(p, p.requires_grad) for p in model.parameters()]

    def watch(name: str) -> Any:
        def hook(layer: nn.Module, inputs: object, output: Tensor) -> None:
            def note(gradient: Tensor) -> None:
                g = token_rows(gradient)
                sums[name] = sums[name].addmm_(g.T, g) if name in sums else g.T @ g

            if output.requires_grad:
                output.register_hook(note)

        return hook

    def start(layer: nn.Module, inputs: object, output: Tensor) -> Tensor:
        return output.detach().requires_grad_()

    consumers = unit_consumers(space)
    modules = dict.fromkeys(c.module for c in consumers)
    handles = [model.get_submodule(name).register_forward_hook(watch(name)) for name in modules]
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    handles.append(embeddings.register_forward_hook(start))
    keywords = {"use_cache": False} if hasattr(model, "config") else {}
    try:
        for parameter, _ in trainable:
            parameter.requires_grad_(False)
        with evaluating(model), torch.enable_grad():
            for inputs, targets in batches:
                some = learned(inputs, targets)
                for number, ids in enumerate(inputs.split(1)):
                    logits = model(ids, **keywords).logits.flatten(0, -2).float()
                    if some is not None:
                        logits = logits[:-1][(some[number, 1:] != -100).to(logits.device)]
                    drawn = _drawn(logits.detach(), seed + tokens)
                    torch.nn.functional.cross_entropy(logits, drawn, reduction="sum").backward()
                    tokens += len(drawn)
    finally:
        for handle in handles:
            handle.remove()
        for parameter, wanted in trainable:
            parameter.requires_grad_(wanted)
    if not tokens:
        raise DataError("calibration: the split is empty")
    return {name: total / tokens for name, total in sums.items()}


def _drawn(logits: Tensor, seed: int) -> Tensor:
    """One label for each row, drawn on the CPU so that every device draws the same."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(len(logits), 1, generator=generator, dtype=torch.float64)
    steps = logits.softmax(dim=-1).cumsum(dim=-1)
    place = noise.to(logits) * steps[:, -1:]
    return torch.searchsorted(steps, place).clamp_max(logits.shape[-1] - 1)[:, 0]


def fisher_eliminations(
    model: nn.Module,
    space: PruningSpace,
    grams: GramSource,
    moments: Mapping[str, Tensor],
    ridge: float = 1e-3,
    then: Ranked | None = None,
) -> dict[int, Elimination]:
    """As `elimination.eliminations`, in nats: half of ``errors`` is the divergence that a cut is expected to cost."""
    found: dict[int, Elimination] = {}
    module, root = "", torch.empty(0)
    with torch.no_grad():
        for consumer, gram in grams.each(group_consumers(space, "prune.importance: 'obs_fisher'")):
            product = gram.centred() if consumer.has_bias(model) else gram.product
            if consumer.module != module:  # experts share their output
                module, root = consumer.module, _root(moments[consumer.module])
            weights = consumer.matrix(model).double() @ root
            one = eliminate(product, weights, consumer.columns, gram.ridge(ridge))
            note_elimination(found, consumer, one)
            if then is not None:
                then(consumer, gram, one.ranks)
            del gram, product  # before the next block's are made
    return found


def _root(moment: Tensor) -> Tensor:
    """The symmetric root of a damped (O, O) second moment, in float64."""
    damped = moment.double().clone()
    damped.diagonal().add_(_DAMPING * damped.diagonal().mean().clamp_min(1e-30))
    values, vectors = torch.linalg.eigh(damped)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def divergence_curves(eliminations: Mapping[int, Elimination]) -> dict[int, Floats]:
    """Expected KL (width + 1,) of each group when its first 0, 1, ..., all units of the order are gone, rising."""
    return {
        group: np.concatenate([[0.0], np.maximum.accumulate(found.errors) / 2.0])
        for group, found in eliminations.items()
    }
