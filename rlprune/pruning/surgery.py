"""Exact surgery: a plan and a dense model make a smaller model, by slicing and nothing else."""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import GraphError
from ..utils.arrays import Ints
from ..utils.modes import refresh
from ..utils.torch_internals import computed, copied, twin, unsaved_buffers
from .heads import fit_attention
from .plan import Plan
from .space import PruningSpace


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


def dropped(space: PruningSpace, plan: Plan) -> list[str]:
    """Names of the parts of which nothing is left."""
    indices = axis_indices(space, plan.kept)
    return [rule.module for rule in space.drops if _empty(indices[rule.axis])]


def _empty(index: Ints | None) -> bool:
    return index is not None and len(index) == 0


def prune(
    model: nn.Module,
    plan: Plan,
    *,
    dtype: torch.dtype | None = None,
    shared: dict[str, Tensor] | None = None,
) -> nn.Module:
    """A new model with the kept units of ``plan`` only; the dense model is neither changed nor copied whole.

    Only the kept slices of each tensor are copied; everything else of a module (its class, settings,
    hooks) is copied as it stands. Tied weights stay tied.

    Args:
        dtype: number format of the new model's floating-point parameters and saved buffers; None keeps theirs.
        shared: a cache {name: tensor} of matrices that the plan does not cut; they are taken from it, and put
            there the first time, instead of being copied for every model. The tensors are those of ``model``
            itself where no cast is needed: models built with it are for scoring, not for training.

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
    sliced = _Slicer(dtype, shared)
    unsaved = unsaved_buffers(model)
    # A copy takes what the memo holds instead of copying it: no dense tensor is ever copied.
    memo: dict[int, object] = computed(model)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            new = sliced(name, tensor, by_tensor.pop(name, []), cast=name not in unsaved)
            if isinstance(tensor, nn.Parameter):
                new = nn.Parameter(new, requires_grad=tensor.requires_grad)
            memo[id(tensor)] = new
    if by_tensor:
        raise GraphError(f"{next(iter(by_tensor))!r}: the plan cuts a tensor that this model does not have")
    slim = twin(model, memo)
    modules = dict(slim.named_modules())
    for rule in space.attribute_rules:
        index = indices[rule.axis]
        if index is not None:
            rule.assign(modules[rule.module], rule.attribute, rule.factor * len(index))
    for part in space.drops:
        if _empty(indices[part.axis]):
            part.stub(slim, part.module)
    fit_attention(slim)
    refresh(slim)
    return slim


class _Slicer:
    """Takes the kept slices of tensors; a tensor cut in two dimensions passes through one reused buffer.

    Fresh memory for every intermediate result would cost more than the copying itself.
    """

    def __init__(self, dtype: torch.dtype | None = None, shared: dict[str, Tensor] | None = None) -> None:
        self._dtype = dtype
        self._shared = shared
        self._indices: dict[tuple[int, torch.device], Tensor] = {}
        self._buffers: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def __call__(self, name: str, tensor: Tensor, cuts: list[tuple[int, Ints]], cast: bool = True) -> Tensor:
        kept = self._kept(name, tensor, cuts, cast)
        return kept.to(self._dtype) if cast and self._casts(kept) else kept

    def _casts(self, tensor: Tensor) -> bool:
        return self._dtype is not None and tensor.is_floating_point()

    def _kept(self, name: str, tensor: Tensor, cuts: list[tuple[int, Ints]], cast: bool) -> Tensor:
        new = tensor.detach()
        if not cuts and self._shared is not None and new.ndim > 1:
            if name not in self._shared:
                self._shared[name] = new.to(self._dtype) if cast and self._casts(new) else new
            return self._shared[name].detach()  # a view: each model has its own gradient flags
        if not cuts:
            return new.clone()
        for dim, index in cuts:
            if dim >= new.ndim or (len(index) and index[-1] >= new.shape[dim]):
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
    copy = copied(model)
    _mask(copy, plan)
    return copy


@contextlib.contextmanager
def masked_in_place(model: nn.Module, plan: Plan) -> Iterator[None]:
    """The model itself is :func:`masked` for a while; its weights are put back."""
    before = _mask(model, plan)
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, dim, gone, values in reversed(before):
                tensor.index_copy_(dim, gone, values)


def _mask(model: nn.Module, plan: Plan) -> list[tuple[Tensor, int, Tensor, Tensor]]:
    """Zero the columns; returns (tensor, dimension, indices, values) of what stood there."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    indices = axis_indices(plan.space, plan.kept)
    before: list[tuple[Tensor, int, Tensor, Tensor]] = []
    with torch.no_grad():
        for cut in plan.space.cuts:
            index = indices[cut.axis]
            if not cut.consumer or index is None:
                continue
            tensor = tensors[cut.tensor]
            gone = np.setdiff1d(np.arange(len(plan.space.axes[cut.axis].slots)), index)
            places = torch.from_numpy(gone).to(tensor.device)
            before.append((tensor, cut.dim, places, tensor.index_select(cut.dim, places)))
            tensor.index_fill_(cut.dim, places, 0.0)
    return before
