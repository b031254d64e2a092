"""Files that are whole or absent: atomic writes, checked reads, and the lock of a run's folder."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import safetensors
import safetensors.torch
from torch import Tensor

from ..errors import ArtifactError, RlpruneError, one_line
from .exits import is_exit
from .locks import take_lock
from .reading import read_json as read_json  # one place to read and write JSON from
from .reading import refuse_links, refuse_special
from .unfinished import CONTENT, OLD, fresh_file, fresh_folder, sweep_below

LOCK_NAME = ".rlprune.lock"


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what a failed write raises (disk full, no permission, a folder in the way) into an ArtifactError."""
    try:
        yield
    except (OSError, safetensors.SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else one_line(error)
        raise ArtifactError(f"{path}: cannot be written ({reason})") from error


@contextlib.contextmanager
def replacing_file(path: str | Path) -> Iterator[IO[bytes]]:
    """A fresh file to write into that takes the place of ``path`` when the block ends without an error.

    The path holds the old or the new content at every moment, a power cut included. What a kill leaves next to it is
    removed by the next write there.
    """
    target = Path(path)
    refuse_special(target)
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with fresh_file(target) as (handle, fresh):
            with os.fdopen(handle, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.chmod(fresh, 0o666 & ~_umask())
            os.replace(fresh, target)
        _sync_folder(target.parent)


@contextlib.contextmanager
def replacing_path(path: str | Path) -> Iterator[Path]:
    """`replacing_file` for libraries that open their files themselves: yields the path that they are to write."""
    target = Path(path)
    refuse_special(target)
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with fresh_folder(target) as folder:
            fresh = folder / target.name
            yield fresh
            _sync_file(fresh)
            os.replace(fresh, target)
        _sync_folder(target.parent)


def keep_foreign(target: Path, is_ours: Callable[[Path], bool], force: bool = False) -> None:
    """ArtifactError where a file would be replaced that rlprune did not write, and `--force` does not say so."""
    if target.is_dir():
        raise ArtifactError(f"{target}: is a folder, where a file is to be written")
    if os.path.lexists(target) and not force and not is_ours(target):
        raise ArtifactError(
            f"{target}: is there already and rlprune did not write it; choose another name, or give --force"
        )


def write_bytes_atomic(path: str | Path, data: bytes) -> None:
    """Write a file whole or not at all; ArtifactError when the disk refuses."""
    with replacing_file(path) as file:
        file.write(data)


def write_text_atomic(path: str | Path, text: str) -> None:
    """`write_bytes_atomic` for text, in UTF-8."""
    write_bytes_atomic(path, text.encode("utf-8", errors="replace"))


def finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values as JSON keeps them: it knows no NaN, so that a number that is not finite becomes null."""
    text = json.dumps(dict(values), default=float)
    parsed: dict[str, Any] = json.loads(text, parse_constant=lambda _: None)
    return parsed


def write_json_atomic(path: str | Path, value: object) -> None:
    """`write_bytes_atomic` for JSON. Raises ArtifactError for what JSON cannot hold, NaN included."""
    try:
        text = json.dumps(value, indent=1, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ArtifactError(f"{path}: cannot be written as JSON ({one_line(error)})") from error
    write_text_atomic(path, text + "\n")


def write_tensors_atomic(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """`write_bytes_atomic` for a safetensors file; tensors that share memory are stored once each.

    Equal tensors and metadata give equal bytes.
    """
    copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    data = safetensors.torch.save(copies, metadata)
    del copies
    # The library writes the metadata in the order of a hash table, another one in every process.
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    if metadata:
        header["__metadata__"] = dict(sorted(metadata.items()))
    with replacing_file(path) as file:
        file.write(safetensors_header(header))
        file.write(memoryview(data)[8 + size :])


def safetensors_header(header: Mapping[str, object]) -> bytes:
    """The head of a safetensors file: its length, then JSON (https://huggingface.co/docs/safetensors)."""
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # so that the numbers start at a multiple of eight bytes
    return len(text).to_bytes(8, "little") + text


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU; ArtifactError when it is missing, truncated or foreign."""
    source = Path(path)
    if not source.is_file():
        raise ArtifactError(f"{source}: no such file")
    try:
        # Read as bytes, not mapped: the file may be replaced while the tensors live.
        return safetensors.torch.load(source.read_bytes())
    except OSError as error:
        raise ArtifactError(f"{source}: cannot be read ({error.strerror or error})") from error
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise ArtifactError(f"{source}: truncated or not a safetensors file ({one_line(error)})") from error


def append_line(path: Path, text: str) -> None:
    """Add a line of text to a file and wait until it is on the disk; ArtifactError where it is no plain file."""
    refuse_special(path)
    with path.open("a", encoding="utf-8") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())


def whole_lines(path: Path) -> list[bytes]:
    """The lines of a file that `append_line` wrote; a last one that a kill has torn is cut off the file."""
    refuse_special(path)
    raw = path.read_bytes() if path.exists() else b""
    whole = raw[: raw.rfind(b"\n") + 1]
    if len(whole) < len(raw):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    return whole.splitlines()


@contextlib.contextmanager
def replacing_folder(folder: str | Path, marker: str) -> Iterator[Path]:
    """A fresh folder to write into that takes the place of ``folder`` when the block ends without an error.

    An existing folder is replaced only when it is empty or holds the file ``marker`` (which says that
    it is ours); anything else is an ArtifactError, and nothing is left behind by a failed write.
    """
    target = Path(folder)
    refuse_foreign(target, marker)
    # resolve: "." and "x/.." have no name of their own to put the new folder next to.
    target = target.resolve()
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with fresh_folder(target) as fresh:
            try:
                os.chmod(fresh, 0o777 & ~_umask())
                yield fresh
                for path in sorted(fresh.rglob("*")):
                    if path.is_file():
                        _sync_file(path)
                _sync_folder(fresh)
                _swap(fresh, target)
            except ArtifactError as error:
                # The person knows the folder that was asked for, not the one next to it.
                raise type(error)(str(error).replace(str(fresh), str(target))) from error


@contextlib.contextmanager
def lock_run(folder: str | Path, worth: str = "ledger.jsonl") -> Iterator[Path]:
    """Hold the folder of a run, made if it is missing; a second run into it is refused with ArtifactError.

    The lock is the operating system's, so a killed run leaves none. A folder with other people's files
    in it is refused as well. A new run that stops with an rlprune error (a wrong setting, say), or that code of the
    user's ends, before it has a file ``worth`` leaves nothing behind.
    """
    target = Path(folder)
    refuse_foreign(target, LOCK_NAME)
    made = not target.exists()
    with writing(target):
        target.mkdir(parents=True, exist_ok=True)
        refuse_links(target)
        new = not (target / LOCK_NAME).exists()
        handle = os.open(target / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if not take_lock(handle):
            owner = os.pread(handle, 32, 0).decode("ascii", "replace").strip()
            raise ArtifactError(
                f"{target}: another rlprune run is writing into this folder (process {owner or 'unknown'}); "
                "wait for it or choose another --out"
            )
        try:
            with writing(target / LOCK_NAME):
                os.ftruncate(handle, 0)
                os.write(handle, str(os.getpid()).encode())
            sweep_below(target)
            yield target
        except BaseException as error:
            if (isinstance(error, RlpruneError) or is_exit(error)) and new and not (target / worth).exists():
                _empty_folder(target, remove=made)
            raise
    finally:
        os.close(handle)


@contextlib.contextmanager
def exclusive(path: str | Path, poll_seconds: float = 0.2) -> Iterator[None]:
    """Hold a lock file, made if it is missing, while the block runs; waits while another process holds it."""
    target = Path(path)
    refuse_special(target)
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(target, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        while not take_lock(handle):
            time.sleep(poll_seconds)
        yield
    finally:
        os.close(handle)


def _empty_folder(folder: Path, remove: bool) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                path.unlink()
    if remove:
        with contextlib.suppress(OSError):
            folder.rmdir()


def refuse_foreign(target: Path, marker: str) -> None:
    """ArtifactError for a file, or a folder that holds something but no ``marker``, which says that it is ours."""
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise ArtifactError(f"{target}: is a file, where a folder is to be written")
    with writing(target):
        names = {path.name for path in target.iterdir()}
    if names and marker not in names:
        raise ArtifactError(
            f"{target}: holds files that rlprune did not write there (such as {min(names)!r}); "
            "choose an empty or new folder"
        )


def _swap(fresh: Path, target: Path) -> None:
    """Put a written folder in the place of an old one; the old one is removed last."""
    if not target.exists():
        os.rename(fresh, target)
    else:
        with fresh_folder(target, OLD) as old:
            os.rename(target, old / CONTENT)
            try:
                os.rename(fresh, target)
            except BaseException:
                os.rename(old / CONTENT, target)
                raise
    _sync_folder(target.parent)


def _sync_file(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Make a rename in a folder durable; some systems cannot open folders, and they need nothing."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
