"""Tensors of large models on disk: safetensors files read tensor by tensor and written as a stream.

A model above a size is stored as several shards with an index, the layout of Hugging Face's checkpoints.
Nothing here holds more than one tensor at a time, so memory does not grow with the file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from ..errors import ArtifactError, ConfigError, near_miss, one_line
from ..utils.files import read_json, safetensors_header, write_json_atomic, writing
from ..utils.finite import all_finite
from .documents import PlanDocument

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_SHARD_SIZE = "5GB"
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
# Names of the number formats in a safetensors header.
_CODES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
    torch.bool: "BOOL",
}  # fmt: skip
_DTYPES = {code: dtype for dtype, code in _CODES.items()}


@dataclass(frozen=True)
class Entry:
    """What is known of a tensor before it is read: its shape and number format."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        count = 1
        for side in self.shape:
            count *= side
        return count * self.dtype.itemsize


class TensorFiles:
    """The tensors of a checkpoint folder: one ``model.safetensors``, or shards and their index.

    ``foreign`` says that rlprune wrote none of them. Opening it reads and checks the headers only. Raises
    ArtifactError for a missing, truncated or foreign file, and for an index that does not say what the shards hold.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.index: Path | None = None
        self.entries: dict[str, Entry] = {}
        self.file_of: dict[str, Path] = {}
        self.foreign = True
        for path, names in self._files().items():
            found, metadata = _headers(path)
            self.foreign &= "rlprune" not in metadata
            if names is not None:
                self._check_index(path, names, found)
            self.entries |= found
            self.file_of |= dict.fromkeys(found, path)

    def where(self, name: str) -> str:
        """The file that holds a tensor, as text for an error."""
        return str(self.file_of[name])

    def read(self, names: Sequence[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) on the CPU, each in memory of its own, file by file unless ``names`` gives an order."""
        with ExitStack() as stack:
            handles: dict[Path, Any] = {}
            for name in self.entries if names is None else names:
                path = self.file_of[name]
                if path not in handles:
                    try:
                        handles[path] = stack.enter_context(safetensors.safe_open(path, framework="pt"))
                    except (OSError, safetensors.SafetensorError) as error:
                        raise _unreadable(path, error) from error
                # A slice of a safetensors file is copied out of it, so the file may go while the tensor lives.
                yield name, handles[path].get_tensor(name).clone()

    def _files(self) -> dict[Path, set[str] | None]:
        """Each file with the tensors that the index puts there (None without an index)."""
        single, index = self.folder / WEIGHTS, self.folder / INDEX
        if single.is_file():
            return {single: None}
        if not index.is_file():
            raise ArtifactError(f"{single}: no such file")
        self.index = index
        document = read_json(index)
        places = document.get("weight_map") if isinstance(document, dict) else None
        if not isinstance(places, dict) or not places:
            raise ArtifactError(f"{index}: damaged: the field 'weight_map' is missing")
        files: dict[Path, set[str] | None] = {}
        for name, file in places.items():
            if not isinstance(file, str) or not re.fullmatch(r"[\w.-]+\.safetensors", file):
                raise ArtifactError(f"{index}: weight_map: {name!r} is in {file!r}, which is no file name")
            held = files.setdefault(self.folder / file, set())
            assert held is not None
            held.add(name)
        return files

    def _check_index(self, path: Path, listed: set[str], found: Mapping[str, Entry]) -> None:
        missing, foreign = sorted(listed - set(found)), sorted(set(found) - listed)
        if missing:
            raise ArtifactError(
                f"{path}: the tensor {missing[0]!r} is missing{near_miss(missing[0], foreign)}"
            )
        if foreign:
            raise ArtifactError(f"{path}: holds the tensor {foreign[0]!r}, which {INDEX} does not list there")


def parse_size(text: str | int, field: str = "max_shard_size") -> int:
    """Bytes of "5GB", "500MB", "2GiB" or a plain number; raises ConfigError naming the field."""
    match = re.fullmatch(r"\s*(\d+\.?\d*)\s*([a-zA-Z]*)\s*", str(text))
    if match is None or match[2].upper() not in _UNITS or float(match[1]) <= 0:
        raise ConfigError(f"{field}: {text!r} is not a size; write it as '5GB', '500MB' or in bytes")
    return max(1, int(float(match[1]) * _UNITS[match[2].upper()]))


