"""What the experts of a mixture read and add, from the tokens that their router sends to them.

An expert with neurons x and output weights W adds ``w (W x + b)`` to a token that is sent to it with the weight w, and
nothing to all others. So what its output projection reads is taken to be ``z = w x``, zero for tokens that are sent
elsewhere: means over all tokens then count an expert by how often and how strongly it is used.

Shapes: T tokens, E experts, F neurons of each, H hidden size, n tokens that are sent to one expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import DataError
from ...pruning.space import PruningSpace
from ...utils.arrays import Floats
from ..expert_groups import EXPERTS
from ..transformers_internals import routed_neurons
from .walk import Focus, run_blocks

Noting = Callable[[int, Tensor, Tensor], None]
"""Is told of an expert's number, of its neurons x (n, F), and of the weights w (n,); in float32 or better."""


def watch_experts(module: nn.Module, note: Noting, count: Callable[[Tensor], None], focus: Focus) -> Any:
    """Tell ``note`` of every expert at each call of a module of experts; returns the hook's handle.

    Args:
        count: is told first of all tokens (T, H) that count.
        focus: which of them do.
    """

    def hook(experts: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        hidden, chosen, weights = (focus.rows(t) for t in inputs[:3])
        count(hidden)
        for expert in range(len(experts.down_proj)):  # type: ignore[arg-type]
            places, tokens = torch.where(chosen.T == expert)
            if len(tokens):
                x = routed_neurons(experts, hidden[tokens], expert)
                x = x if x.dtype == torch.float64 else x.float()
                note(expert, x, weights[tokens, places].to(x.dtype))  # some routers compute in float32 always

    return module.register_forward_pre_hook(hook)


def expert_output(experts: nn.Module, expert: int, x: Tensor) -> Tensor:
    """What an expert makes of its neurons: (n, F) -> (n, H)."""
    owner: Any = experts
    weight = owner.down_proj[expert].to(x.dtype)
    result = x @ (weight if owner.is_transposed else weight.T)
    bias = getattr(owner, "down_proj_bias", None)
    return result if bias is None else result + bias[expert].to(x.dtype)


def contributions(
    model: nn.Module, space: PruningSpace, batches: Iterable[tuple[Tensor, object]]
) -> dict[int, Floats]:
    """What each expert adds, {group of whole experts: (E,)}: the mean over all tokens of w ||W x + b||.

    This is how often an expert is chosen times the mean of the weighted norm of what it then adds. That mean alone is
    the score of REAP (Lasby et al. 2025, arXiv 2510.13999); the sum of the norms without the router's weights that of
    Jaiswal et al. 2025 (arXiv 2504.05586). Derived: the product, so that an expert that few tokens reach goes first.

    Raises:
        DataError: there are no batches.
    """
    groups = {g: group for g, group in enumerate(space.groups) if group.kind == EXPERTS}
    if not groups:
        return {}
    sums = {g: torch.zeros(group.width, dtype=torch.float64) for g, group in groups.items()}
    tokens: dict[int, int] = dict.fromkeys(groups, 0)
    handles: list[Any] = []
    focus = Focus()
    with torch.no_grad():
        for g, group in groups.items():
            # The members of such a group are its router and its experts.
            experts = model.get_submodule(group.members[1].module)
            handles.append(_adding(experts, sums[g], tokens, g, focus))
        try:
            run_blocks(model, batches, focus)
        finally:
            for handle in handles:
                handle.remove()
    if not all(tokens.values()):
        raise DataError("calibration: the split is empty")
    return {g: (total / tokens[g]).numpy() for g, total in sums.items()}


def _adding(experts: nn.Module, total: Tensor, tokens: dict[int, int], group: int, focus: Focus) -> Any:
    def note(expert: int, x: Tensor, w: Tensor) -> None:
        total[expert] += float((w.abs() * expert_output(experts, expert, x).norm(dim=-1)).sum())

    def count(hidden: Tensor) -> None:
        tokens[group] += len(hidden)

    return watch_experts(experts, note, count, focus)
