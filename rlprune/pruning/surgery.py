"""Exact surgery: a plan and a dense model make a smaller model, by slicing and nothing else."""

from __future__ import annotations

import copy
import math
from collections import OrderedDict, defaultdict
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import GraphError
from .plan import Plan
from .space import Ints, PruningSpace


def axis_indices(space: PruningSpace, kept: tuple[Ints, ...]) -> list[Ints | None]:
    """For each axis the sorted positions that stay, or None when all of them do."""
    alive = np.zeros(int(space.widths.sum()) + 1, dtype=bool)
    alive[-1] = True  # slot -1: never cut
    for offset, units in zip(space.offsets, kept, strict=True):
        alive[offset + units] = True
    indices: list[Ints | None] = []
    for axis in space.axes:
        stays = alive[axis.slots]
        indices.append(None if stays.all() else np.nonzero(stays)[0])
    return indices


def attributes(space: PruningSpace, plan: Plan) -> dict[str, dict[str, int]]:
    """Integer attributes of modules that differ from the dense model: {module: {attribute: value}}."""
    changed: dict[str, dict[str, int]] = defaultdict(dict)
    indices = axis_indices(space, plan.kept)
    for rule in space.attribute_rules:
        index = indices[rule.axis]
        if index is not None:
            changed[rule.module][rule.attribute] = rule.factor * len(index)
    return dict(changed)


def prune(model: nn.Module, plan: Plan) -> nn.Module:
    """A new model with the kept units of ``plan`` only; the dense model is neither changed nor copied whole.

    Only the kept slices of each tensor are copied; everything else of a module (its class, settings,
    hooks) is copied as it stands.

    Raises:
        GraphError: the plan was traced from a model with other tensors.
    """
    space = plan.space
    indices = axis_indices(space, plan.kept)
    by_tensor: dict[str, list[tuple[int, Ints]]] = defaultdict(list)
    for cut in space.cuts:
        index = indices[cut.axis]
        if index is not None:
            by_tensor[cut.tensor].append((cut.dim, index))
    sliced = _Slicer()
    # A copy takes what the memo holds instead of copying it: no dense tensor is ever copied.
    memo: dict[int, Any] = {}
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            new = sliced(name, tensor, by_tensor.pop(name, []))
            if isinstance(tensor, nn.Parameter):
                new = nn.Parameter(new, requires_grad=tensor.requires_grad)
            memo[id(tensor)] = new
    if by_tensor:
        raise GraphError(f"{next(iter(by_tensor))!r}: the plan cuts a tensor that this model does not have")
    slim = _twin(model, memo)
    modules = dict(slim.named_modules())
    for module, values in attributes(space, plan).items():
        for attribute, value in values.items():
            setattr(modules[module], attribute, value)
    return slim


_OWN_COPY = ("__deepcopy__", "__reduce__", "__reduce_ex__", "__getstate__")
_PLAIN = (int, float, str, bool, bytes, complex, type(None), type)


def _twin(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """``copy.deepcopy(module, memo)``, several times faster for modules that do not define their own copy.

    deepcopy goes through pickle's protocol for every module; most of what it finds there are numbers
    and empty hook tables.
    """
    if id(module) in memo:
        found: nn.Module = memo[id(module)]
        return found
    cls = type(module)
    if any(name in vars(base) for base in cls.__mro__[:-2] for name in _OWN_COPY):
        return copy.deepcopy(module, memo)
    twin = cls.__new__(cls)
    memo[id(module)] = twin
    state = twin.__dict__
    for name, value in module.__dict__.items():
        if name == "_modules":
            state[name] = {k: None if m is None else _twin(m, memo) for k, m in value.items()}
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
    return twin


class _Slicer:
    """Takes the kept slices of tensors; a tensor cut in two dimensions passes through one reused buffer.

    Fresh memory for every intermediate result would cost more than the copying itself.
    """

    def __init__(self) -> None:
        self._indices: dict[tuple[int, torch.device], Tensor] = {}
        self._buffers: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def __call__(self, name: str, tensor: Tensor, cuts: list[tuple[int, Ints]]) -> Tensor:
        new = tensor.detach()
        if not cuts:
            return new.clone()
        for dim, index in cuts:
            if dim >= new.ndim or index[-1] >= new.shape[dim]:
                raise GraphError(f"{name!r}: shape {tuple(tensor.shape)} does not fit the traced model")
        *before, (dim, index) = sorted(cuts, key=lambda cut: cut[0])
        for earlier, rows in before:
            shape = (*new.shape[:earlier], len(rows), *new.shape[earlier + 1 :])
            out = self._buffer(new, math.prod(shape)).view(shape)
            new = torch.index_select(new, earlier, self._index(rows, new.device), out=out)
        return new.index_select(dim, self._index(index, new.device))

    def _index(self, index: Ints, device: torch.device) -> Tensor:
        key = (id(index), device)
        if key not in self._indices:
            self._indices[key] = torch.from_numpy(index).to(device)
        return self._indices[key]

    def _buffer(self, like: Tensor, size: int) -> Tensor:
        key = (like.dtype, like.device)
        if key not in self._buffers or self._buffers[key].numel() < size:
            self._buffers[key] = torch.empty(size, dtype=like.dtype, device=like.device)
        return self._buffers[key][:size]


def masked(model: nn.Module, plan: Plan) -> nn.Module:
    """A full-size copy whose consumers' input columns of the cut units are zero: what :func:`prune` must equal.

    It is the definition of an exact cut (DESIGN: contract 2) and the oracle of the tests; slow and
    large on purpose.
    """
    twin = copy.deepcopy(model)
    tensors = dict(twin.named_parameters())
    indices = axis_indices(plan.space, plan.kept)
    with torch.no_grad():
        for cut in plan.space.cuts:
            index = indices[cut.axis]
            if not cut.consumer or index is None:
                continue
            gone = np.setdiff1d(np.arange(len(plan.space.axes[cut.axis].slots)), index)
            tensors[cut.tensor].index_fill_(
                cut.dim, torch.from_numpy(gone).to(tensors[cut.tensor].device), 0.0
            )
    return twin