def write_checkpoint(
    folder: Path,
    entries: Mapping[str, Entry],
    tensors: Callable[[Sequence[str]], Iterator[tuple[str, Tensor]]],
    max_shard_size: str | int = MAX_SHARD_SIZE,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a checkpoint into a new folder: one file, or shards and an index when it is above the size.

    Args:
        entries: name -> shape and number format, in the order of the file.
        tensors: gives (name, tensor) for a list of names, in that order; each is dropped after it is written.

    Raises ArtifactError when a file cannot be written or a tensor is not what ``entries`` says.
    """
    shards = split(entries, parse_size(max_shard_size))
    places: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = WEIGHTS if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_file(folder / file, {name: entries[name] for name in names}, tensors(names), metadata or {})
        places |= dict.fromkeys(names, file)
    if len(shards) > 1:
        total = sum(entry.nbytes for entry in entries.values())
        write_json_atomic(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": places})


def split(entries: Mapping[str, Entry], most: int) -> list[list[str]]:
    """Names in order, cut into shards of at most ``most`` bytes; a larger tensor gets a shard of its own."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, entry in entries.items():
        if shards[-1] and size + entry.nbytes > most:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += entry.nbytes
    return shards


def entry_of(tensor: Tensor) -> Entry:
    return Entry(tuple(tensor.shape), tensor.dtype)


def _write_file(
    path: Path,
    entries: Mapping[str, Entry],
    tensors: Iterator[tuple[str, Tensor]],
    metadata: Mapping[str, str],
) -> None:
    """One safetensors file: header and tensors."""
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    position = 0
    for name, entry in entries.items():
        if entry.dtype not in _CODES:
            raise ArtifactError(
                f"{path}: the tensor {name!r} has the number format {entry.dtype}, which is not stored"
            )
        ends = [position, position + entry.nbytes]
        header[name] = {"dtype": _CODES[entry.dtype], "shape": list(entry.shape), "data_offsets": ends}
        position = ends[1]
    with writing(path), path.open("wb") as file:
        file.write(safetensors_header(header))
        for (name, entry), (given, tensor) in zip(entries.items(), tensors, strict=True):
            if given != name or entry_of(tensor) != entry:
                raise ArtifactError(
                    f"{path}: {given!r} came with {entry_of(tensor)}, {name!r} with {entry} was due"
                )
            if entry.nbytes:
                plain = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
                file.write(plain.numpy().data)
        file.flush()
        os.fsync(file.fileno())


def _headers(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """Shapes and formats of a file's tensors, and its metadata; safetensors checks that the offsets fill the file."""
    if not path.is_file():
        raise ArtifactError(f"{path}: no such file")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            found = {}
            for name in file.offset_keys():
                part = file.get_slice(name)
                code = part.get_dtype()
                if code not in _DTYPES:
                    raise ArtifactError(f"{path}: the tensor {name!r} has the unknown number format {code!r}")
                found[name] = Entry(tuple(part.get_shape()), _DTYPES[code])
            return found, file.metadata() or {}
    except (OSError, safetensors.SafetensorError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> ArtifactError:
    return ArtifactError(f"{path}: truncated or not a safetensors file ({one_line(error)})")


def check_tensors(tensors: Mapping[str, Tensor], listed: Mapping[str, Sequence[int]], where: str) -> None:
    """The file holds exactly the tensors, of the shapes, that the JSON lists."""
    missing, foreign = sorted(set(listed) - set(tensors)), sorted(set(tensors) - set(listed))
    if missing:
        raise ArtifactError(f"{where}: the tensor {missing[0]!r} is missing{near_miss(missing[0], foreign)}")
    if foreign:
        raise ArtifactError(
            f"{where}: holds the tensor {foreign[0]!r}, which the JSON next to it does not list"
        )
    for name, tensor in tensors.items():
        if list(tensor.shape) != listed[name]:
            raise ArtifactError(
                f"{where}: {name!r} has shape {list(tensor.shape)}, the JSON says {listed[name]}"
            )


def check_roots(shapes: Mapping[str, Sequence[int]], document: PlanDocument, where: str) -> None:
    """The tensors' sizes are those that the groups' kept units give them."""
    # Of a group with lanes the file has as many units in each of them as its width says (`documents.read_plan`).
    groups = zip(document.get("groups", []), document.get("widths", []), strict=False)
    widths = {g["name"]: width if "lanes" in g else len(g["kept"]) for g, width in groups}
    for name, root in document.get("roots", {}).items():
        try:
            size, wanted = shapes[root["tensor"]][root["dim"]], root["per_unit"] * widths[name]
        except (KeyError, IndexError, TypeError) as error:
            raise ArtifactError(
                f"{where}: the JSON next to it is damaged (root of group {name!r})"
            ) from error
        if size != wanted:
            raise ArtifactError(
                f"{where}: {root['tensor']!r} has size {size}, but group {name!r} keeps {widths[name]} units"
            )


def refuse_nan(tensors: Mapping[str, Tensor], where: str) -> None:
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not all_finite(tensor):
            raise ArtifactError(f"{where}: the tensor {name!r} holds NaN or infinite values")
