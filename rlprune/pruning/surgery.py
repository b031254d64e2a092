"""Exact surgery: a plan and a dense model make a smaller model, by slicing and nothing else."""

from __future__ import annotations

import copy
from collections import defaultdict
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
    on_device: dict[tuple[int, torch.device], Tensor] = {}
    # deepcopy takes an object from the memo instead of copying it: no dense tensor is ever copied.
    memo: dict[int, Any] = {}
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            new = _sliced(name, tensor, by_tensor.pop(name, []), on_device)
            if isinstance(tensor, nn.Parameter):
                new = nn.Parameter(new, requires_grad=tensor.requires_grad)
            memo[id(tensor)] = new
    if by_tensor:
        raise GraphError(f"{next(iter(by_tensor))!r}: the plan cuts a tensor that this model does not have")
    slim = copy.deepcopy(model, memo)
    modules = dict(slim.named_modules())
    for module, values in attributes(space, plan).items():
        for attribute, value in values.items():
            setattr(modules[module], attribute, value)
    return slim


def _sliced(
    name: str, tensor: Tensor, cuts: list[tuple[int, Ints]], on_device: dict[tuple[int, torch.device], Tensor]
) -> Tensor:
    if not cuts:
        return tensor.detach().clone()
    new = tensor.detach()
    for dim, index in sorted(cuts):
        if dim >= new.ndim or index[-1] >= new.shape[dim]:
            raise GraphError(f"{name!r}: shape {tuple(tensor.shape)} does not fit the traced model")
        key = (id(index), tensor.device)
        if key not in on_device:
            on_device[key] = torch.from_numpy(index).to(tensor.device)
        new = new.index_select(dim, on_device[key])
    return new


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
            tensors[cut.tensor].index_fill_(cut.dim, torch.from_numpy(gone).to(tensors[cut.tensor].device), 0.0)
    return twin
