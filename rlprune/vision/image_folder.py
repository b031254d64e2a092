"""Image folders, decoded once: the uint8 tensors are kept in the cache folder as safetensors."""

from __future__ import annotations

import contextlib
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import ArtifactError, DataError
from ..utils.files import read_tensors, write_tensors_atomic

_EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp")
# Up to here a folder is decoded whole, so that one cache file serves every choice of splits.
_WHOLE_BYTES = 1 << 30
_MOST_BYTES = 16 << 30


@dataclass(frozen=True)
class FolderSource:
    """The files of an image folder in sorted order, their labels (N,), and how to decode them."""

    root: Path
    files: tuple[str, ...]
    labels: Tensor
    classes: tuple[str, ...]
    size: int
    resize: bool
    cache: Path

    def decode(self, index: Tensor) -> Tensor:
        """Images (len(index), 3, size, size) uint8 of the files at ``index``."""
        image_bytes = 3 * self.size * self.size
        if len(self.files) * image_bytes <= _WHOLE_BYTES:
            return self._cached(range(len(self.files)))[index]
        if len(index) * image_bytes > _MOST_BYTES:
            raise DataError(
                f"{self.root}: {len(index)} images of {self.size}x{self.size} do not fit into memory; "
                f"set data.train below {_MOST_BYTES // image_bytes}, or a smaller data.image_size"
            )
        return self._cached(index.tolist())

    def _cached(self, index: range | list[int]) -> Tensor:
        key = hashlib.sha256(f"1 {self.root.resolve()} {self.size} {self.resize}".encode())
        for i in index:
            status = os.stat(self.root / self.files[i])
            key.update(f"{self.files[i]} {status.st_size} {status.st_mtime_ns}\n".encode())
        path = self.cache / f"{key.hexdigest()[:32]}.safetensors"
        with contextlib.suppress(ArtifactError, KeyError):  # none, or a broken one that is replaced
            return read_tensors(path)["images"]
        images = torch.from_numpy(np.stack([self._image(self.files[i]) for i in index]))
        with contextlib.suppress(ArtifactError):  # without a cache it works too, only slower
            write_tensors_atomic(path, {"images": images})
        return images

    def _image(self, file: str) -> np.ndarray:
        """One image, (3, size, size) uint8: its shorter side scaled to ``size``, the centre cut out."""
        image = open_image(self.root / file)
        width, height = image.size
        if not self.resize and (width, height) != (self.size, self.size):
            raise DataError(
                f"{self.root / file}: {width}x{height} pixels where the first image has "
                f"{self.size}x{self.size}; set data.image_size"
            )
        if (width, height) != (self.size, self.size):
            scale = self.size / min(width, height)
            width, height = max(self.size, round(width * scale)), max(self.size, round(height * scale))
            left, top = (width - self.size) // 2, (height - self.size) // 2
            image = image.resize((width, height), 2)  # 2 is PIL's bilinear, which antialiases
            image = image.crop((left, top, left + self.size, top + self.size))
        return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def open_image(path: Path):  # type: ignore[no-untyped-def]  # PIL is imported only where it is needed
    """Decode one image as RGB; raises DataError naming the file."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:
        raise DataError(f"{path}: cannot be decoded ({error})") from error


def read_folder(root: Path, image_size: int | None, cache: Path) -> FolderSource:
    """List ``root``/<class>/**; the decoding waits until the splits are known.

    Raises DataError: no class folders, a class without images, images that are not square and no
    ``image_size``.
    """
    classes = sorted(e.name for e in os.scandir(root) if e.is_dir() and not e.name.startswith("."))
    files: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = sorted(
            str(p.relative_to(root))
            for p in (root / name).rglob("*")
            if p.suffix.lower() in _EXTENSIONS and p.is_file()
        )
        if not found:
            raise DataError(f"{root / name}: the class has no images ({', '.join(_EXTENSIONS)})")
        files += found
        labels += [label] * len(found)
    if len(classes) < 2:
        raise DataError(f"{root}: needs at least two folders <class>/ with images, found {len(classes)}")
    size = image_size
    if size is None:
        width, height = open_image(root / files[0]).size
        if width != height:
            raise DataError(f"{root / files[0]}: {width}x{height} is not square; set data.image_size")
        size = width
    return FolderSource(
        root, tuple(files), torch.tensor(labels), tuple(classes), size, image_size is not None, cache
    )
