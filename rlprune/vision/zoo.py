"""Models by name: those for small images, torchvision and timm classifiers, and a user's own function.

Names: ``cifar_resnet20``, ``cifar_googlenet``; a bare torchvision name or ``torchvision:NAME``; ``timm:NAME``;
``module:function`` for any function that returns a torch.nn.Module.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypedDict
from urllib.error import URLError

import torch
from torch import nn

from ..artifacts.checkpoint import SUFFIXES, load_checkpoint, put_weights
from ..errors import ArtifactError, ConfigError, DataError, described, near_miss
from ..utils.named_objects import model_function
from .googlenet_cifar import CifarGoogLeNet
from .resnet_cifar import CIFAR_DEPTHS as CIFAR_DEPTHS
from .resnet_cifar import CifarResNet

_ZOO: dict[str, Callable[..., nn.Module]] = {
    **{f"cifar_resnet{depth}": partial(CifarResNet, depth) for depth in CIFAR_DEPTHS},
    "cifar_googlenet": CifarGoogLeNet,
}
# Their heads that only training uses are built away; the prefixes are those of the heads' tensors.
_AUXILIARY = {"googlenet": ("aux1.", "aux2."), "inception_v3": ("AuxLogits.",)}
# Arguments that would fetch or read files; a saved artifact must not be able to ask for that.
_FORBIDDEN = ("weights", "weights_backbone", "progress", "checkpoint_path", "cache_dir")


class Base(TypedDict):
    """How to build an architecture, plain JSON: ``source`` is "zoo", "torchvision", "timm" or "function"."""

    source: str
    name: str
    arguments: dict[str, object]


def list_models() -> list[tuple[str, str]]:
    """(name, one line) of every model that can be named here, timm's summed up in one line."""
    rows = [(f"cifar_resnet{d}", f"CIFAR ResNet of depth {d}; arguments: width (16)") for d in CIFAR_DEPTHS]
    rows.append(("cifar_googlenet", "GoogLeNet for small images; arguments: width (1.0, a factor)"))
    rows += [(n, "torchvision classifier") for n in _torchvision_names()]
    rows.append(("timm:NAME", f"timm classifier ({_timm_state()})"))
    rows.append(("module:function", "your own function that returns a torch.nn.Module"))
    return rows


def base_of(
    name: str,
    classes: int,
    channels: int = 3,
    arguments: Mapping[str, object] | None = None,
    weights: str | None = None,
) -> Base:
    """How to build an architecture: {"source", "name", "arguments"}, plain JSON, checked.

    ``source`` is "zoo", "torchvision", "timm" or "function". ``weights`` matters for the two torchvision
    models whose published weights want the input normalised in another way (``transform_input``).
    Raises ConfigError for an unknown name.
    """
    source, bare = _resolve(name)
    given = dict(arguments or {})
    for key in given:
        if key in _FORBIDDEN or key.startswith("pretrained"):
            raise ConfigError(f"model.arguments.{key}: not allowed; use model.weights or model.checkpoint")
    if source == "zoo":
        defaults = {"classes": classes, "channels": channels}
    elif source == "torchvision":
        defaults = {"num_classes": classes, "channels": channels}
        if bare in _AUXILIARY and weights is not None and not _is_file(weights):
            defaults["transform_input"] = True
    elif source == "timm":
        defaults = {"num_classes": classes, "in_chans": channels}
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
    seed: int = 0,
) -> nn.Module:
    """Build a model by name, in eval mode on the CPU.

    Without weights it is initialised from ``seed`` (the global random state stays as it was).

    Args:
        weights: a name of torchvision or timm weights ("DEFAULT" for the newest), or a file.
            Where the number of classes or channels differs, the head or the stem stays initialised.
        checkpoint: a .safetensors or torch file; every tensor has to fit.

    Raises ConfigError (unknown name or arguments), ArtifactError (file), DataError (no download).
    """
    base = base_of(name, classes, channels, arguments, weights)
    if weights is not None and checkpoint is not None:
        raise ConfigError("model.weights and model.checkpoint: give one of the two")
    model = _construct(base, seed, trusted=True)
    if weights is not None and _is_file(weights):
        weights, checkpoint = None, weights
    if checkpoint is not None:
        put_weights(model, load_checkpoint(checkpoint), f"checkpoint {str(checkpoint)!r}")
    elif weights is not None:
        _published_weights(model, base, weights)
    return model.eval()


