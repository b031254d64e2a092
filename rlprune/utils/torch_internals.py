"""What rlprune takes from the inside of torch's modules.

``dropped.py`` reaches into them by itself, because a copy of that file has to run where rlprune is missing.

Relied on in torch 2.14:

- ``_ConvNd``, ``_BatchNorm`` and ``_NormBase`` of ``torch.nn.modules``: what convolutions and
  norms of all dimensions are.
- ``nn.Module._parameters``, ``._buffers``, ``._modules``: what a module holds itself, by name;
  ``._non_persistent_buffers_set``: the names of the buffers that are not saved.
- ``torch.utils._python_dispatch.TorchDispatchMode``: sees every operation that a forward pass comes down to.
- ``torch.utils._pytree``: ``tree_map`` and ``tree_leaves``, which know the outputs of transformers too.

``tests/test_internals.py`` fails where one of them is gone.
"""

from __future__ import annotations

import copy
from collections import OrderedDict

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

__all__ = [
    "BATCH_NORM",
    "BATCH_OR_INSTANCE_NORM",
    "CONVOLUTION",
    "TorchDispatchMode",
    "buffer_slots",
    "computed",
    "copied",
    "parameter_slots",
    "tree_leaves",
    "tree_map",
    "twin",
    "unsaved_buffers",
]

CONVOLUTION = nn.modules.conv._ConvNd
BATCH_NORM = nn.modules.batchnorm._BatchNorm
BATCH_OR_INSTANCE_NORM = nn.modules.batchnorm._NormBase

_OWN_COPY = ("__deepcopy__", "__reduce__", "__reduce_ex__", "__getstate__")
_PLAIN = (int, float, str, bool, bytes, complex, type(None), type)


def parameter_slots(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """The parameters that a module holds itself, in its order; what is written into it takes their place."""
    return module._parameters


def buffer_slots(module: nn.Module) -> dict[str, Tensor | None]:
    """The buffers that a module holds itself; what is written into it takes their place."""
    return module._buffers


def unsaved_buffers(model: nn.Module) -> set[str]:
    """Names of all buffers of a model that its state dict leaves out."""
    return {f"{n}.{b}".lstrip(".") for n, m in model.named_modules() for b in m._non_persistent_buffers_set}


def copied(model: nn.Module) -> nn.Module:
    """A copy of all of a model, with what it has computed and kept: ``copy.deepcopy`` refuses such tensors."""
    found = copy.deepcopy(model, computed(model))
    assert isinstance(found, nn.Module)
    return found


def computed(model: nn.Module) -> dict[int, object]:
    """A memo for copies: for every tensor that modules keep in plain attributes and that is no leaf, a copy of it."""
    memo: dict[int, object] = {}

    def look(value: object) -> None:
        if isinstance(value, Tensor):
            if value.requires_grad and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
        elif isinstance(value, dict):
            for item in value.values():
                look(item)
        elif isinstance(value, (list, tuple)):
            for item in value:
                look(item)

    for module in model.modules():
        for name, value in vars(module).items():
            if not name.startswith("_"):
                look(value)
    return memo


def twin(module: nn.Module, memo: dict[int, object]) -> nn.Module:
    """``copy.deepcopy(module, memo)``, several times faster for modules that do not define their own copy.

    deepcopy goes through pickle's protocol for every module; most of what it finds there are numbers
    and empty hook tables.
    """
    if id(module) in memo:
        found = memo[id(module)]
        assert isinstance(found, nn.Module)
        return found
    cls = type(module)
    if any(name in vars(base) for base in cls.__mro__[:-2] for name in _OWN_COPY):
        return copy.deepcopy(module, memo)
    new = cls.__new__(cls)
    memo[id(module)] = new
    state = new.__dict__
    for name, value in module.__dict__.items():
        if name == "_modules":
            state[name] = {k: None if m is None else twin(m, memo) for k, m in value.items()}
        elif name in ("_parameters", "_buffers"):
            state[name] = {k: None if t is None else memo[id(t)] for k, t in value.items()}
        elif isinstance(value, _PLAIN):
            state[name] = value
        elif type(value) in (dict, OrderedDict, set, list) and not value:
            state[name] = type(value)()
        elif type(value) is tuple and all(isinstance(v, _PLAIN) for v in value):
            state[name] = value
        else:
            state[name] = copy.deepcopy(value, memo)
    return new
