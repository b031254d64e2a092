"""Transforms of images of the user's own, such as those of torchvision.transforms.v2, drawn from a seed."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable
from types import FunctionType

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError, DataError, described
from ..utils.named_objects import named_object
from ..utils.randomness import isolated_randomness

Transform = Callable[[Tensor], Tensor]
"""One image, (C, H, W) uint8 on the CPU, to another: uint8 is normalised afterwards, floats are not."""


def named_transform(name: str | None, field: str) -> Transform | None:
    """What ``module:name`` stands for: a transform, or a function without arguments that returns one."""
    if name is None:
        return None
    found = named_object(name, field)
    if inspect.isclass(found) or (isinstance(found, FunctionType) and _takes_nothing(found)):
        try:
            found = found()
        except Exception as error:
            raise ConfigError(f"{field} {name!r}: {described(error)}") from error
    if not callable(found):
        raise ConfigError(
            f"{field} {name!r}: must be a transform of an image, such as torchvision.transforms.v2.Compose, or a "
            f"function that returns one, got {type(found).__name__}"
        )
    transform: Transform = found
    return transform


def _takes_nothing(function: Callable[..., object]) -> bool:
    try:
        inspect.signature(function).bind()
    except TypeError:
        return False
    return True


def transformed(transform: Transform, images: Tensor, seed: int, field: str) -> Tensor:
    """Every image of (N, C, H, W) uint8 by itself through a transform, (N, C, h, w) uint8 or float32, on the CPU.

    What the transform draws from the global generators of torch, numpy and Python comes from ``seed`` and the order
    of the images; the generators are left as they were. ``field`` names the setting.

    Raises DataError: the transform fails, or gives no image of as many channels, or several sizes.
    """
    with isolated_randomness():
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the GPUs as well
        np.random.seed(seed % 2**32)
        random.seed(seed)
        made = [_one(transform, image, field) for image in images.cpu()]
    shapes = {tuple(image.shape) for image in made}
    if len(shapes) > 1:
        several = " and ".join(map(str, sorted(shapes)[:2]))
        raise DataError(
            f"{field}: gives images of several sizes, {several}; end it with a crop or a resize to one"
        )
    return torch.stack(made)


def _one(transform: Transform, image: Tensor, field: str) -> Tensor:
    try:
        made = transform(image.clone())
    except Exception as error:
        raise DataError(
            f"{field}: fails on an image, a uint8 tensor {tuple(image.shape)}: {described(error)} (begin with "
            "v2.ToPILImage() where PIL's images are needed)"
        ) from error
    numbers = isinstance(made, Tensor) and (made.dtype == torch.uint8 or made.is_floating_point())
    if not numbers or made.ndim != 3 or len(made) != len(image):
        got = f"{tuple(made.shape)} of {made.dtype}" if isinstance(made, Tensor) else type(made).__name__
        raise DataError(
            f"{field}: must give a tensor ({len(image)}, height, width) of uint8 or floats for an image of "
            f"{tuple(image.shape)}, got {got}"
        )
    plain = made.as_subclass(Tensor)
    return plain if plain.dtype == torch.uint8 else plain.float()