def rebuild(base: Mapping[str, object]) -> nn.Module:
    """Build the architecture that a saved ``base`` describes, with random weights, in eval mode.

    Only zoo, torchvision and timm models are built: a file never names code to run. For everything
    else ArtifactError says to pass the base model.
    """
    source = base.get("source")
    if source not in ("zoo", "torchvision", "timm"):
        raise ArtifactError(
            f"the base model has source {source!r}, which is not rebuilt from a file: pass base=model"
        )
    name, arguments = base.get("name"), base.get("arguments", {})
    if not isinstance(name, str) or not isinstance(arguments, Mapping):
        raise ArtifactError("the base model's description is malformed: it needs a name and arguments")
    if any(k in _FORBIDDEN or k.startswith("pretrained") for k in arguments):
        raise ArtifactError("the base model's description asks for a download or a file, which is refused")
    try:
        known = _resolve(f"{source}:{name}" if source != "zoo" else name)
        if known[0] != source:
            raise ConfigError(f"{name!r} is not a model of {source}")
        checked = Base(source=known[0], name=name, arguments=dict(arguments))
        return _construct(checked, 0, trusted=False).eval()
    except ConfigError as error:
        raise ArtifactError(f"the base model cannot be rebuilt: {error}") from error


def _is_file(weights: str) -> bool:
    return Path(weights).suffix in SUFFIXES or Path(weights).is_file()


def _torchvision_names() -> list[str]:
    from torchvision import models

    return models.list_models(module=models)


def _timm_state() -> str:
    found = importlib.util.find_spec("timm") is not None
    return "installed" if found else "not installed: pip install 'rlprune[timm]'"


def _resolve(name: str) -> tuple[str, str]:
    """Split a model name into its source and the name there; raises ConfigError for an unknown one."""
    if name in _ZOO:
        return "zoo", name
    source, colon, bare = name.partition(":")
    if not colon:
        bare, source = name, "torchvision"
    if source == "torchvision":
        allowed = _torchvision_names()
        if bare in allowed:
            return source, bare
        hint = near_miss(bare, [*_ZOO, *allowed])
        raise ConfigError(f"model.name {name!r}: no such model{hint}; see 'rlprune list models'")
    if source == "timm":
        return source, _timm_name(name, bare)
    if not source or not bare:
        raise ConfigError(f"model.name {name!r}: expected a model name or 'module:function'")
    return "function", name


def _timm_name(name: str, bare: str) -> str:
    try:
        import timm
    except ImportError as error:
        raise ConfigError(
            f"model.name {name!r}: timm is not installed; pip install 'rlprune[timm]'"
        ) from error
    if not timm.is_model(bare):
        raise ConfigError(f"model.name {name!r}: timm has no such model{near_miss(bare, timm.list_models())}")
    return bare


def _construct(base: Base, seed: int, *, trusted: bool) -> nn.Module:
    """Build ``base`` with weights drawn from ``seed``. Untrusted bases (from files) never import user code."""
    source, name, arguments = base["source"], base["name"], dict(base["arguments"])
    builders: dict[str, Callable[..., nn.Module]] = {
        "zoo": lambda **a: _ZOO[name](**a),
        "torchvision": lambda **a: _torchvision(name, trusted, **a),
        "timm": lambda **a: _timm(name, **a),
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


def _torchvision(name: str, initialise: bool, channels: int = 3, **arguments: object) -> nn.Module:
    from torchvision import models

    if name in _AUXILIARY:
        arguments = {"aux_logits": False, "init_weights": initialise} | arguments
    model = models.get_model(name, weights=None, **arguments)
    if channels != 3:
        _set_channels(model, channels)
    return model


def _set_channels(model: nn.Module, channels: int) -> None:
    """Replace the first convolution by one that takes ``channels`` input channels."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            stem = nn.Conv2d(
                channels,
                module.out_channels,
                module.kernel_size,  # type: ignore[arg-type]
                module.stride,  # type: ignore[arg-type]
                module.padding,  # type: ignore[arg-type]
                module.dilation,  # type: ignore[arg-type]
                bias=module.bias is not None,
                padding_mode=module.padding_mode,
            )
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, stem)
            return
    raise ConfigError(f"the model has no convolution to give {channels} input channels to")


def _timm(name: str, **arguments: Any) -> nn.Module:
    import timm

    return timm.create_model(name, pretrained=False, **arguments)


def _published_weights(model: nn.Module, base: Base, weights: str) -> None:
    """Put named torchvision or timm weights into ``model``; they are downloaded where not cached."""
    source, name = base["source"], base["name"]
    try:
        if source == "torchvision":
            tensors = _torchvision_weights(name, weights)
            if name in _AUXILIARY:
                tensors = {k: v for k, v in tensors.items() if not k.startswith(_AUXILIARY[name])}
        elif source == "timm":
            import timm

            full = name if weights == "DEFAULT" else f"{name}.{weights}"
            tensors = timm.create_model(full, pretrained=True).state_dict()
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


def _torchvision_weights(name: str, weights: str) -> dict[str, Any]:
    from torchvision import models

    known = models.get_model_weights(name)
    bare = weights.rpartition(".")[2]
    if bare not in known.__members__:
        allowed = ", ".join(known.__members__)
        raise ConfigError(
            f"model.weights {weights!r}: {name!r} has {allowed}{near_miss(bare, known.__members__)}"
        )
    return known[bare].get_state_dict(progress=False, check_hash=True)
