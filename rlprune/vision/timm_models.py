"""timm's models by name."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..errors import ConfigError, near_miss

_USUAL_SIDE = 224


def installed() -> str:
    """Whether timm is there, in words."""
    found = importlib.util.find_spec("timm") is not None
    return "installed" if found else "not installed: pip install 'rlprune[timm]'"


def check_name(asked: str, name: str) -> str:
    """The name again; ConfigError, with the near miss, where timm is missing or has no such model."""
    try:
        import timm
    except ImportError as error:
        raise ConfigError(
            f"model.name {asked!r}: timm is not installed; pip install 'rlprune[timm]'"
        ) from error
    if not timm.is_model(name):
        raise ConfigError(
            f"model.name {asked!r}: timm has no such model{near_miss(name, timm.list_models())}"
        )
    return name


def build(name: str, **arguments: Any) -> nn.Module:
    """The model with random weights, nothing downloaded."""
    import timm

    return timm.create_model(name, pretrained=False, **arguments)


def side(name: str, arguments: Mapping[str, object]) -> int:
    """The side of the images that the model is made for, in pixels."""
    import timm

    given = arguments.get("img_size")
    config = timm.get_pretrained_cfg(name, allow_unregistered=True)
    size = config.input_size[-1] if config is not None else _USUAL_SIDE
    return given if isinstance(given, int) else int(size)
