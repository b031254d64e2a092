"""Image folders, decoded once: the uint8 tensors are kept in the cache folder as safetensors."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import ArtifactError, ConfigError, DataError
from ..utils.files import read_tensors, write_tensors_atomic
from .image_files import UndecodableImage, open_image

_EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp", ".gif")
# Up to here a folder is decoded whole, so that one cache file serves every choice of splits.
_WHOLE_BYTES = 1 << 30
_MOST_BYTES = 16 << 30
_DECODING = 2  # part of every cache key: raise it when a file would be decoded to other pixels


class DataWarning(UserWarning):
    """The data can be used, but not all of it, or not for all that it is for."""


class Decoded(NamedTuple):
    """Images (n, 3, size, size) uint8, labels (n,), and the files that were met and cannot be decoded."""

    images: Tensor
    labels: Tensor
    broken: list[Path]


@dataclass(frozen=True)
class FolderSource:
    """The files of an image folder in sorted order, their labels (N,), and how to decode them.

    ``shorter`` is what the shorter side is scaled to before the centre of ``size`` is cut out (None for ``size``);
    without ``resize`` every image has to have the size.
    """

    root: Path
    files: tuple[str, ...]
    labels: Tensor
    classes: tuple[str, ...]
    size: int
    resize: bool
    cache: Path
    shorter: int | None = None

    def decode(self, index: Tensor) -> Decoded:
        """The files at ``index`` (n,), without those that cannot be decoded."""
        image_bytes = 3 * self.size * self.size
        if len(self.files) * image_bytes <= _WHOLE_BYTES:
            every = range(len(self.files))
            images, whole = self._cached(every)
            broken = self._broken(every, whole)
            place = torch.full((len(self.files),), -1)
            place[whole] = torch.arange(len(images))
            images = images[place[index][place[index] >= 0]]
            whole = whole[index]
        elif len(index) * image_bytes > _MOST_BYTES:
            raise DataError(
                f"{self.root}: {len(index)} images of {self.size}x{self.size} do not fit into memory; "
                f"set data.train below {_MOST_BYTES // image_bytes}, or a smaller data.image_size"
            )
        else:
            images, whole = self._cached(index.tolist())
            broken = self._broken(index.tolist(), whole)
        return Decoded(images, self.labels[index[whole]], broken)

    def _broken(self, index: Sequence[int], whole: Tensor) -> list[Path]:
        return [self.root / self.files[i] for i, good in zip(index, whole.tolist(), strict=True) if not good]

    def _cached(self, index: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Images of the files that can be decoded, and which of ``index`` they are (a mask)."""
        key = hashlib.sha256(
            f"{_DECODING} {self.root.resolve()} {self.size} {self.resize} {self.shorter}".encode()
        )
        for i in index:
            with contextlib.suppress(OSError):  # a link that leads nowhere is named when it is decoded
                status = os.stat(self.root / self.files[i])
                key.update(f"{status.st_size} {status.st_mtime_ns} ".encode())
            key.update(f"{self.files[i]}\n".encode(errors="surrogateescape"))
        path = self.cache / f"{key.hexdigest()[:32]}.safetensors"
        try:
            kept = read_tensors(path)
            images, whole = kept["images"], kept["whole"]
            if any(is_whole(path) for path in self._broken(index, whole)):  # it could not be read then
                raise KeyError(path)
        except (ArtifactError, KeyError):  # none, or a broken one that is replaced
            images, whole = self._decoded(index)
            with contextlib.suppress(ArtifactError):  # without a cache it works too, only slower
                write_tensors_atomic(path, {"images": images, "whole": whole})
        return images, whole

    def _decoded(self, index: Sequence[int]) -> tuple[Tensor, Tensor]:
        images, whole = [], []
        for i in index:
            try:
                images.append(self._image(self.files[i]))
                whole.append(True)
            except UndecodableImage:
                whole.append(False)
        none = np.zeros((0, 3, self.size, self.size), np.uint8)
        return torch.from_numpy(np.stack(images) if images else none), torch.tensor(whole)

    def _image(self, file: str) -> np.ndarray:
        """One image, (3, size, size) uint8: its shorter side scaled, the centre cut out."""
        image = open_image(self.root / file)
        width, height = image.size
        if not self.resize and (width, height) != (self.size, self.size):
            raise DataError(
                f"{self.root / file}: {width}x{height} pixels where the first image has "
                f"{self.size}x{self.size}; set data.image_size"
            )
        if (width, height) != (self.size, self.size) or self.shorter is not None:
            scale = (self.shorter or self.size) / min(width, height)
            width, height = max(self.size, round(width * scale)), max(self.size, round(height * scale))
            left, top = (width - self.size) // 2, (height - self.size) // 2
            image = image.resize((width, height), 2)  # 2 is PIL's bilinear, which antialiases
            image = image.crop((left, top, left + self.size, top + self.size))
        return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def is_whole(path: Path) -> bool:
    """Whether an image can be decoded."""
    try:
        open_image(path)
    except UndecodableImage:
        return False
    return True


def listed(names: Sequence[str]) -> str:
    """The first names, and how many more."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


def read_folder(
    root: Path, image_size: int | None, cache: Path, *, shorter: int | None = None
) -> FolderSource:
    """List ``root``/<class>/**; the decoding waits until the splits are known.

    Links to folders are followed; hidden files and folders (``.ipynb_checkpoints``, ``._a.jpg``) are not images.

    Raises DataError: no class folders, a class without images, no image that can be decoded, images that are not
    square and no ``image_size``; ConfigError: a ``shorter`` side below ``image_size``, or without it.
    """
    if shorter is not None and (image_size is None or shorter < image_size):
        raise ConfigError(
            f"data.resize: must be at least data.image_size, {image_size}, which is cut out of it, got {shorter}"
        )
    classes = _classes(root)
    files: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = sorted(str(p.relative_to(root)) for p in _images(root / name))
        if not found:
            raise DataError(f"{root / name}: the class has no images ({', '.join(_EXTENSIONS)})")
        files += found
        labels += [label] * len(found)
    if len(classes) < 2:
        raise DataError(f"{root}: needs at least two folders <class>/ with images, found {len(classes)}")
    size = _first_size(root, files) if image_size is None else image_size
    return FolderSource(
        root,
        tuple(files),
        torch.tensor(labels),
        tuple(classes),
        size,
        image_size is not None,
        cache,
        shorter,
    )


def _classes(root: Path) -> list[str]:
    try:
        return sorted(e.name for e in os.scandir(root) if e.is_dir() and not _hidden(e.name))
    except OSError as error:
        raise DataError(f"{root}: cannot be listed ({error.strerror})") from error


def _images(folder: Path) -> Iterator[Path]:
    """All files below a folder that are named as images; each folder once, however many links lead to it."""
    seen = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not _hidden(name))
        for name in names:
            path = Path(place, name)
            if (
                path.suffix.lower() in _EXTENSIONS
                and not _hidden(name)
                and (path.is_file() or path.is_symlink())
            ):
                yield path


def _hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _first_size(root: Path, files: Sequence[str]) -> int:
    """The side of the first image that can be decoded."""
    for file in files:
        try:
            width, height = open_image(root / file).size
        except UndecodableImage:
            continue  # named with all others when they are decoded
        if width != height:
            raise DataError(f"{root / file}: {width}x{height} is not square; set data.image_size")
        return width
    raise DataError(f"{root}: none of {len(files)} images can be decoded; the first is {files[0]}")
