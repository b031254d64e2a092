"""Example inputs as JSON: what a plan records of them, and zeros of the same kind made from the record.

The record of one float32 tensor is its shape, a list of numbers. Any other nest is described by objects: a tensor is
``{"shape": [...], "dtype": "int64"}``, nests are ``{"tuple": [...]}``, ``{"list": [...]}`` and ``{"dict": {...}}``,
and anything plain is ``{"value": ...}``. Integer tensors of a few numbers (lengths, say) keep them as ``values``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import ArtifactError
from ..utils.pytrees import take

MOST_ELEMENTS = 2**28
"""Numbers in all tensors of a sample that is made from a file: 1 GB in float32."""
_MOST_PARTS = 1000
_MOST_DEPTH = 16
_MOST_VALUES = 64
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    )
}
_WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)

Inputs = Any
"""A nest of tensors; a description of one."""


def describe_inputs(value: Inputs) -> Any:
    """The JSON record of example inputs; None where something in them is neither a tensor, a nest nor plain.

    Of nests one sample is recorded, of a float32 tensor its whole shape (N, ...).
    """
    if isinstance(value, Tensor) and value.dtype == torch.float32 and value.ndim and value.numel():
        return list(value.shape)
    try:
        return _described(take(value, slice(0, 1)))
    except TypeError:
        return None


def inputs_from(record: Inputs, where: str = "plan.json") -> Any:
    """One sample of the recorded inputs: zeros, ones for integers and masks, the values that were kept.

    Raises ArtifactError, which names the file ``where``, for a malformed record or one that would fill the memory.
    """
    check_inputs(record, where)
    return _built(record, _zeros)


def check_inputs(record: Inputs, where: str) -> None:
    """ArtifactError where a record is malformed, or asks for more memory than any sample needs; makes nothing."""
    sizes: list[int] = []

    def count(shape: list[int], dtype: torch.dtype, values: list[int] | None) -> Tensor:
        sizes.append(math.prod(shape))
        if len(sizes) > _MOST_PARTS or sum(sizes) > MOST_ELEMENTS:
            raise ValueError(f"more than {MOST_ELEMENTS:,} numbers in a sample")
        return _zeros(shape, dtype, values) if values is not None else torch.empty(0)

    try:
        _built(record, count)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ArtifactError(
            f"{where}: input: is no size of a sample: {' '.join(str(error).split())}"
        ) from None


def _described(value: Inputs) -> Any:
    if isinstance(value, Tensor):
        name = str(value.dtype).removeprefix("torch.")
        if name not in _DTYPES or not value.numel():
            raise TypeError(name)
        entry: dict[str, Any] = {"shape": list(value.shape), "dtype": name}
        if value.dtype in _WHOLE and value.numel() <= _MOST_VALUES:
            entry["values"] = [int(number) for number in value.flatten().tolist()]
        return entry
    if isinstance(value, Mapping):
        return {"dict": {str(key): _described(item) for key, item in value.items()}}
    if isinstance(value, (tuple, list)):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_described(item) for item in value]}
    if (
        value is None
        or isinstance(value, (bool, int, str))
        or (isinstance(value, float) and math.isfinite(value))
    ):
        return {"value": value}
    raise TypeError(type(value).__name__)


def _built(
    record: Inputs, make: Callable[[list[int], torch.dtype, list[int] | None], Tensor], depth: int = 0
) -> Any:
    """The nest of a record, its tensors made by ``make(shape, dtype, values)``; ValueError where it is malformed."""
    if depth > _MOST_DEPTH:
        raise ValueError("nested too deeply")
    if isinstance(record, list) and record and not depth:
        # A shape, with a batch of any size; one sample is made.
        return make([1, *_sides(record)[1:]], torch.float32, None)
    if not isinstance(record, dict):
        raise ValueError(f"{str(record)[:40]!r} is neither a shape nor a nest")
    match sorted(record):
        case ["value"] if record["value"] is None or isinstance(record["value"], (bool, int, float, str)):
            return record["value"]
        case ["tuple" | "list" as kind] if isinstance(record[kind], list):
            items = [_built(item, make, depth + 1) for item in record[kind]]
            return items if kind == "list" else tuple(items)
        case ["dict"] if isinstance(record["dict"], dict):
            return {key: _built(item, make, depth + 1) for key, item in record["dict"].items()}
        case ["dtype", "shape"] | ["dtype", "shape", "values"] if record["dtype"] in _DTYPES:
            return make(_sides(record["shape"]), _DTYPES[record["dtype"]], record.get("values"))
    raise ValueError(f"{str(record)[:40]!r} is neither a tensor nor a nest")


def _sides(shape: Inputs) -> list[int]:
    whole = isinstance(shape, list) and all(type(side) is int and side >= 1 for side in shape)
    if not whole or len(shape) > 8:
        raise ValueError(f"{str(shape)[:40]!r} is no shape; allowed: a list of whole numbers of 1 and more")
    return list(shape)


def _zeros(shape: list[int], dtype: torch.dtype, values: list[int] | None) -> Tensor:
    if values is not None:
        return torch.tensor(values, dtype=dtype).reshape(shape)
    # Nothing is masked out by ones, and they are indices of whatever has two entries.
    return torch.ones(shape, dtype=dtype) if dtype in _WHOLE else torch.zeros(shape, dtype=dtype)
