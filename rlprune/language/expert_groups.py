"""The groups of a block's experts: whole experts, and the neurons inside of each; how a router never chooses some.

Two groups a block. A unit of the first is a whole expert: its slices of the fused tensors and its row of the router
go. A unit of the second is a neuron of one expert. The fused tensors have one inner width, so its lanes are the
experts (`pruning.space.Group`): each keeps as many neurons, its own best ones.

Cut is what a router that never chooses the removed experts would give. Their scores are minus infinity there, so a
softmax and the ``top_k`` highest see the others only.

Shapes: E experts, F neurons of each, H hidden size, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..pruning.cost import AxisSize, FormulaBuilder, Term
from ..pruning.space import AttributeRule, Axis, Cut, DropRule, Group, MaskRule, Member
from ..utils.arrays import Ints
from .experts import (
    Experts,
    ExpertTensor,
    Mixture,
    drop_experts,
    expert_attributes,
    expert_neuron_attributes,
    set_expert_neurons,
)
from .families import Block
from .linear import is_linear, set_attribute

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

EXPERTS = "experts"
"""The kind of a group of whole experts; their neurons are of the kind "ffn"."""


class Layout(Protocol):
    """What the groups are written into: a space in the making."""

    drop: bool
    length: int
    modules: dict[str, nn.Module]
    protected: dict[str, str]
    axes: list[Axis]
    cuts: list[Cut]
    rules: list[AttributeRule]
    drops: list[DropRule]
    masks: list[MaskRule]
    terms: list[Term]

    def add_group(self, group: Group) -> int:
        """Append a group and return the number of its first unit."""
        ...

    def depth_of(self, block: int, second: int) -> float: ...


def add_experts(layout: Layout, block: Block, ignored: dict[str, str]) -> None:
    """Write down the groups of a block's experts, and what protects them."""
    experts = block.experts
    if experts is None:
        return
    whole = _add_whole(layout, block, experts, ignored)
    _add_neurons(layout, block, experts, ignored, whole)


def _add_whole(layout: Layout, block: Block, experts: Experts, ignored: dict[str, str]) -> int:
    """The group of whole experts; the number of its axis, -1 where all of them stay."""
    reason = ignored.get(experts.router, "")
    if experts.count <= experts.top_k:
        reason = reason or f"its router sends every token to all {experts.count} experts"
    if reason:
        layout.protected[experts.router] = reason
        return -1
    members = (Member(experts.router, "out", 1), Member(experts.module, "out", 1))
    start = layout.add_group(
        Group(
            experts.router, EXPERTS, experts.count, 1, experts.top_k, 1, members,
            layout.depth_of(block.index, 1), 1, 1, block.index, fewest=experts.top_k,
        )
    )  # fmt: skip
    axis = _axis(layout, Axis(np.arange(start, start + experts.count)))
    for tensor in (*experts.routing, *experts.tensors):
        layout.cuts.append(Cut(tensor.name, 0, axis, False))
    places = expert_attributes(layout.modules, experts)
    if is_linear(layout.modules[experts.router]):
        places.append((experts.router, "out_features"))
    layout.rules += [AttributeRule(path, name, axis, 1, set_attribute) for path, name in places]
    layout.masks.append(MaskRule(experts.router, axis, partial(never_choose, count=experts.count)))
    return axis


def _add_neurons(layout: Layout, block: Block, experts: Experts, ignored: dict[str, str], whole: int) -> None:
    """The group of the neurons of all experts."""
    reason = ignored.get(experts.module, "" if experts.neurons else "already dropped")
    if experts.neurons == 1 and not layout.drop:
        reason = reason or "a single unit, nothing to choose from"
    if reason:
        layout.protected[experts.module] = reason
        return
    count, neurons = experts.count, experts.neurons
    owner = experts.router if whole >= 0 else ""
    members = (Member(experts.module, "out", 1), Member(experts.module, "in", 1))
    start = layout.add_group(
        Group(
            experts.module, "ffn", neurons, 1, 0 if layout.drop else 1, 1, members,
            layout.depth_of(block.index, 1), 1, 1, block.index, lanes=count, lane_group=owner,
        )
    )  # fmt: skip
    units = start + np.arange(count * neurons).reshape(count, neurons)
    single = _axis(layout, Axis(units.reshape(-1), count, whole))
    for tensor in experts.tensors:
        if tensor.dim:
            slots = _halves(units, tensor).reshape(-1)
            axis = single if tensor.halves == 1 else _axis(layout, Axis(slots, count, whole))
            layout.cuts.append(Cut(tensor.name, tensor.dim, axis, tensor.consumer))
    for path, name in expert_neuron_attributes(layout.modules, experts):
        layout.rules.append(AttributeRule(path, name, single, 1, set_expert_neurons))
    layout.drops.append(DropRule(experts.module, single, drop_experts))


