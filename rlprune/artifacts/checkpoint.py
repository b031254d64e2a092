"""Reading weights from outside: safetensors, or torch files that hold nothing but tensors."""

from __future__ import annotations

import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import ArtifactError, near_miss

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".tar", ".ckpt", ".th")
"""File names that are read as checkpoints; everything but .safetensors goes through torch's safe loader."""

_WRAPPERS = ("state_dict", "model_state_dict", "model", "net")
_PREFIXES = ("module.", "_orig_mod.")


def load_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint onto the CPU, by name.

    Torch files are loaded with ``weights_only=True``: code in them is never run. A state dict inside of
    a training checkpoint ("state_dict", "model", ...) is found, and the prefixes of DataParallel and
    torch.compile are taken off.

    Raises ArtifactError: no such file, truncated or foreign, pickled code or objects, no tensors, or
    NaN or infinite weights (the tensor is named).
    """
    path = Path(path)
    if not path.is_file():
        raise ArtifactError(f"checkpoint {str(path)!r}: no such file")
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    tensors = _unwrap(content, path)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ArtifactError(f"checkpoint {str(path)!r}: tensor {name!r} holds NaN or infinite values")
    return tensors


def _read_safetensors(path: Path) -> object:
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise ArtifactError(
            f"checkpoint {str(path)!r}: truncated or not a safetensors file ({_line(error)})"
        ) from error


def _read_torch(path: Path) -> object:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about unusual pickles, which are refused right below
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if zipfile.is_zipfile(path) or "Unsupported global" in str(error) or "GLOBAL" in str(error):
            raise ArtifactError(
                f"checkpoint {str(path)!r}: holds pickled code or objects, which is refused; "
                "save model.state_dict() alone, best as .safetensors"
            ) from error
        raise ArtifactError(f"checkpoint {str(path)!r}: not a torch checkpoint") from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, AttributeError) as error:
        raise ArtifactError(
            f"checkpoint {str(path)!r}: truncated or not a torch checkpoint ({_line(error)})"
        ) from error


def _unwrap(content: object, path: Path) -> dict[str, Tensor]:
    """The state dict inside of what a file held, without wrapper prefixes."""
    for key in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping) or not content:
        raise ArtifactError(f"checkpoint {str(path)!r}: holds no state dict")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ArtifactError(
                f"checkpoint {str(path)!r}: holds no state dict ({name!r} is a {type(value).__name__})"
            )
    tensors = dict(content)
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    return tensors


def put_weights(model: nn.Module, tensors: Mapping[str, Tensor], source: str, *, head: bool = False) -> None:
    """Copy ``tensors`` into ``model`` in place; every parameter and buffer has to be there and to fit.

    ``source`` names the checkpoint in messages. With ``head``, tensors whose shape does not fit are left
    as initialised where they belong to the first or the last layer (other number of channels or classes).
    Raises ArtifactError naming missing, unexpected or misfitting tensors.
    """
    own = model.state_dict()
    # Files without batch-norm counters are common, and the counters change nothing.
    given = {n: t for n, t in tensors.items() if not n.endswith("num_batches_tracked")}
    wanted = {n: t for n, t in own.items() if not n.endswith("num_batches_tracked")}
    missing = [n for n in wanted if n not in given]
    foreign = [n for n in given if n not in wanted]
    if missing or foreign:
        parts = [_listed("missing", missing), _listed("unexpected", foreign)]
        hint = near_miss(missing[0], foreign) if missing and foreign else ""
        raise ArtifactError(f"{source} does not fit the model: {'; '.join(p for p in parts if p)}{hint}")
    free = _ends(model) if head else set()
    for name in [n for n in wanted if given[n].shape != wanted[n].shape]:
        if name not in free:
            raise ArtifactError(
                f"{source} does not fit the model: {name!r} has shape {tuple(given[name].shape)}, "
                f"the model needs {tuple(wanted[name].shape)}"
            )
        del given[name]
    model.load_state_dict(given, strict=False)


def _ends(model: nn.Module) -> set[str]:
    """Names of the tensors of the first and the last layer with weights."""
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    ends = [layers[0], layers[-1]] if layers else []
    return {f"{name}.{key}" for name, layer in ends for key, _ in layer.named_parameters()}


def _listed(what: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{what} {', '.join(repr(n) for n in names[:3])}{more}"


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:160] if lines else type(error).__name__
