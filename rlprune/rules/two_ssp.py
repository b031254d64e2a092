"""2SSP: a few whole attentions and a uniform share of all neurons."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from ..language.calibration.grams import Consumer, unit_consumers
from ..utils.arrays import Bools, Floats
from ..utils.modes import evaluating
from .blocks import of_kind
from .context import Context, rule
from .threshold import mean_share, widths_distribution

ALPHA = 1.5
SEQUENCES = 1
TRIED = 8


@rule(
    "2SSP: drop a few attentions greedily, the rest from all neurons alike",
    needs_workload=True,
    wing="language",
    costly=True,
)
def two_ssp(context: Context) -> Floats:
    """Two-stage structured pruning (Sandri et al. 2025, arXiv 2501.17771, equations 3 and 4).

    Of N attentions round(N * p^((|FFN| / |Attention|) / 1.5)) are dropped, p the share of the prunable cost that
    has to go and |.| parameters; one by one, the one whose removal leaves the least loss on one calibration
    sequence. All feed-forward parts lose the same share of neurons for the rest. Derived: the attentions are
    tried on the dense model, the paper cuts the neurons first; after the first round only the 8 that the last
    loss puts first are tried again. Where parts may not be dropped (``prune.drop``
    off) the attentions are cut to their minimum; where neurons do not save enough, more attentions go.
    """
    space = context.space
    target = space.target(context.budget, context.metric)
    attention, neurons = (of_kind(space, kind) & context.active for kind in ("attention", "ffn"))
    count = attention_count(context, mean_share(context))
    widths = space.widths.copy()
    for dropped, group in enumerate(greedy_order(context, attention)):
        furthest = np.where(neurons, space.minimums, widths)
        wanted = dropped < count and space.cost(widths, context.metric) > target
        if not wanted and space.cost(furthest, context.metric) <= target:
            break
        widths[group] = space.minimums[group]
    dense = space.widths.astype(np.float64)
    low, high = 0.0, 1.0  # share of the neurons that stays
    for _ in range(60):
        middle = (low + high) / 2
        kept = np.where(neurons, np.maximum(middle * dense, space.minimums), widths)
        low, high = (middle, high) if space.cost(kept, context.metric) <= target else (low, middle)
    return widths_distribution(space, np.where(neurons, np.maximum(low * dense, space.minimums), widths))


def attention_count(context: Context, p: float) -> int:
    """How many attentions 2SSP drops at a share ``p``."""
    space = context.space
    attention, neurons = of_kind(space, "attention"), of_kind(space, "ffn")
    if not attention.any():
        return 0
    dense = space.cost(space.widths, "params")
    sizes = [dense - space.cost(np.where(part, 0, space.widths), "params") for part in (neurons, attention)]
    return round(int(attention.sum()) * p ** (sizes[0] / sizes[1] / ALPHA))


def greedy_order(context: Context, allowed: Bools) -> Iterator[int]:
    """The attention groups in the order of their removal; found one at a time and remembered."""
    found: tuple[list[int], dict[int, float]] = context.cached("two_ssp", lambda: ([], {}))
    order, losses = found
    readers = {c.group: c for c in unit_consumers(context.space) if allowed[c.group]}
    for turn in range(len(readers)):
        if turn == len(order):
            left = sorted((g for g in readers if g not in order), key=lambda g: losses.get(g, 0.0))
            for g in left[: TRIED if turn else None]:
                losses[g] = _loss_without(context, [readers[d] for d in [*order, g]])
            order.append(min(left[: TRIED if turn else None], key=losses.__getitem__))
        yield order[turn]


def _loss_without(context: Context, silenced: list[Consumer]) -> float:
    """Calibration loss when the inputs of these layers are zero."""
    workload = context.data("two_ssp")

    def silence(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (torch.zeros_like(inputs[0]), *inputs[1:])

    handles = [context.model.get_submodule(c.module).register_forward_pre_hook(silence) for c in silenced]
    try:
        with torch.no_grad(), evaluating(context.model):
            values = [
                float(workload.loss(context.model(inputs), targets))
                for inputs, targets in workload.batches("calibration", SEQUENCES)
            ]
    finally:
        for handle in handles:
            handle.remove()
    return float(np.nan_to_num(np.mean(values), nan=np.inf))
