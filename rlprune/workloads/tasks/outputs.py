"""The tensor that a task reads among what a model returns."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ...errors import DataError, near_miss
from ...utils.pytrees import shapes

Choice = str | int
"""Which part of a model's outputs a task reads: a name, or a number in a tuple or list."""
KNOWN = ("logits", "out", "prediction_logits", "predictions", "last_hidden_state")
"""Names under which models return what they are for, in the order in which they are looked for: transformers',
torchvision's segmentation models'."""


def find_output(outputs: object, choice: Choice | None = None) -> Tensor:
    """The tensor that a task reads: ``outputs`` itself, its only tensor, one under a known name, or ``choice``.

    DataError which names the choices and the setting where that is not clear.
    """
    if isinstance(outputs, Tensor):
        return outputs
    parts = named_parts(outputs)
    if choice is not None:
        key = str(choice)
        if not isinstance(parts.get(key), Tensor):
            raise DataError(
                f"output={choice!r}: the model returns no such tensor{near_miss(key, parts)}; {_there(parts)}"
            )
        return parts[key]
    tensors = {name: part for name, part in parts.items() if isinstance(part, Tensor) and part.ndim}
    if len(tensors) == 1:
        return next(iter(tensors.values()))
    for name in KNOWN:
        if name in tensors:
            return tensors[name]
    if _are_detections(outputs):
        raise DataError("the model returns boxes for each image (a list of dicts): state task: detection")
    raise DataError(
        f"the model returns a {type(outputs).__name__} of which no tensor is known to be the answer; "
        f"choose one by output=...; {_there(parts)}"
    )


def named_parts(outputs: object) -> dict[str, Any]:
    """{name or number: part} of one level of a model's outputs."""
    if isinstance(outputs, Mapping):
        return {str(name): part for name, part in outputs.items()}
    if dataclasses.is_dataclass(outputs) and not isinstance(outputs, type):
        return {field.name: getattr(outputs, field.name) for field in dataclasses.fields(outputs)}
    if isinstance(outputs, tuple) and hasattr(outputs, "_fields"):
        return dict(zip(outputs._fields, outputs, strict=True))
    if isinstance(outputs, (tuple, list)):
        return {str(number): part for number, part in enumerate(outputs)}
    return {}


def _there(parts: Mapping[str, object]) -> str:
    found = [f"{name}: {shapes(part)}" for name, part in parts.items() if isinstance(part, Tensor)]
    return f"there are {', '.join(found)}" if found else "it holds no tensor at its first level"


def _are_detections(outputs: object) -> bool:
    first = outputs[0] if isinstance(outputs, list) and outputs else None
    return isinstance(first, Mapping) and "boxes" in first
