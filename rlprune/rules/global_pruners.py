"""Torch-Pruning's global pruners, run by itself and asked for what they would cut."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch_pruning as tp
from torch import Tensor, nn

from ..errors import GraphError, first_line
from ..tracing.graph import MIXERS, ExampleInputs
from ..tracing.layers import ChannelPad
from ..tracing.process import Limits, in_child
from ..utils.arrays import Floats, Ints
from ..utils.pytrees import call, to_device
from ..utils.torch_internals import copied
from .context import Context
from .threshold import widths_distribution

_SECONDS, _MEMORY_GB = 300.0, 16.0
# The global ratio is looked for in steps of this width, and inside of the first step that meets the budget.
_STRIDE, _HALVINGS = 0.05, 8


def peer_shares(context: Context, name: str, importance: str, *, gradients: bool = False) -> Floats:
    """The shares (G,) that Torch-Pruning takes by an importance of its own, some of which read gradients.

    Args:
        name: of the rule, for messages.
        importance: the class in ``torch_pruning.importance``, with its defaults.
    """
    target = context.space.target(context.budget, context.metric)
    limits = Limits(
        f"{name}: pruning {type(context.model).__name__} with Torch-Pruning", _SECONDS, _MEMORY_GB
    )

    def widths() -> Ints:
        chosen = getattr(tp.importance, importance)()
        return _widths(context, target, limits, _Peer(context, limits, chosen, gradients))

    return widths_distribution(context.space, in_child(limits, widths))


def _widths(context: Context, target: float, limits: Limits, peer: _Peer) -> Ints:
    """What Torch-Pruning keeps of each group at the lowest ratio that meets the target, (G,)."""
    space = context.space

    def widths(ratio: float) -> Ints:
        limits.check()
        return space.limits.floor(space.widths * (1.0 - peer.shares(ratio)))

    def meets(found: Ints) -> bool:
        return bool(space.cost(found, context.metric) <= target)

    low, best = 0.0, space.widths
    for high in np.arange(_STRIDE, 1.0, _STRIDE):
        found = widths(float(high))
        if space.cost(found, context.metric) < space.cost(best, context.metric):
            best = found
        if meets(found):
            break
        low = float(high)
    else:  # out of Torch-Pruning's reach: its furthest result, and the projection takes the rest
        return best
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        found = widths(middle)
        low, high, best = (low, middle, found) if meets(found) else (middle, high, best)
    return best


class _Peer:
    """Torch-Pruning's pruner on a copy of the model; asked for what it would prune, it prunes nothing."""

    def __init__(self, context: Context, limits: Limits, importance: object, gradients: bool) -> None:
        space = context.space
        self._group = np.repeat(np.arange(len(space.groups)), space.widths)
        self._known: dict[float, Floats] = {}
        model = _trainable_copy(context.model).cpu()
        self._slots = _slots(context, dict(model.named_modules()))
        counts = [self._group[slots[slots >= 0]] for slots in self._slots.values()]
        self._totals = np.bincount(np.concatenate(counts), minlength=len(space.groups))
        if space.input_shape is not None:
            inputs: Any = torch.zeros(space.input_shape)
        else:
            inputs = to_device(context.data("depgraph").example_inputs, torch.device("cpu"))
        if gradients:
            _backward(context, model)
        ignored = [m for m in model.modules() if isinstance(m, MIXERS) and m not in self._slots]
        with warnings.catch_warnings(), torch.enable_grad():
            warnings.simplefilter(
                "ignore"
            )  # about parameters outside of layers: trace() reports what matters
            try:
                self._pruner = tp.pruner.BasePruner(
                    model,
                    inputs,
                    importance,
                    global_pruning=True,
                    ignored_layers=ignored,
                    in_channel_groups={},  # fresh ones: it changes its defaults, which all pruners share
                    out_channel_groups={},
                    num_heads={},
                    customized_pruners=_passive_pads(model, inputs),
                    forward_fn=call,
                )
                self.shares(_STRIDE)  # what it cannot prune shows at the first step
            except GraphError:
                raise
            except Exception as error:
                raise GraphError(
                    f"{limits.what} failed: it cannot follow the model ({type(error).__name__}: {first_line(error)})"
                ) from error

    def shares(self, ratio: float) -> Floats:
        """The share (G,) that each group loses when the global ratio of channels goes."""
        if ratio not in self._known:
            pruner = self._pruner
            pruner.current_step, pruner.per_step_pruning_ratio = 0, [0.0, ratio]
            cut = np.zeros(len(self._totals))
            for group in pruner.step(interactive=True):
                for module, channels in self._channels(group).items():
                    units = self._slots[module][sorted(channels)]
                    cut += np.bincount(self._group[units[units >= 0]], minlength=len(cut))
            self._known[ratio] = cut / np.maximum(self._totals, 1)
        return self._known[ratio]

    def _channels(self, group: tp.Group) -> dict[Any, set[int]]:
        """Output channels that a group of Torch-Pruning's takes from each layer that we know."""
        found: dict[Any, set[int]] = {}
        for dependency, channels in group:
            module = dependency.target.module
            if module in self._slots and self._pruner.DG.is_out_channel_pruning_fn(dependency.handler):
                found.setdefault(module, set()).update(int(c) for c in channels)
        return found


