"""Image classifiers of transformers: by the name of a type, from a folder or the cache; a file never fetches one.

``hf:vit`` is the type with its default sizes and random weights, ``hf:FOLDER`` and ``hf:ORGANISATION/NAME`` are what
lies there, with its weights. Code that comes with a model is never run.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import ArtifactError, ConfigError, DataError, described, near_miss
from ..utils.hub import local_config, quiet
from .torchvision_models import set_channels

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

PREFIX = "hf:"
# They read something else in addition to pixels, or are another library's models in a wrapper.
_OTHERS = {
    "imagegpt": "reads tokens, not pixels",
    "perceiver": "reads arrays of any kind, not pixels alone",
    "shieldgemma2": "reads text as well as images",
    "siglip2": "reads patches with their masks and shapes",
    "timm_wrapper": "is a model of timm: name it timm:NAME",
}
# What an argument from a file may not say: it would fetch or run something, or is no part of the architecture.
FORBIDDEN = ("auto_map", "backbone", "use_pretrained_backbone", "use_timm_backbone", "quantization_config")
_NOT_ARCHITECTURE = {
    *("transformers_version", "model_type", "architectures", "_name_or_path", "dtype", "torch_dtype"),
    *("id2label", "label2id", "problem_type", "auto_map", "_commit_hash", "_attn_implementation"),
}
_SIZES = {"num_labels", "num_channels", "image_size", "channels"}
_USUAL_SIDE = 224


def types() -> list[str]:
    """The model types of transformers that classify images and read nothing else."""
    return [kind for kind in _classes() if kind not in _OTHERS]


def _classes() -> Mapping[str, object]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES as CLASSES

    found: Mapping[str, object] = CLASSES
    return found


def resolve(name: str) -> tuple[str, dict[str, object]]:
    """(model type, arguments) of ``hf:...``; ConfigError where it is no image classifier, with the near miss."""
    place = name.removeprefix(PREFIX)
    content = local_config(place)
    if content is None:
        check_type(place, name)
        return place, {}
    kind = content.get("model_type")
    check_type(kind if isinstance(kind, str) else "", name)
    with quiet():
        from transformers import AutoConfig

        try:
            config = AutoConfig.from_pretrained(place, trust_remote_code=False, local_files_only=True)
        except Exception as error:
            raise ArtifactError(
                f"model.name {name!r}: its config cannot be read ({described(error)})"
            ) from error
    return config.model_type, arguments_of(config)


def check_type(kind: str, name: str) -> None:
    """ConfigError where a model type does not classify images."""
    if kind in _OTHERS:
        raise ConfigError(f"model.name {name!r}: {kind} {_OTHERS[kind]}")
    if kind not in _classes():
        raise ConfigError(
            f"model.name {name!r}: transformers has no image classifier of type {kind!r}"
            f"{near_miss(kind, types())}; allowed: a type (hf:vit), a folder with config.json, or a cached hub id"
        )


def defaults(kind: str, classes: int, channels: int, side: int | None) -> dict[str, object]:
    """The arguments that follow from the data, as far as the type has them."""
    config = _config(kind, {})
    found: dict[str, object] = {"num_labels": classes}
    if _holders(config, "num_channels"):
        found["num_channels"] = channels
    elif channels != 3:
        found["channels"] = channels
    if side is not None and _holders(config, "image_size"):
        found["image_size"] = side
    return found


def check_arguments(kind: str, arguments: Mapping[str, object]) -> None:
    """ConfigError for an argument that the type's config does not have: transformers would take and forget it."""
    known = {*_config(kind, {}).to_dict(), *_SIZES} - _NOT_ARCHITECTURE
    for key in arguments:
        if key in FORBIDDEN:
            raise ConfigError(f"model.arguments.{key}: not allowed; use model.weights or model.checkpoint")
        if key not in known:
            raise ConfigError(f"model.arguments.{key}: unknown for {PREFIX}{kind}{near_miss(key, known)}")


def build(kind: str, **arguments: object) -> nn.Module:
    """The type's classifier with random weights."""
    from transformers import AutoModelForImageClassification

    check_arguments(kind, arguments)
    channels = arguments.pop("channels", 3)
    with quiet():
        config = _config(kind, arguments)
        classes = _classes()[kind]
        # A type with several heads has no default of its own.
        config.architectures = [classes[0] if isinstance(classes, tuple) else str(classes)]
        model: nn.Module = AutoModelForImageClassification.from_config(config, trust_remote_code=False)
    if channels != 3:
        if not isinstance(channels, int):
            raise ConfigError(f"model.arguments.channels: must be a whole number, got {channels!r}")
        set_channels(model, channels)
    return model


