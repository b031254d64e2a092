"""Exact surgery: a plan and a dense model make a smaller model, by slicing and nothing else."""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import GraphError
from ..utils.arrays import Ints
from ..utils.modes import refresh
from ..utils.torch_internals import computed, copied, twin, unsaved_buffers
from ..utils.wrapped import refuse_adapters
from .heads import fit_attention
from .plan import Plan
from .space import PruningSpace


def axis_indices(space: PruningSpace, kept: tuple[Ints, ...]) -> list[Ints | None]:
    """For each axis the sorted positions that stay, or None when all of them do.

    Positions of an axis with lanes count through all of its lanes (`Axis.slots`).
    """
    alive = np.zeros(int(space.unit_counts.sum()) + 1, dtype=bool)
    alive[-1] = True  # slot -1: never cut
    for offset, units in zip(space.offsets, kept, strict=True):
        alive[offset + units] = True
    indices: list[Ints | None] = []
    for axis in space.axes:
        stays = alive[axis.slots]
        indices.append(None if stays.all() else np.nonzero(stays)[0])
    return indices


def axis_length(space: PruningSpace, axis: int, indices: Sequence[Ints | None]) -> int:
    """Entries that are left of the dimension that an axis rules, in each lane."""
    index, own = indices[axis], space.axes[axis]
    if index is None:
        return own.length
    return (
        len(index) // len(_lanes(space, axis, indices)) if own.lanes > 1 or own.lane_axis >= 0 else len(index)
    )


def _lanes(space: PruningSpace, axis: int, indices: Sequence[Ints | None]) -> Ints:
    """The lanes of an axis that are left."""
    own = space.axes[axis]
    index = indices[own.lane_axis] if own.lane_axis >= 0 else None
    return np.arange(own.lanes) if index is None else index


def attributes(space: PruningSpace, plan: Plan) -> dict[str, dict[str, int]]:
    """Integer attributes of modules that differ from the dense model: {module: {attribute: value}}."""
    changed: dict[str, dict[str, int]] = defaultdict(dict)
    indices = axis_indices(space, plan.kept)
    for rule in space.attribute_rules:
        if indices[rule.axis] is not None:
            changed[rule.module][rule.attribute] = rule.factor * axis_length(space, rule.axis, indices)
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
        GraphError: the plan was traced from a model with other tensors, or PEFT has wrapped the model.
    """
    refuse_adapters(model)
    space = plan.space
    indices = axis_indices(space, plan.kept)
    by_tensor = cuts_by_tensor(space, indices)
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
        if indices[rule.axis] is not None:
            value = rule.factor * axis_length(space, rule.axis, indices)
            rule.assign(modules[rule.module], rule.attribute, value)
    for part in space.drops:
        if _empty(indices[part.axis]):
            part.stub(slim, part.module)
    fit_attention(slim)
    refresh(slim)
    return slim


@dataclass(frozen=True)
class Lanes:
    """What is kept of a dimension that is cut at other places in each entry of the tensor's first dimension.

    ``lanes`` (L,) are the entries that stay, ``inner`` (L, n) the positions that are kept in each of them.
    """

    lanes: Ints
    inner: Ints

    def cut(self, tensor: Tensor, dim: int) -> Tensor:
        """The kept part of a tensor; no copy of its first dimension is made on the way."""
        shape = [len(self.lanes), *tensor.shape[1:]]
        shape[dim] = self.inner.shape[1]
        new = tensor.new_empty(shape)
        for place, (lane, positions) in enumerate(zip(self.lanes.tolist(), self.inner, strict=True)):
            index = torch.from_numpy(positions).to(tensor.device)
            torch.index_select(tensor[lane], dim - 1, index, out=new[place])
        return new


Kept = Ints | Lanes
"""What is kept of a tensor's dimension."""


def cuts_by_tensor(space: PruningSpace, indices: Sequence[Ints | None]) -> dict[str, list[tuple[int, Kept]]]:
    """{tensor: (dimension, what is kept of it)}; a cut by lanes says all that is kept of the first dimension, too."""
    found: dict[str, list[tuple[int, Kept]]] = defaultdict(list)
    for cut in space.cuts:
        index, axis = indices[cut.axis], space.axes[cut.axis]
        if index is None:
            continue
        if axis.lanes == 1 and axis.lane_axis < 0:
            found[cut.tensor].append((cut.dim, index))
            continue
        lanes = _lanes(space, cut.axis, indices)
        inner = index.reshape(len(lanes), -1) % max(1, axis.length)
        found[cut.tensor].append((cut.dim, Lanes(lanes, np.ascontiguousarray(inner))))
    for cuts in found.values():
        if any(isinstance(kept, Lanes) for _, kept in cuts):
            cuts[:] = [(dim, kept) for dim, kept in cuts if isinstance(kept, Lanes) or dim != 0]
    return found


def cut_tensor(tensor: Tensor, cuts: Sequence[tuple[int, Kept]]) -> Tensor:
    """What is kept of a tensor."""
    for dim, kept in cuts:
        if isinstance(kept, Lanes):
            tensor = kept.cut(tensor, dim)
        else:
            index = torch.from_numpy(np.ascontiguousarray(kept)).to(tensor.device)
            tensor = tensor.index_select(dim, index)
    return tensor


