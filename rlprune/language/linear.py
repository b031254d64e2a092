"""What the two kinds of linear layers of transformers have in common, and attributes that count what is cut.

This file imports nothing of rlprune: it travels with ``families.py`` in every saved folder of a pruned language model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


class UnsupportedModel(ValueError):
    """A model that no adapter knows, or that does not look as its adapter expects; the module is named."""


def is_linear(module: nn.Module) -> bool:
    """Whether a layer is ``nn.Linear`` (a subclass that only renames it too) or transformers' ``Conv1D``."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def is_conv1d(module: nn.Module) -> bool:
    """GPT-2's linear layer, whose weight is stored as (in, out)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def is_dropped(module: object) -> bool:
    """Whether a module stands in the place of something removed (``dropped.py``), whichever copy made it."""
    return getattr(type(module), "is_dropped", False) is True


def features(module: nn.Module) -> tuple[int, int]:
    """(inputs, outputs) of a linear layer, from its weight's shape."""
    rows, columns = tensor_of(module, "weight").shape
    return (int(rows), int(columns)) if is_conv1d(module) else (int(columns), int(rows))


def tensor_of(module: nn.Module, name: str) -> Tensor:
    """A parameter of a layer, whose type torch leaves open between tensors and modules."""
    found: Tensor = getattr(module, name)
    return found


def feature_names(module: nn.Module) -> tuple[str, str]:
    """Names of the attributes that hold a linear layer's (inputs, outputs)."""
    return ("nx", "nf") if is_conv1d(module) else ("in_features", "out_features")


class LayerConfig:
    """A config with a few fields of its own; everything else is read from the config that all layers share."""

    def __init__(self, shared: object, fields: Mapping[str, object]) -> None:
        self.__dict__["_shared"] = shared
        self.__dict__.update(fields)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_shared":
            raise AttributeError(name)
        return getattr(self._shared, name)


def set_attribute(module: nn.Module, attribute: str, value: int | str) -> None:
    """Set an attribute, mostly a count; a tuple keeps its length of 1.

    "config.x" sets the field x in a config of the module's own.
    """
    if attribute.startswith("config."):
        name = attribute.removeprefix("config.")
        owner: Any = module  # whose attribute is neither a tensor nor a module
        shared = owner.config
        if isinstance(shared, LayerConfig):
            shared.__dict__[name] = value
        else:
            owner.config = LayerConfig(shared, {name: value})
    elif isinstance(getattr(module, attribute, None), tuple):
        setattr(module, attribute, (value,))
    else:
        setattr(module, attribute, value)