def _config(kind: str, arguments: Mapping[str, object]) -> PreTrainedConfig:
    from transformers import AutoConfig

    rest = {key: value for key, value in arguments.items() if key not in ("num_channels", "image_size")}
    with quiet():
        config: PreTrainedConfig = AutoConfig.for_model(kind, **rest)
    for key in ("num_channels", "image_size"):
        if key in arguments:
            holders = _holders(config, key)
            if not holders:
                raise ConfigError(f"model.arguments.{key}: {PREFIX}{kind} has no such setting")
            for part in holders:
                value = arguments[key]
                pair = isinstance(getattr(part, key), (list, tuple)) and isinstance(value, int)
                setattr(part, key, [value, value] if pair else value)
    return config


def _holders(config: PreTrainedConfig, key: str) -> list[Any]:
    """The config, or the part of it that describes the images, where it has a value for ``key``."""
    parts = [config, getattr(config, "vision_config", None)]
    return [part for part in parts if part is not None and getattr(part, key, None) is not None]


def arguments_of(config: PreTrainedConfig) -> dict[str, object]:
    """How a config differs from its type's own, and its number of classes: plain JSON."""
    different = _difference(config.to_dict(), _config(config.model_type, {}).to_dict())
    return {"num_labels": config.num_labels} | different


def _difference(given: Mapping[str, object], usual: Mapping[str, object]) -> dict[str, object]:
    """The entries of a config that its type's own does not have; of a part, those of the part."""
    found: dict[str, object] = {}
    for key, value in given.items():
        if key in usual and key not in _NOT_ARCHITECTURE and value != usual[key]:
            own = usual[key]
            both = isinstance(value, dict) and isinstance(own, dict)
            found[key] = _difference(value, own) if both else value  # type: ignore[arg-type]
    return found


def own_weights(name: str) -> str | None:
    """Where the weights lie that ``hf:...`` brings along; None for a type's name."""
    place = name.removeprefix(PREFIX)
    return place if local_config(place) is not None else None


def weights(place: str) -> dict[str, Tensor]:
    """The tensors of a folder or a hub id, without those that its files lack; downloaded where not cached.

    Raises ArtifactError for broken files, DataError where nothing can be fetched.
    """
    from transformers import AutoModelForImageClassification

    with quiet():
        try:
            model, report = AutoModelForImageClassification.from_pretrained(
                place, trust_remote_code=False, output_loading_info=True, dtype=torch.float32
            )
        except Exception as error:
            if Path(place).expanduser().is_dir():
                raise ArtifactError(
                    f"model.weights {place!r}: cannot be read ({described(error)})"
                ) from error
            raise DataError(f"model.weights {place!r}: cannot be fetched ({described(error)})") from error
    missing = sorted(report.get("missing_keys", ()))
    if missing:
        raise ArtifactError(
            f"model.weights {place!r}: the files lack {len(missing)} of the model's tensors, {missing[0]!r} among them"
        )
    found: dict[str, Tensor] = model.state_dict()
    return found


def example(kind: str, arguments: Mapping[str, object], side: int | None = None) -> Tensor:
    """One random image (1, C, H, W) of the size that the config names, or of ``side``."""
    config = _config(kind, {key: value for key, value in arguments.items() if key != "channels"})
    own = next((part.image_size for part in _holders(config, "image_size")), None)
    if isinstance(own, (list, tuple)):
        own = own[0]
    channels = next((part.num_channels for part in _holders(config, "num_channels")), None)
    if channels is None:
        given = arguments.get("channels", 3)
        channels = given if isinstance(given, int) else 3
    pixels = side or (own if isinstance(own, int) else _USUAL_SIDE)
    return torch.rand(1, channels, pixels, pixels)


def candidate(model: nn.Module, channels: int) -> dict[str, Any] | None:
    """The base that an image classifier of transformers may have; None for other models."""
    config = getattr(model, "config", None)
    kind = getattr(config, "model_type", None)
    if not isinstance(kind, str) or kind not in _classes() or kind in _OTHERS:
        return None
    arguments = arguments_of(config)  # type: ignore[arg-type]
    if channels != 3 and not _holders(config, "num_channels"):  # type: ignore[arg-type]
        arguments["channels"] = channels
    return {"source": "hf", "name": kind, "arguments": arguments}
