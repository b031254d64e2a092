"""From a dense architecture and the tensors of a pruned folder to the pruned model.

Plain torch: `standalone` copies these functions into the folders that `rlprune.save` writes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..errors import ArtifactError, near_miss
from ..pruning.attributes import get_size, set_size
from ..pruning.heads import fit_attention, set_heads
from ..utils.torch_internals import BATCH_OR_INSTANCE_NORM, CONVOLUTION


def checksum(tensor: Tensor) -> str:
    """Number format and SHA-256 of the bytes of a tensor, as in "float32:9f86d0...": row-major, little-endian."""
    plain = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return f"{_format(tensor)}:{hashlib.sha256(plain.numpy().data).hexdigest()}"


def check_checksum(name: str, tensor: Tensor, checksums: Mapping[str, object], where: str) -> None:
    """ArtifactError where a tensor is not the one that was saved under its name."""
    saved = checksums.get(name)
    if not isinstance(saved, str) or ":" not in saved:
        raise ArtifactError(f"{where}: the JSON next to it has no checksum of {name!r}")
    kind = saved.partition(":")[0]
    if kind != _format(tensor):
        raise ArtifactError(f"{where}: {name!r} is {_format(tensor)}, but {kind} was saved")
    if checksum(tensor) != saved:
        raise ArtifactError(
            f"{where}: {name!r} is not the tensor that was saved (its checksum differs): changed or swapped"
        )


def _format(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def put_tensors(model: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Replace all parameters and buffers by the tensors of the file, whatever their sizes; ties stay tied.

    ArtifactError for tensors that are missing, unknown, or larger than those of the dense model.
    """
    buffers = dict(model.named_buffers())
    own = model.state_dict() | {name: buffers[name] for name in tensors if name in buffers}
    missing, foreign = sorted(set(own) - set(tensors)), sorted(set(tensors) - set(own))
    if missing or foreign:
        name = (missing or foreign)[0]
        state = "lacks" if missing else "holds the unknown"
        raise ArtifactError(f"{where}: {state} tensor {name!r}{near_miss(name, foreign if missing else own)}")
    # A module may stand under several names, and a parameter in several modules: each is replaced once. The keys hold
    # the old parameters: the identity of one that is gone may be given to a new one.
    new_of: dict[nn.Parameter, nn.Parameter] = {}
    for name, tensor in tensors.items():
        old = own[name]
        if tensor.ndim != old.ndim or any(a > b for a, b in zip(tensor.shape, old.shape, strict=True)):
            raise ArtifactError(
                f"{where}: {name!r} has shape {list(tensor.shape)}, which does not fit {list(old.shape)} of the base"
            )
        path, _, last = name.rpartition(".")
        module = model.get_submodule(path)
        parameter = dict(module.named_parameters(recurse=False, remove_duplicate=False)).get(last)
        # setattr and no shortcut: recurrent layers keep a second list of their weights.
        if parameter is None:
            setattr(module, last, tensor)
        else:
            new = new_of.setdefault(parameter, nn.Parameter(tensor, parameter.requires_grad))
            new_of[new] = new
            setattr(module, last, new)


def set_attributes(model: nn.Module, wanted: Mapping[str, object], where: str) -> None:
    """Set sizes that modules keep in attributes: ones that are there, are whole numbers, and do not grow.

    ArtifactError for anything else, and where a layer's own weight says another size.
    """
    modules = dict(model.named_modules())
    for name, values in wanted.items():
        if name not in modules or not isinstance(values, dict):
            raise ArtifactError(
                f"{where}: attributes: the base has no module {name!r}{near_miss(name, modules)}"
            )
        for path, value in values.items():
            _set_attribute(modules[name], path, value, f"{where}: attributes: {name}.{path} = {value!r}")
        _check_sizes(modules[name], f"{where}: attributes: {name}")
    fit_attention(model)


def _set_attribute(module: nn.Module, path: str, value: object, what: str) -> None:
    try:
        old = get_size(module, path)
    except LookupError:
        raise ArtifactError(f"{what} is not a size that may be set") from None
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ArtifactError(f"{what} is not a size that may be set")
    if value > old:
        raise ArtifactError(f"{what} is more than the {old} of the dense model")
    if isinstance(module, nn.MultiheadAttention) and path == "num_heads":
        set_heads(module, path, value)
    else:
        set_size(module, path, value)


def _check_sizes(module: nn.Module, what: str) -> None:
    """What a layer says of its sizes is what its weight has."""
    weight = getattr(module, "weight", None)
    shape: Sequence[int] = weight.shape if isinstance(weight, Tensor) else ()
    wanted: dict[str, int] = {}
    if isinstance(module, CONVOLUTION):
        first, second = ("in", "out") if module.transposed else ("out", "in")
        wanted = {f"{first}_channels": shape[0], f"{second}_channels": shape[1] * module.groups}
        if not module.groups or module.in_channels % module.groups or module.out_channels % module.groups:
            raise ArtifactError(
                f"{what}.groups = {module.groups} does not fit its weight of shape {list(shape)}"
            )
    elif isinstance(module, nn.Linear):
        wanted = {"out_features": shape[0], "in_features": shape[1]}
    elif isinstance(module, BATCH_OR_INSTANCE_NORM) and shape:
        wanted = {"num_features": shape[0]}
    elif isinstance(module, nn.MultiheadAttention):
        wanted = {"num_heads": module.out_proj.weight.shape[1] // module.head_dim}
        shape = module.out_proj.weight.shape
    elif isinstance(module, nn.GroupNorm):
        wanted = {"num_channels": shape[0]} if shape else {}
        if not module.num_groups or module.num_channels % module.num_groups:
            raise ArtifactError(
                f"{what}.num_groups = {module.num_groups} does not divide {module.num_channels}"
            )
    for name, size in wanted.items():
        if getattr(module, name) != size:
            raise ArtifactError(
                f"{what}.{name} = {getattr(module, name)} does not fit its weight of shape {list(shape)}"
            )
