"""Dense architectures from their description in a file: by name, from an allow-list, with random weights.

A file never names code to run, weights to fetch or files to read. One function for each source, because a copy of one
of them travels in saved folders (`load_pruned.standalone`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from ..errors import ArtifactError, ConfigError, described

FETCHING = ("weights", "weights_backbone", "progress", "checkpoint_path", "cache_dir")
"""Arguments that would fetch or read files."""

Rebuild = Callable[[Mapping[str, object]], nn.Module]


def rebuild(base: Mapping[str, object]) -> nn.Module:
    """Build the architecture that a saved ``base`` describes, with random weights, in eval mode.

    Only models of our zoo, torchvision, timm and transformers are built; ArtifactError says for everything else to
    pass the base model, and what is wrong with a description.
    """
    return builder(base)(base)


def builder(base: Mapping[str, object]) -> Rebuild:
    """The function that builds models of this source."""
    source, name = base.get("source"), str(base.get("name"))
    if source == "zoo":
        return rebuild_cifar_googlenet if name == "cifar_googlenet" else rebuild_cifar_resnet
    builders: dict[object, Rebuild] = {
        "torchvision": rebuild_torchvision,
        "timm": rebuild_timm,
        "hf": rebuild_hf,
    }
    return builders.get(source, rebuild_given)


def rebuild_given(base: Mapping[str, object]) -> nn.Module:
    """ArtifactError: a model of the user's own has to be passed in."""
    raise ArtifactError(
        f"the base model has source {base.get('source')!r}, which is not rebuilt from a file: pass base=model"
    )


def rebuild_cifar_resnet(base: Mapping[str, object]) -> nn.Module:
    """A ResNet for small images."""
    from .resnet_cifar import CIFAR_DEPTHS, CifarResNet

    def make(name: str, **arguments: object) -> nn.Module:
        depths = {f"cifar_resnet{depth}": depth for depth in CIFAR_DEPTHS}
        if name not in depths:
            raise ConfigError(f"{name!r} is not a model of zoo")
        return CifarResNet(depths[name], **arguments)  # type: ignore[arg-type]

    return _constructed(base, make)


def rebuild_cifar_googlenet(base: Mapping[str, object]) -> nn.Module:
    """The GoogLeNet for small images."""
    from .googlenet_cifar import CifarGoogLeNet

    def make(name: str, **arguments: object) -> nn.Module:
        return CifarGoogLeNet(**arguments)  # type: ignore[arg-type]

    return _constructed(base, make)


def rebuild_torchvision(base: Mapping[str, object]) -> nn.Module:
    """A model of torchvision."""
    from .torchvision_models import build, check_name

    def make(name: str, **arguments: object) -> nn.Module:
        return build(check_name(name, name), False, **arguments)  # type: ignore[arg-type]

    return _constructed(base, make)


def rebuild_timm(base: Mapping[str, object]) -> nn.Module:
    """A model of timm."""
    from .timm_models import build, check_name

    def make(name: str, **arguments: object) -> nn.Module:
        return build(check_name(f"timm:{name}", name), **arguments)

    return _constructed(base, make)


def rebuild_hf(base: Mapping[str, object]) -> nn.Module:
    """An image classifier of transformers, by its type."""
    from .hf_models import build, check_type

    def make(name: str, **arguments: object) -> nn.Module:
        check_type(name, f"hf:{name}")
        return build(name, **arguments)

    return _constructed(base, make)


def _constructed(base: Mapping[str, object], make: Callable[..., nn.Module]) -> nn.Module:
    """What ``make(name, **arguments)`` returns for a checked description; the global random state stays."""
    name, arguments = base.get("name"), base.get("arguments", {})
    if not isinstance(name, str) or not isinstance(arguments, Mapping):
        raise ArtifactError("the base model's description is malformed: it needs a name and arguments")
    if any(key in FETCHING or str(key).startswith("pretrained") for key in arguments):
        raise ArtifactError("the base model's description asks for a download or a file, which is refused")
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        try:
            model = make(name, **arguments)
        except ConfigError as error:
            raise ArtifactError(f"the base model cannot be rebuilt: {error}") from error
        except Exception as error:
            raise ArtifactError(
                f"the base model cannot be rebuilt: {name!r} with arguments {dict(arguments)}: {described(error)}"
            ) from error
    return model.eval()
