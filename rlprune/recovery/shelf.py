"""Where matrices lie between two uses: in memory, or in a file on disk from which the rows that are wanted are read."""

from __future__ import annotations

import os
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from ..errors import ArtifactError
from ..utils.files import writing


class Shelf:
    """Matrices in memory, by their place."""

    def __init__(self) -> None:
        self._tensors: list[Tensor] = []

    def put(self, matrix: Tensor) -> int:
        """Keep a matrix (n, m); returns its place."""
        self._tensors.append(matrix)
        return len(self._tensors) - 1

    def rows(self, place: int, count: int) -> Tensor:
        """The first ``count`` rows of a matrix; a view, not to be written into."""
        return self._tensors[place][:count]

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return sum(t.nbytes for t in self._tensors)


@dataclass(frozen=True)
class _Place:
    """Where a matrix begins in the file, and what it is."""

    offset: int
    columns: int
    dtype: torch.dtype
    device: torch.device


class DiskShelf(Shelf):
    """Matrices in a file without a name: it is gone with the process, however that ends.

    A copy of the shelf in another process (pickle) has a file of its own.

    Args:
        folder: where the file lies; made where it is missing. A folder that is itself in memory (tmpfs) spares nothing.

    Raises:
        ArtifactError: the folder cannot be written.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self._folder = Path(folder)
        self._places: list[_Place] = []
        self._size = 0
        self._open()

    def _open(self) -> None:
        self._lock = threading.Lock()
        with writing(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            self._file: IO[bytes] = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115  (as long as the shelf)

    def put(self, matrix: Tensor) -> int:
        plain = matrix.detach().cpu().contiguous()
        with writing(self._folder), self._lock:
            self._file.seek(self._size)
            if plain.numel():  # an empty memory cannot be seen as bytes
                self._file.write(plain.numpy().data.cast("B"))
            self._file.flush()
        self._places.append(_Place(self._size, matrix.shape[1], matrix.dtype, matrix.device))
        self._size += plain.nbytes
        return len(self._places) - 1

    def rows(self, place: int, count: int) -> Tensor:
        where = self._places[place]
        found = torch.empty(count, where.columns, dtype=where.dtype)
        if found.numel():
            self._read(where.offset, found.numpy().data.cast("B"))
        return found.to(where.device)

    def _read(self, offset: int, into: memoryview) -> None:
        done = 0
        while done < len(into):
            if hasattr(os, "preadv"):  # processes that share the file share its position as well
                got = os.preadv(self._file.fileno(), [into[done:]], offset + done)
            else:
                with self._lock:
                    self._file.seek(offset + done)
                    got = self._file.readinto(into[done:])  # type: ignore[attr-defined]
            if not got:
                raise ArtifactError(f"recovery.spill: {self._folder}: what was written there is gone")
            done += got

    def __getstate__(self) -> dict[str, Any]:
        content = bytearray(self._size)
        if self._size:
            self._read(0, memoryview(content))
        return {"folder": self._folder, "places": self._places, "content": bytes(content)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        Shelf.__init__(self)
        self._folder, self._places = state["folder"], state["places"]
        self._size = len(state["content"])
        self._open()
        self._file.write(state["content"])
        self._file.flush()
