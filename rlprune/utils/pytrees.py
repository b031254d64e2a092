"""Nests of tensors: what models take and return, and what data loaders give.

A nest is a tensor, a tuple, a list, a mapping, anything registered as a node of torch's pytrees (the outputs of
transformers are), or a dataclass of nests; anything else is a leaf without a batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DataError
from .torch_internals import tree_leaves, tree_map

Nest = Any
"""A nest of tensors, or anything else as a leaf."""
Inputs = Any
"""What a model is called with: a tensor or a list of tensors (one argument), a tuple of arguments, or a dict of
keyword arguments. The batch is the first dimension of tensors, and the length of a list of tensors."""


def call(model: Callable[..., Any], inputs: Inputs) -> Any:
    """Call a model: a tuple is its arguments, a dict its keyword arguments, anything else its only argument."""
    if isinstance(inputs, dict):
        return model(**inputs)
    if isinstance(inputs, tuple):
        return model(*inputs)
    return model(inputs)


def map_tensors(function: Callable[[Tensor], Any], value: Nest) -> Any:
    """The same nest with ``function`` applied to every tensor in it."""

    def leaf(item: Any) -> Any:
        if isinstance(item, Tensor):
            return function(item)
        if _is_dataclass(item):
            fields = {f.name: getattr(item, f.name) for f in dataclasses.fields(item) if f.init}
            return dataclasses.replace(item, **{k: map_tensors(function, v) for k, v in fields.items()})
        return item

    return tree_map(leaf, value)


def tensors(value: object) -> Iterator[Tensor]:
    """All tensors of a nest, in its order."""
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor):
            yield leaf
        elif _is_dataclass(leaf):
            for field in dataclasses.fields(leaf):
                yield from tensors(getattr(leaf, field.name))


def device_of(value: Nest) -> torch.device:
    """The device of a nest's first tensor."""
    first = next(tensors(value), None)
    return torch.device("cpu") if first is None else first.device


def to_device(value: Nest, device: torch.device) -> Any:
    """The nest with its tensors on a device."""
    return map_tensors(lambda tensor: tensor.to(device, non_blocking=True), value)


def to_double(value: Nest) -> Any:
    """The nest with its floating-point tensors in float64."""
    return map_tensors(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor, value)


def batch_size(value: Nest, what: str = "example_inputs") -> int:
    """Number of samples in a nest: the first dimension of its first tensor, or the length of a list of samples.

    DataError, which names ``what``, where there is neither.
    """
    found = _batch(value)
    if found is None:
        raise DataError(f"{what}: holds no tensor with a batch dimension")
    return found


def sample_count(inputs: Inputs, targets: Nest) -> int:
    """Samples in a batch of data: by the targets, or by the inputs where those have no batch."""
    found = _batch(targets)
    return batch_size(inputs, "a batch") if found is None else found


def _batch(value: object) -> int | None:
    if isinstance(value, Tensor):
        return int(value.shape[0]) if value.ndim else None
    if isinstance(value, list):
        return len(value)
    if isinstance(value, Mapping):
        parts: Any = value.values()
    elif _is_dataclass(value):
        parts = [getattr(value, field.name) for field in dataclasses.fields(value)]  # type: ignore[arg-type]
    else:
        parts = value if isinstance(value, tuple) else ()
    return next((found for part in parts if (found := _batch(part)) is not None), None)


def take(value: Nest, part: slice) -> Any:
    """Some samples of a batch: tensors and lists with one entry a sample are sliced, all else stays."""
    return _take(value, part, _batch(value))


def _take(value: Nest, part: slice, count: int | None) -> Any:
    if isinstance(value, Tensor):
        return value[part] if value.ndim and value.shape[0] == count else value
    if isinstance(value, list) and len(value) == count:
        return value[part]
    return _rebuilt(value, lambda item: _take(item, part, count))


def _rebuilt(value: Nest, change: Callable[[Any], Any]) -> Any:
    """A mapping, tuple or dataclass with its parts changed; anything else as it is."""
    if isinstance(value, Mapping):
        changed = {key: change(item) for key, item in value.items()}
        return changed if type(value) is dict else type(value)(**changed)
    if isinstance(value, tuple):
        items = [change(item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if _is_dataclass(value):
        fields = {f.name: change(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)
    return value


def repeat(value: Nest, size: int) -> Any:
    """The first sample of a batch, ``size`` times, in new tensors; what has no batch stays."""
    return _repeat(value, size, _batch(value))


def _repeat(value: Nest, size: int, count: int | None) -> Any:
    if isinstance(value, Tensor):
        if not value.ndim or value.shape[0] != count:
            return value
        return value[:1].expand(size, *value.shape[1:]).contiguous()
    if isinstance(value, list) and len(value) == count:
        return value[:1] * size
    return _rebuilt(value, lambda item: _repeat(item, size, count))


def shapes(value: Nest) -> Any:
    """The nest with the shape of every tensor in its place, for messages."""
    return map_tensors(lambda tensor: tuple(tensor.shape), value)


def _is_dataclass(value: object) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, (type, nn.Module))
