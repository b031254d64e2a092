"""Models by name: those for small images, torchvision's, timm's and transformers', and a user's own function.

Names: ``cifar_resnet20``, ``cifar_googlenet``; a bare torchvision name or ``torchvision:NAME`` (classifiers,
segmentation, detection, video, optical flow); ``timm:NAME``; ``hf:TYPE``, ``hf:FOLDER`` and ``hf:ID`` for image
classifiers of transformers; ``module:function`` for any function that returns a torch.nn.Module.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TypedDict
from urllib.error import URLError

import torch
from torch import nn

from ..artifacts.checkpoint import SUFFIXES, load_checkpoint, put_weights
from ..errors import ConfigError, DataError, described
from ..utils.named_objects import model_function
from ..utils.pytrees import Inputs
from . import hf_models, timm_models, torchvision_models
from .googlenet_cifar import CifarGoogLeNet
from .rebuild import FETCHING
from .resnet_cifar import CIFAR_DEPTHS, CifarResNet

_ZOO: dict[str, Callable[..., nn.Module]] = {
    **{f"cifar_resnet{depth}": partial(CifarResNet, depth) for depth in CIFAR_DEPTHS},
    "cifar_googlenet": CifarGoogLeNet,
}
_FORBIDDEN = (*FETCHING, *hf_models.FORBIDDEN)
_SMALL_SIDE = 32


class Base(TypedDict):
    """How to build an architecture, plain JSON: ``source`` is "zoo", "torchvision", "timm", "hf" or "function"."""

    source: str
    name: str
    arguments: dict[str, object]


def list_models() -> list[tuple[str, str]]:
    """(name, one line) of every model that can be named here, timm's summed up in one line."""
    rows = [(f"cifar_resnet{d}", f"CIFAR ResNet of depth {d}; arguments: width (16)") for d in CIFAR_DEPTHS]
    rows.append(("cifar_googlenet", "GoogLeNet for small images; arguments: width (1.0, a factor)"))
    rows += [(n, f"torchvision, gives {torchvision_models.TASKS[t]}") for n, t in torchvision_models.names()]
    rows.append(("timm:NAME", f"timm classifier ({timm_models.installed()})"))
    rows += [(f"hf:{kind}", "transformers image classifier, its default sizes") for kind in hf_models.types()]
    rows.append(("hf:FOLDER", "the same from a folder with config.json, with its weights"))
    rows.append(("module:function", "your own function that returns a torch.nn.Module"))
    return rows


def base_of(
    name: str,
    classes: int,
    channels: int = 3,
    arguments: Mapping[str, object] | None = None,
    weights: str | None = None,
    side: int | None = None,
) -> Base:
    """How to build an architecture: {"source", "name", "arguments"}, plain JSON, checked.

    ``source`` is "zoo", "torchvision", "timm", "hf" or "function". ``weights`` matters for torchvision models whose
    published weights belong to a variant (another normalisation of the input, batch norms with fixed statistics).
    ``side`` is that of the images in pixels, which transformers' vision transformers are built for.
    Raises ConfigError for an unknown name or argument, ArtifactError for an ``hf:`` folder that cannot be read.
    """
    source, bare = _resolve(name)
    given = dict(arguments or {})
    for key in given:
        if key in _FORBIDDEN or key.startswith("pretrained"):
            raise ConfigError(f"model.arguments.{key}: not allowed; use model.weights or model.checkpoint")
    defaults: dict[str, object]
    if source == "zoo":
        defaults = {"classes": classes, "channels": channels}
    elif source == "torchvision":
        defaults = torchvision_models.defaults(bare, classes, channels)
        if weights is not None and not _is_file(weights):
            defaults |= torchvision_models.arguments_of_weights(bare)
    elif source == "timm":
        defaults = {"num_classes": classes, "in_chans": channels}
    elif source == "hf":
        hf_models.check_arguments(bare, given)
        own = hf_models.resolve(name)[1]
        # Weights of a folder fit its own size of the images.
        defaults = own | hf_models.defaults(bare, classes, channels, None if own else side)
    else:
        defaults = {}
    return {"source": source, "name": bare, "arguments": defaults | given}


