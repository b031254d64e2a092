"""Which named architecture a module is: so that a saved model can be rebuilt without its code being named."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ..errors import ArtifactError
from ..pruning.attributes import size_path
from ..pruning.space import fingerprint
from . import hf_models, torchvision_models
from .googlenet_cifar import CifarGoogLeNet
from .rebuild import rebuild
from .resnet_cifar import CIFAR_DEPTHS, CifarResNet


def identify(
    model: nn.Module,
    dense_fingerprint: str,
    dense_params: float,
    changed: Mapping[str, Mapping[str, int]] | None = None,
) -> dict[str, Any] | None:
    """How to rebuild the dense architecture of a (pruned) model, or None when it is no named one.

    A few candidates, those nearest to ``dense_params`` parameters, are built and compared: the
    fingerprint (names, shapes, layer types) has to be ``dense_fingerprint``, and every simple setting
    of every layer (strides, dropout rates) that of ``model``, except for the integers in ``changed``
    ({module: {attribute: value}}).
    """
    for base in _candidates(model, dense_params):
        try:
            twin = _skeleton(base)
        except ArtifactError:
            continue
        if fingerprint(twin) == dense_fingerprint and _same_settings(model, twin, changed or {}):
            return base
    return None


def _candidates(model: nn.Module, dense_params: float) -> Iterator[dict[str, Any]]:
    home = type(model).__module__
    classes, channels = _ends(model)
    arguments: dict[str, Any]
    if isinstance(model, CifarResNet):
        arguments = {"width": model.width, "classes": classes, "channels": channels}
        yield from (
            {"source": "zoo", "name": f"cifar_resnet{d}", "arguments": arguments} for d in CIFAR_DEPTHS
        )
    elif isinstance(model, CifarGoogLeNet):
        arguments = {"width": model.width, "classes": classes, "channels": channels}
        yield {"source": "zoo", "name": "cifar_googlenet", "arguments": arguments}
    elif home.startswith("torchvision.models."):
        yield from torchvision_models.candidates(model, dense_params, classes, channels)
    elif home.startswith("transformers."):
        found = hf_models.candidate(model, channels)
        if found is not None:
            yield found
    elif home.startswith("timm."):
        settings = getattr(model, "pretrained_cfg", None) or {}
        known = settings.get("architecture")
        if isinstance(known, str):
            arguments = {"num_classes": classes, "in_chans": channels}
            yield {"source": "timm", "name": known, "arguments": arguments}
            size = getattr(getattr(model, "patch_embed", None), "img_size", None)
            if isinstance(
                size, tuple
            ):  # a transformer that may be built for images of another size than usual
                yield {"source": "timm", "name": known, "arguments": arguments | {"img_size": list(size)}}


def _ends(model: nn.Module) -> tuple[int, int]:
    """Outputs of the last layer and inputs of the first: neither is ever cut."""
    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Conv3d, nn.Linear))]
    if not layers:
        return 0, 0
    first, last = layers[0].weight, layers[-1].weight
    return int(last.shape[0]), int(first.shape[1])


def _skeleton(base: Mapping[str, object]) -> nn.Module:
    """The architecture without memory for its weights, where its constructor allows that."""
    try:
        with torch.device("meta"):
            return rebuild(base)
    except (ArtifactError, RuntimeError, NotImplementedError):
        return rebuild(base)


def _same_settings(model: nn.Module, twin: nn.Module, changed: Mapping[str, Mapping[str, int]]) -> bool:
    ours, theirs = dict(model.named_modules()), dict(twin.named_modules())
    if ours.keys() != theirs.keys():
        return False
    return all(_agree(ours[name], theirs[name], changed.get(name, {})) for name in ours)


def _agree(module: nn.Module, twin: nn.Module, leave_out: Mapping[str, int]) -> bool:
    ours, theirs = _simple(module, leave_out), _simple(twin, leave_out)
    # What a forward pass fills in where the constructor left None (the scales of a RoI pooling) is no setting.
    return ours == {k: v for k, v in theirs.items() if k in ours or v is not None or k not in vars(module)}


def _simple(module: nn.Module, leave_out: Mapping[str, int]) -> dict[str, Any]:
    """The settings of one layer that are plain values; whether it is in training mode is none of them."""
    roots = {size_path(path)[0] for path in leave_out}
    return {
        key: value
        for key, value in vars(module).items()
        if isinstance(value, (bool, int, float, str, tuple, type(None)))
        and not key.startswith("_")
        and key != "training"
        and key not in roots
    }
