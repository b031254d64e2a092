"""The channels of every layer, joined into classes: what a trace finds, before it is laid out as a space."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ..utils.arrays import Ints
from ..utils.pytrees import Inputs
from ..utils.torch_internals import CONVOLUTION

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

    ``known``: it is known to; else it is a guess, and ``choices`` are all the classes that it may count. ``read``: the
    forward pass is known to read it.
    """

    module: str
    path: str
    classes: Ints
    known: bool
    choices: tuple[Ints, ...] = ()
    read: bool = False


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
class Product:
    """Multiply-accumulates of one operation of a layer: a number times the sizes of dimensions with channels."""

    layer: str
    coefficient: float
    dims: tuple[Ints, ...]


@dataclass(frozen=True, eq=False)
class ChannelGraph:
    """All sides of all traced layers, why some sets of channels may not be cut, and what depends on their number.

    ``crossed`` are the classes that a norm or a softmax runs over, with the reason; ``heads`` those of attention
    heads; ``products`` the multiply-accumulates of one sample, with class numbers along their dimensions.
    """

    sides: tuple[Side, ...]
    fixed: dict[int, str]
    crossed: dict[int, str]
    heads: frozenset[int]
    count: int
    products: tuple[Product, ...]
    sizes: tuple[Size, ...]


def is_depthwise(module: object) -> bool:
    """A convolution with filters of its own for each channel: channels pass through it, it does not mix them."""
    return isinstance(module, CONVOLUTION) and module.groups == module.in_channels > 1