def build_model(
    name: str,
    classes: int = 10,
    channels: int = 3,
    *,
    arguments: Mapping[str, object] | None = None,
    weights: str | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_key: str | None = None,
    trained: bool = False,
    seed: int = 0,
    side: int | None = None,
) -> nn.Module:
    """Build a model by name, in eval mode on the CPU.

    Without weights it is initialised from ``seed`` (the global random state stays as it was).

    Args:
        weights: a name of torchvision or timm weights ("DEFAULT" for the newest), a folder or hub id of
            transformers, or a file. ``hf:FOLDER`` brings its own. Where the number of classes or channels
            differs, the head or the stem stays initialised.
        side: of the images in pixels; see `base_of`.
        checkpoint: a .safetensors or torch file, see `put_weights`.
        checkpoint_key: where the weights stand in it, see `load_checkpoint`.
        trained: whether training follows, so that a file of other classes leaves the head as initialised, with a
            `CheckpointWarning`; else such a file is refused.

    Raises ConfigError (unknown name or arguments), ArtifactError (file), DataError (no download).
    """
    base = base_of(name, classes, channels, arguments, weights, side)
    if weights is not None and checkpoint is not None:
        raise ConfigError("model.weights and model.checkpoint: give one of the two")
    model = _construct(base, seed, trusted=True)
    if weights is None and checkpoint is None and base["source"] == "hf":
        weights = hf_models.own_weights(name)
    if weights is not None and _is_file(weights):
        weights, checkpoint = None, weights
    if checkpoint is not None:
        source = f"checkpoint {str(checkpoint)!r}"
        put_weights(model, load_checkpoint(checkpoint, checkpoint_key), source, head=trained)
    elif weights is not None:
        _published_weights(model, base, weights)
    return model.eval()


def task_of(base: Mapping[str, object]) -> str:
    """What a model gives: "classification", or another of torchvision's `TASKS`."""
    if base.get("source") == "torchvision":
        return torchvision_models.task_of(str(base["name"]))
    return "classification"


def example_for(base: Mapping[str, object], side: int | None = None) -> Inputs:
    """One random sample, as the model that ``base`` describes is called with it.

    A tensor (1, C, H, W) for images, (1, C, frames, H, W) for videos, a list of one image (C, H, W) for detectors,
    a tuple of two images for optical flow. ``side`` is that of the image in pixels; by default what the model is
    made for.
    """
    source, name = str(base["source"]), str(base["name"])
    given = base.get("arguments")
    arguments: Mapping[str, object] = given if isinstance(given, Mapping) else {}
    if source == "torchvision":
        return torchvision_models.example(name, arguments, side)
    if source == "hf":
        return hf_models.example(name, arguments, side)
    channels = arguments.get("in_chans" if source == "timm" else "channels", 3)
    usual = timm_models.side(name, arguments) if source == "timm" else _SMALL_SIDE
    return torch.rand(1, channels if isinstance(channels, int) else 3, *[side or usual] * 2)


def _is_file(weights: str) -> bool:
    return Path(weights).suffix in SUFFIXES or Path(weights).is_file()


def _resolve(name: str) -> tuple[str, str]:
    """Split a model name into its source and the name there; raises ConfigError for an unknown one."""
    if name in _ZOO:
        return "zoo", name
    source, colon, bare = name.partition(":")
    if not colon:
        bare, source = name, "torchvision"
    if source == "torchvision":
        return source, torchvision_models.check_name(name, bare, tuple(_ZOO))
    if source == "timm":
        return source, timm_models.check_name(name, bare)
    if source == "hf":
        return source, hf_models.resolve(name)[0]
    if not source or not bare:
        raise ConfigError(f"model.name {name!r}: expected a model name or 'module:function'")
    return "function", name


def _construct(base: Base, seed: int, *, trusted: bool) -> nn.Module:
    """Build ``base`` with weights drawn from ``seed``. Untrusted bases (from files) never import user code."""
    source, name, arguments = base["source"], base["name"], dict(base["arguments"])
    builders: dict[str, Callable[..., nn.Module]] = {
        "zoo": lambda **a: _ZOO[name](**a),
        "torchvision": lambda **a: torchvision_models.build(name, trusted, **a),
        "timm": lambda **a: timm_models.build(name, **a),
        "hf": lambda **a: hf_models.build(name, **a),
    }
    if trusted:
        builders["function"] = lambda **a: model_function(name, "model.name")(**a)
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        try:
            model = builders[source](**arguments)
        except ConfigError:
            raise
        except Exception as error:
            raise ConfigError(
                f"model.name {name!r} with arguments {arguments}: cannot be built: {described(error)}"
            ) from error
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model.name {name!r}: must return a torch.nn.Module, got {type(model).__name__}")
    return model


def _published_weights(model: nn.Module, base: Base, weights: str) -> None:
    """Put named weights of torchvision, timm or transformers into ``model``; they are downloaded where not cached."""
    source, name = base["source"], base["name"]
    try:
        if source == "torchvision":
            tensors = torchvision_models.weights_of(name, weights)
        elif source == "timm":
            import timm

            full = name if weights == "DEFAULT" else f"{name}.{weights}"
            tensors = timm.create_model(full, pretrained=True).state_dict()
        elif source == "hf":
            tensors = hf_models.weights(weights)
        else:
            raise ConfigError(
                f"model.weights {weights!r}: no published weights for {name!r}; use model.checkpoint"
            )
    except (URLError, OSError) as error:
        raise DataError(
            f"model.weights {weights!r} of {name!r} cannot be fetched: {described(error)}"
        ) from error
    except RuntimeError as error:
        raise ConfigError(f"model.weights {weights!r} of {name!r}: {described(error)}") from error
    put_weights(model, tensors, f"model.weights {weights!r}", head=True)
