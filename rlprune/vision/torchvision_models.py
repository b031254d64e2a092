"""torchvision's models by name, of all its tasks: how each is built, what it reads, which one a module is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, near_miss
from ..utils.pytrees import Inputs

TASKS = {
    "segmentation": "a class for every pixel",
    "detection": "boxes",
    "video": "a class for a video",
    "optical flow": "a motion for every pixel",
    "classification": "a class for an image",
}
"""What the models of each task give."""
_PACKAGES = {
    "torchvision.models.segmentation.": "segmentation",
    "torchvision.models.detection.": "detection",
    "torchvision.models.video.": "video",
    "torchvision.models.optical_flow.": "optical flow",
    "torchvision.models.quantization.": "quantised",
}
# Their heads that only training uses are built away; the prefixes are those of the heads' tensors.
AUXILIARY = {"googlenet": ("aux1.", "aux2."), "inception_v3": ("AuxLogits.",)}
_SIDE = {"inception_v3": 299, "ssd300_vgg16": 300, "s3d": 224}
_SIDES = {"segmentation": 224, "detection": 320, "video": 112, "optical flow": 128, "classification": 224}
_CANDIDATES = 5


def names() -> list[tuple[str, str]]:
    """(name, task) of every model that can be built; those of `torchvision.models.quantization` cannot be pruned."""
    from torchvision import models

    every = [(name, _task(models.get_model_builder(name).__module__)) for name in models.list_models()]
    return [(name, task) for name, task in every if task in TASKS]


def task_of(name: str) -> str:
    """One of `TASKS`."""
    from torchvision import models

    return _task(models.get_model_builder(name).__module__)


def _task(module: str) -> str:
    found = next((task for package, task in _PACKAGES.items() if module.startswith(package)), None)
    return found or "classification"


def check_name(asked: str, name: str, others: tuple[str, ...] = ()) -> str:
    """The name again; ConfigError, with the near miss among all names and ``others``, where there is no such model."""
    from torchvision import models

    known = [own for own, _ in names()]
    if name in known:
        return name
    if name in models.list_models():
        plain = name.removeprefix("quantized_")
        raise ConfigError(f"model.name {asked!r}: quantised models cannot be pruned; use {plain!r}")
    hint = near_miss(name, [*others, *known])
    raise ConfigError(f"model.name {asked!r}: no such model{hint}; see 'rlprune list models'")


def defaults(name: str, classes: int, channels: int) -> dict[str, object]:
    """The arguments that follow from the data."""
    sizes: dict[str, object] = {"channels": channels}
    if task_of(name) == "detection" and channels != 3:  # the usual means and deviations are those of three
        sizes |= {"image_mean": [0.0] * channels, "image_std": [1.0] * channels}
    return sizes if task_of(name) == "optical flow" else {"num_classes": classes} | sizes


def build(
    name: str, initialise: bool, channels: int = 3, frozen_norm: float | None = None, **arguments: object
) -> nn.Module:
    """The model with random weights, nothing downloaded.

    Args:
        initialise: False leaves out what only fresh weights need, where the model can tell.
        channels: of the input.
        frozen_norm: the epsilon of batch norms with fixed statistics, which published detectors have in their
            backbone; None for ordinary ones.
    """
    from torchvision import models

    if name in AUXILIARY:
        arguments = {"aux_logits": False, "init_weights": initialise} | arguments
    if task_of(name) in ("segmentation", "detection"):
        arguments["weights_backbone"] = None
    model: nn.Module = models.get_model(name, weights=None, **arguments)
    if frozen_norm is not None:
        _freeze_norms(model, frozen_norm)
    if channels != 3:
        set_channels(model, channels)
    return model


def _freeze_norms(model: nn.Module, eps: float) -> None:
    """Put batch norms with fixed statistics in the place of those of the backbone."""
    from torchvision.ops import FrozenBatchNorm2d

    for name, module in list(model.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, FrozenBatchNorm2d(module.num_features, eps))


def set_channels(model: nn.Module, channels: int) -> None:
    """Replace the first convolution by one that takes ``channels`` input channels."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            if module.in_channels == channels:
                return
            stem = type(module)(
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


def example(name: str, arguments: Mapping[str, object], side: int | None = None) -> Inputs:
    """One random sample, as the model is called with it; ``side`` in pixels, the usual one by default.

    Images are (1, C, H, W), videos (1, C, frames, H, W), a detector's argument is a list of images (C, H, W), and an
    optical-flow model takes two images.
    """
    task = task_of(name)
    given = arguments.get("channels", 3)
    channels = given if isinstance(given, int) else 3
    pixels = side or _side(name, task, arguments)
    image = torch.rand(1, channels, pixels, pixels)
    if task == "detection":
        return [image[0]]
    if task == "video":
        frames = _number(arguments, "temporal_size", 16)
        return image.unsqueeze(2).repeat(1, 1, frames, 1, 1) * torch.rand(1, 1, frames, 1, 1)
    if task == "optical flow":
        return image, image.roll(2, dims=-1)
    return image


def _side(name: str, task: str, arguments: Mapping[str, object]) -> int:
    """The usual size of a task, or what a vision transformer was built for."""
    if name.startswith(("mvit", "swin3d")):
        return 224
    return _number(arguments, "image_size", _SIDE.get(name, _SIDES[task]))


def _number(arguments: Mapping[str, object], key: str, default: int) -> int:
    value = arguments.get(key, default)
    return value if isinstance(value, int) else default


def weights_of(name: str, weights: str) -> dict[str, Tensor]:
    """Published tensors by the name of their set ("DEFAULT" for the newest), downloaded where not cached."""
    from torchvision import models

    known = models.get_model_weights(name)
    bare = weights.rpartition(".")[2]
    if bare not in known.__members__:
        allowed = ", ".join(known.__members__)
        raise ConfigError(
            f"model.weights {weights!r}: {name!r} has {allowed}{near_miss(bare, known.__members__)}"
        )
    found: dict[str, Tensor] = known[bare].get_state_dict(progress=False, check_hash=True)
    skipped = AUXILIARY.get(name, ())
    return {key: tensor for key, tensor in found.items() if not key.startswith(skipped)} if skipped else found


def arguments_of_weights(name: str) -> dict[str, object]:
    """What a model must be built with for its published weights to mean what they meant where they were trained."""
    if name in AUXILIARY:
        return {"transform_input": True}
    if task_of(name) == "detection" and name in _FROZEN:
        return {"frozen_norm": _FROZEN[name]}
    return {"aux_loss": True} if name.startswith(("fcn_", "deeplabv3_")) else {}


# torchvision builds these with FrozenBatchNorm2d once weights are asked for, some with eps = 0 (`overwrite_eps`).
_FROZEN = {
    "fasterrcnn_resnet50_fpn": 0.0,
    "maskrcnn_resnet50_fpn": 0.0,
    "keypointrcnn_resnet50_fpn": 0.0,
    "retinanet_resnet50_fpn": 0.0,
    "fcos_resnet50_fpn": 1e-5,
    "fasterrcnn_mobilenet_v3_large_fpn": 1e-5,
    "fasterrcnn_mobilenet_v3_large_320_fpn": 1e-5,
}


def candidates(model: nn.Module, dense_params: float, classes: int, channels: int) -> list[dict[str, Any]]:
    """Bases of the models that a module may be, the nearest to that many parameters first.

    A few of them only: the largest of a family need not fill the memory.
    """
    from torchvision import models

    home = type(model).__module__
    task = _task(home)
    arguments: dict[str, Any] = {"num_classes": _classes(model, classes), "channels": channels}
    if task == "optical flow":
        del arguments["num_classes"]
    if getattr(model, "aux_classifier", None) is not None:
        arguments["aux_loss"] = True
    if task == "detection" and channels != 3:
        transform = model.get_submodule("transform")
        arguments |= {key: list(getattr(transform, key)) for key in ("image_mean", "image_std")}
    eps = _frozen_eps(model)
    if eps is not None:
        arguments["frozen_norm"] = eps

    def distance(name: str) -> float:
        published = [weights.meta.get("num_params", 0) for weights in models.get_model_weights(name)]
        return min((abs(count - dense_params) for count in published), default=0.0)

    def related(name: str, own: str) -> bool:
        # A detector's class lies in another file than some of its builders.
        return own == task == "detection" or models.get_model_builder(name).__module__ == home

    found = sorted((name for name, own in names() if related(name, own)), key=distance)[:_CANDIDATES]
    return [{"source": "torchvision", "name": name, "arguments": arguments} for name in found]


def _classes(model: nn.Module, classes: int) -> int:
    """Number of classes of a detector, whose head for boxes comes after the one for classes."""
    for path, attribute in (
        ("roi_heads.box_predictor.cls_score", "out_features"),
        ("head.classification_head", "num_classes"),
        ("head.classification_head", "num_columns"),
    ):
        try:
            found = getattr(model.get_submodule(path), attribute, None)
        except AttributeError:
            continue
        if isinstance(found, int):
            return found
    return classes


def _frozen_eps(model: nn.Module) -> float | None:
    from torchvision.ops import FrozenBatchNorm2d

    return next((float(m.eps) for m in model.modules() if isinstance(m, FrozenBatchNorm2d)), None)