def _halves(units: Ints, tensor: ExpertTensor) -> Ints:
    """The unit of each entry of a tensor's dimension, expert by expert: (E, F) -> (E, halves * F)."""
    if tensor.paired:
        return np.repeat(units, tensor.halves, axis=1)
    return np.tile(units, (1, tensor.halves))


def _axis(layout: Layout, axis: Axis) -> int:
    layout.axes.append(axis)
    return len(layout.axes) - 1


def add_products(
    layout: Layout,
    experts: Experts,
    builder: FormulaBuilder,
    sizes: Sequence[AxisSize],
) -> None:
    """Add the matrix products of router and experts to the ``macs``: each token passes ``top_k`` experts."""
    cut = {(c.tensor, c.dim): c.axis for c in layout.cuts}
    for tensor in (*experts.routing, *experts.tensors):
        owner, _, name = tensor.name.rpartition(".")
        shape = getattr(layout.modules[owner], name).shape
        routing = tensor in experts.routing
        if len(shape) != (2 if routing else 3) or is_linear(layout.modules[owner]):
            continue  # a bias; a router that is a linear layer is counted as one
        dim = 0 if routing else tensor.dim
        axes = [cut[tensor.name, dim]] if (tensor.name, dim) in cut else []
        rest = layout.length * (1 if routing else experts.top_k) * shape[1:].numel()
        rest = rest // shape[dim] if dim else rest
        times = rest if axes else rest * shape[dim]
        builder.add(float(times), *(sizes[axis] for axis in axes))
        layout.terms.append(Term(owner, "macs", float(times), tuple(axes)))


def few_experts(config: PreTrainedConfig, mixture: Mixture) -> None:
    """Make the mixtures of a config small: two experts more than a token is sent to, of few neurons."""
    chosen = min(int(config.num_experts_per_tok), 3)
    count, *widths = mixture.sizes
    config.num_experts_per_tok = chosen
    setattr(config, count, min(int(getattr(config, count)), chosen + 2))
    for name in widths:
        if name:
            setattr(config, name, 48)


def never_choose(router: nn.Module, gone: Ints, *, count: int) -> Callable[[], None]:
    """Make a router never choose some of its ``count`` experts; returns the way back.

    The scores that its weights give them become minus infinity, and so do their entries of a bias.
    """
    before: Any = vars(router).get("forward")
    forward = router.forward
    undo = [_fill(t, gone) for t in (*router.parameters(), *router.buffers()) if t.shape == (count,)]

    def masked(*args: object, **kwargs: object) -> object:
        with _Never(gone, count):
            return forward(*args, **kwargs)

    router.forward = masked  # type: ignore[method-assign]

    def back() -> None:
        for step in undo:
            step()
        if before is None:
            del router.forward
        else:
            router.forward = before

    return back


def _fill(tensor: Tensor, gone: Ints) -> Callable[[], None]:
    places = torch.from_numpy(gone).to(tensor.device)
    with torch.no_grad():
        values = tensor.index_select(0, places)
        tensor.index_fill_(0, places, -torch.inf)

    def back() -> None:
        with torch.no_grad():
            tensor.index_copy_(0, places, values)

    return back


class _Never(TorchFunctionMode):
    """Within it a product of weights that gives ``count`` scores gives minus infinity for some of them."""

    def __init__(self, gone: Ints, count: int) -> None:
        super().__init__()
        self._gone, self._count = gone, count

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: Sequence[object] = (),
        kwargs: dict[str, object] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        products = (torch.nn.functional.linear, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__)
        if func in products and result.shape[-1] == self._count:
            return result.index_fill(-1, torch.from_numpy(self._gone).to(result.device), -torch.inf)
        return result
