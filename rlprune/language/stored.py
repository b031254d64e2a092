"""How a checkpoint holds its weights, and in which number format what is pruned from it is saved."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import safetensors
import torch
from torch import nn

from ..errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_GGUF_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_WEIGHTS = ("*.safetensors", "*.bin")


@dataclass(frozen=True)
class Stored:
    """The weights of a dense checkpoint on the disk.

    ``form``: their number format in the file's own words (``bfloat16``, ``Q4_1``). ``dtype``: the float that holds
    them without loss, or for quantised ones loses less than they have lost. ``size``: bytes.
    """

    path: Path
    form: str
    dtype: torch.dtype
    quantised: bool
    size: int

    def words(self) -> str:
        return f"{self.path.name}, {self.size / 1e6:,.1f} MB ({self.form})"


def stored_weights(place: str, file: str | None, config: PreTrainedConfig) -> Stored | None:
    """How the weights at a local place are stored; None for a hub id.

    Args:
        place: a folder, or a hub id.
        file: the GGUF file in it, if it is one.
        config: as it stands next to the weights, before they were loaded in another format.
    """
    folder = Path(place)
    if not folder.is_dir():
        return None
    if file is not None:
        return _gguf(folder / file)
    return stored_folder(folder, config.dtype)


def stored_folder(folder: Path, dtype: object) -> Stored:
    """How a folder's weights are stored, by the number format that its config names."""
    files = next((found for found in (list(folder.glob(pattern)) for pattern in _WEIGHTS) if found), [])
    kind = next((each for each in _FLOATS.values() if each == dtype), torch.float32)
    form = str(kind).removeprefix("torch.")
    return Stored(folder, form, kind, False, sum(path.stat().st_size for path in files))


def _gguf(path: Path) -> Stored:
    """A GGUF file by the type of most of its numbers."""
    import gguf

    counts: dict[str, int] = {}
    for tensor in gguf.GGUFReader(path).tensors:
        name = tensor.tensor_type.name
        counts[name] = counts.get(name, 0) + int(tensor.n_elements)
    form = max(counts, key=counts.__getitem__)
    quantised = form not in _GGUF_FLOATS
    # bfloat16 keeps three digits, more than 8 bits and a scale do.
    return Stored(path, form, _GGUF_FLOATS.get(form, torch.bfloat16), quantised, path.stat().st_size)


def saved_dtype(stored: Stored | None, model: nn.Module, wanted: str) -> torch.dtype:
    """The number format a pruned model is saved in by ``finish.dtype``.

    ``auto`` is the checkpoint's, never a wider one than the model is in; float16 gives way to bfloat16 where a number
    is too large for it.

    Raises ConfigError: float16 was asked for and cannot hold a number.
    """
    own = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    found = _FLOATS.get(wanted)
    if found is None:
        found = own if stored is None or own != torch.float32 else stored.dtype
    if found != torch.float16 or own == torch.float16:
        return found
    most = torch.finfo(torch.float16).max
    for name, parameter in model.named_parameters():
        if parameter.numel() and float(parameter.detach().abs().max()) > most:
            if wanted == "auto":
                return torch.bfloat16
            raise ConfigError(f"finish.dtype: float16 cannot hold {name!r}; use bfloat16 or float32")
    return found


def size_lines(stored: Stored | None, folder: Path) -> list[str]:
    """Size and format of the dense weights and of a pruned folder's; after a quantised file, the way back to one."""
    files = sorted(folder.glob("*.safetensors"))
    size, (form, count) = sum(path.stat().st_size for path in files), _floats(files)
    lines = [f"dense weights: {stored.words()}"] if stored is not None else []
    lines.append(f"pruned weights: {folder}, {size / 1e6:,.1f} MB ({form})")
    if stored is not None and stored.quantised:
        # Q8_0 takes 34 bytes for 32 numbers.
        lines.append(
            f"{stored.form} is not written again; 8 bits, about {count * 34 / 32 / 1e6:,.1f} MB, by: "
            f"rlprune export {shlex.quote(str(folder))} --to gguf --dtype q8_0"
        )
    return lines


def _floats(files: Sequence[Path]) -> tuple[str, int]:
    """The number format of most tensors in safetensors files, and how many numbers they hold."""
    counts: dict[str, int] = {}
    for path in files:
        with safetensors.safe_open(path, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118  (a handle, no dictionary)
                part = opened.get_slice(name)
                counts[part.get_dtype()] = counts.get(part.get_dtype(), 0) + math.prod(part.get_shape())
    form = max(counts, key=counts.__getitem__, default="")
    words = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
    return words.get(form, form), sum(counts.values())
