"""The channels of every layer, joined into classes: what a trace finds, before it is laid out as a space."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch_pruning as tp
from torch import Tensor, nn

from ..utils.arrays import Ints
from ..utils.pytrees import Inputs, call
from ..utils.torch_internals import CONVOLUTION
from .layers import ChannelPad

MIXERS = (CONVOLUTION, nn.Linear)
ExampleInputs = Inputs
"""What a model is called with, see `rlprune.utils.pytrees`: a tensor, a list, a tuple of arguments or a dict."""


@dataclass(frozen=True, eq=False)
class TensorDim:
    """A dimension of a parameter or buffer; ``classes[i]`` is the set that its place i belongs to. ``consumer`` marks
    what is summed over."""

    tensor: str
    dim: int
    classes: Ints
    consumer: bool


@dataclass(frozen=True, eq=False)
class Size:
    """An attribute of a module (a path, see `pruning.attributes`) that counts channels of these classes.

    ``known``: it is one of torch's own layers; else it is a guess that the proof may refute, and ``others`` come next.
    """

    module: str
    path: str
    classes: Ints
    known: bool
    others: tuple[Ints, ...] = ()

    def next(self) -> Size | None:
        """The next guess; None where there is no other."""
        if not self.others:
            return None
        return Size(self.module, self.path, self.others[0], False, self.others[1:])


@dataclass(frozen=True, eq=False)
class Side:
    """The channels on one side of a layer: ``classes[i]`` is the number of the set that channel i belongs to.

    ``mixes`` tells layers that make or consume channels from those that they pass through.
    """

    module: nn.Module | None
    name: str
    role: str
    classes: Ints
    mixes: bool
    order: int
    tensors: tuple[TensorDim, ...] = ()


@dataclass(frozen=True, eq=False)
class Term:
    """Multiply-accumulates of one operation: a number times the sizes of dimensions whose channels may be cut.

    ``weight`` is the parameter in it, "" where there is none.
    """

    coefficient: float
    dims: tuple[Ints, ...]
    weight: str = ""


@dataclass(frozen=True, eq=False)
class ChannelGraph:
    """All sides of all traced layers, why some sets of channels may not be cut, and what depends on their number.

    ``crossed`` are the classes that a norm or a softmax runs over, with the reason; ``heads`` those of attention
    heads; ``terms`` the multiply-accumulates of one sample, with class numbers along their dimensions.
    """

    sides: tuple[Side, ...]
    fixed: dict[int, str]
    crossed: dict[int, str]
    heads: frozenset[int]
    count: int
    terms: tuple[Term, ...]
    sizes: tuple[Size, ...]


def is_depthwise(module: object) -> bool:
    """A convolution with filters of its own for each channel: channels pass through it, it does not mix them."""
    return isinstance(module, CONVOLUTION) and module.groups == module.in_channels > 1


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


def passive_pads(model: nn.Module, example_inputs: ExampleInputs) -> dict[type, tp.BasePruningFunc]:
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


def trainable_copy(model: nn.Module) -> nn.Module:
    """A copy in eval mode in which every float parameter records gradients."""
    twin = copy.deepcopy(model).eval()
    for parameter in twin.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
    return twin