def _backward(context: Context, model: nn.Module) -> None:
    """Leave the gradients of the calibration split's loss in a copy's parameters."""
    workload, host = context.data("tp_taylor"), torch.device("cpu")
    with torch.enable_grad():
        for inputs, targets in workload.batches("calibration"):
            inputs, targets = to_device(inputs, host), to_device(targets, host)
            loss = workload.loss_of(workload.outputs_for_loss(model, inputs, targets), targets)
            (loss * workload.samples_in(inputs, targets)).backward()


def _slots(context: Context, modules: Mapping[str, nn.Module]) -> dict[Any, Ints]:
    """For each layer that produces channels of our groups: the unit of each of its output channels, or -1."""
    found = {}
    for cut in context.space.cuts:
        name, _, parameter = cut.tensor.rpartition(".")
        if parameter == "weight" and not cut.consumer and isinstance(modules.get(name), MIXERS):
            found[modules[name]] = context.space.axes[cut.axis].slots
    return found


class _Passive(tp.BasePruningFunc):
    """Tells Torch-Pruning that the input and output channels of a ChannelPad are not the same ones."""

    def __init__(self, channels: dict[nn.Module, tuple[int, int]]) -> None:
        super().__init__()
        self._channels = channels

    def prune_out_channels(self, layer: nn.Module, idxs: Sequence[int]) -> nn.Module:
        return layer

    def prune_in_channels(self, layer: nn.Module, idxs: Sequence[int]) -> nn.Module:
        return layer

    def get_out_channels(self, layer: nn.Module) -> int:
        return self._channels[layer][1]

    def get_in_channels(self, layer: nn.Module) -> int:
        return self._channels[layer][0]


def _passive_pads(model: nn.Module, example_inputs: ExampleInputs) -> dict[type, tp.BasePruningFunc]:
    """What to give Torch-Pruning as ``customized_pruners`` for a model whose shortcuts pad channels."""
    seen: dict[nn.Module, tuple[int, int]] = {}

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen[module] = (inputs[0].shape[1], output.shape[1])

    handles = [m.register_forward_hook(note) for m in model.modules() if isinstance(m, ChannelPad)]
    if handles:
        with torch.no_grad():
            call(model, example_inputs)
    for handle in handles:
        handle.remove()
    return {ChannelPad: _Passive(seen)}


def _trainable_copy(model: nn.Module) -> nn.Module:
    """A copy in eval mode in which every float parameter records gradients."""
    twin = copied(model).eval()
    for parameter in twin.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
    return twin