class _Slicer:
    """Takes the kept slices of tensors; a tensor cut in two dimensions passes through one reused buffer.

    Fresh memory for every intermediate result would cost more than the copying itself.
    """

    def __init__(self, dtype: torch.dtype | None = None, shared: dict[str, Tensor] | None = None) -> None:
        self._dtype = dtype
        self._shared = shared
        self._indices: dict[tuple[int, torch.device], Tensor] = {}
        self._buffers: dict[tuple[torch.dtype, torch.device, int], Tensor] = {}

    def __call__(self, name: str, tensor: Tensor, cuts: list[tuple[int, Kept]], cast: bool = True) -> Tensor:
        kept = self._kept(name, tensor, cuts, cast)
        return kept.to(self._dtype) if cast and self._casts(kept) else kept

    def _casts(self, tensor: Tensor) -> bool:
        return self._dtype is not None and tensor.is_floating_point()

    def _kept(self, name: str, tensor: Tensor, cuts: list[tuple[int, Kept]], cast: bool) -> Tensor:
        new = tensor.detach()
        if not cuts and self._shared is not None and new.ndim > 1:
            if name not in self._shared:
                self._shared[name] = new.to(self._dtype) if cast and self._casts(new) else new
            return self._shared[name].detach()  # a view: each model has its own gradient flags
        if not cuts:
            return new.clone()
        if not all(_fits(new, dim, kept) for dim, kept in cuts):
            raise GraphError(f"{name!r}: shape {tuple(tensor.shape)} does not fit the traced model")
        if any(isinstance(kept, Lanes) for _, kept in cuts):
            return cut_tensor(new, cuts)
        plain = sorted(
            ((dim, kept) for dim, kept in cuts if not isinstance(kept, Lanes)), key=lambda cut: cut[0]
        )
        # What is cast afterwards passes through a buffer as well: freed between two new tensors it would be a hole.
        casts = cast and self._casts(new) and self._dtype != new.dtype
        for place, (dim, index) in enumerate(plain):
            rows = self._index(index, new.device)
            if place == len(plain) - 1 and not casts:
                return new.index_select(dim, rows)
            shape = (*new.shape[:dim], len(index), *new.shape[dim + 1 :])
            out = self._buffer(new, math.prod(shape), place).view(shape)
            new = torch.index_select(new, dim, rows, out=out)
        return new

    def _index(self, index: Ints, device: torch.device) -> Tensor:
        key = (id(index), device)
        if key not in self._indices:
            self._indices[key] = torch.from_numpy(index).to(device)
        return self._indices[key]

    def _buffer(self, like: Tensor, size: int, place: int) -> Tensor:
        key = (like.dtype, like.device, place)
        if key not in self._buffers or self._buffers[key].numel() < size:
            self._buffers[key] = torch.empty(size, dtype=like.dtype, device=like.device)
        return self._buffers[key][:size]


def _fits(tensor: Tensor, dim: int, kept: Kept) -> bool:
    """Whether a tensor has the entries that are to be kept."""
    if isinstance(kept, Lanes):
        return _fits(tensor, 0, kept.lanes) and _fits(tensor, dim, kept.inner.max(axis=0, initial=-1))
    return dim < tensor.ndim and not (len(kept) and int(kept.max()) >= tensor.shape[dim])


def masked(model: nn.Module, plan: Plan) -> nn.Module:
    """A full-size copy whose consumers' input columns of the cut units are zero: what :func:`prune` must equal.

    Routers of removed experts are masked as well: they never choose them (`MaskRule`).

    It is the definition of an exact cut (DESIGN: contract 2) and the oracle of the tests; slow and
    large on purpose.
    """
    copy = copied(model)
    _mask(copy, plan)
    return copy


@contextlib.contextmanager
def masked_in_place(model: nn.Module, plan: Plan) -> Iterator[None]:
    """The model itself is :func:`masked` for a while; its weights are put back."""
    undo = _mask(model, plan)
    try:
        yield
    finally:
        for step in reversed(undo):
            step()


def _mask(model: nn.Module, plan: Plan) -> list[Callable[[], None]]:
    """Zero the columns; returns the steps of the way back, the last one first to be taken."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    space, indices = plan.space, axis_indices(plan.space, plan.kept)
    undo: list[Callable[[], None]] = []
    for cut in space.cuts:
        index, axis = indices[cut.axis], space.axes[cut.axis]
        if not cut.consumer or index is None:
            continue
        gone = np.setdiff1d(np.arange(len(axis.slots)), index)
        if axis.lanes == 1:
            undo.append(_zero(tensors[cut.tensor], cut.dim, gone))
            continue
        for lane in range(axis.lanes):
            inside = gone[gone // axis.length == lane] % axis.length
            undo.append(_zero(tensors[cut.tensor][lane], cut.dim - 1, inside))
    modules = dict(model.named_modules())
    for rule in space.masks:
        index = indices[rule.axis]
        if index is not None:
            gone = np.setdiff1d(np.arange(len(space.axes[rule.axis].slots)), index)
            undo.append(rule.mask(modules[rule.module], gone))
    return undo


def _zero(tensor: Tensor, dim: int, gone: Ints) -> Callable[[], None]:
    """Zero some entries; returns what puts their values back."""
    places = torch.from_numpy(gone).to(tensor.device)
    values = tensor.detach().index_select(dim, places)
    with torch.no_grad():
        tensor.index_fill_(dim, places, 0.0)

    def back() -> None:
        with torch.no_grad():
            tensor.index_copy_(dim, places, values)

    return back
