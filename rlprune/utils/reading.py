"""Reading what anybody may have written: plain files only, JSON of bounded size, no links out of an rlprune folder."""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import ArtifactError, one_line

MAX_JSON_BYTES = 256 * 2**20
_DIGITS = 100  # of a whole number: more would not fit a float


def read_json(path: str | Path) -> Any:
    """The value in a JSON file; ArtifactError when it is missing, truncated or not JSON."""
    source = Path(path)
    try:
        return parse_json(read_bytes(source), constant=_no_constant)
    except ValueError as error:
        raise ArtifactError(f"{source}: truncated or not JSON ({one_line(error)})") from error


def parse_json(text: bytes, constant: Callable[[str], object] | None = None) -> Any:
    """The value of a JSON text; ValueError for whatever is wrong with it, deep nesting and endless numbers included.

    Args:
        constant: gives the value of NaN, Infinity and -Infinity; the floats by default.
    """
    try:
        return json.loads(
            text.decode("utf-8"), parse_constant=constant, parse_float=_finite, parse_int=_whole
        )
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_bytes(path: str | Path, most: int = MAX_JSON_BYTES) -> bytes:
    """The content of a file; ArtifactError where there is none, it is no plain file, or it is over ``most`` bytes.

    A pipe or a device is not opened: reading one may never end.
    """
    source = Path(path)
    try:
        facts = source.stat()
        if not stat.S_ISREG(facts.st_mode):
            raise ArtifactError(f"{source}: is a {_kind(facts.st_mode)}, where a file is to be read")
        if facts.st_size > most:
            raise ArtifactError(f"{source}: too large ({facts.st_size:,} bytes; at most {most:,} are read)")
        return source.read_bytes()
    except FileNotFoundError as error:
        raise ArtifactError(f"{source}: no such file") from error
    except OSError as error:
        raise ArtifactError(f"{source}: cannot be read ({error.strerror or error})") from error


def special_kind(path: Path) -> str | None:
    """What stands at a path, such as "pipe", where it is neither a file nor a folder nor nothing: reading it may never
    end."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return None
    return None if stat.S_ISREG(mode) or stat.S_ISDIR(mode) else _kind(mode)


def refuse_special(path: Path) -> None:
    """ArtifactError where something that is no plain file stands where one is to be written.

    What is written through a symbolic link lands wherever the link leads.
    """
    try:
        mode = path.lstat().st_mode
    except (OSError, ValueError):
        return  # nothing is there; or writing says what is wrong
    if not stat.S_ISREG(mode):
        raise ArtifactError(
            f"{path}: is a {_kind(mode)}, where a file is to be written; remove it or choose another place"
        )


def refuse_links(folder: Path) -> None:
    """ArtifactError where a symbolic link in an rlprune folder leads out of it, or a file is not a regular one."""
    root = folder.resolve()
    for place, folders, names in os.walk(folder):
        for path in (Path(place) / name for name in sorted([*folders, *names])):
            mode = path.lstat().st_mode
            if stat.S_ISLNK(mode) and root not in path.resolve().parents:
                raise ArtifactError(
                    f"{path}: is a symbolic link that leads out of {folder}; remove it or choose another --out"
                )
            if not (stat.S_ISLNK(mode) or stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise ArtifactError(f"{path}: is a {_kind(mode)}; remove it or choose another --out")


def _kind(mode: int) -> str:
    kinds = {
        stat.S_IFLNK: "symbolic link",
        stat.S_IFDIR: "folder",
        stat.S_IFIFO: "pipe",
        stat.S_IFSOCK: "socket",
        stat.S_IFREG: "file",
    }
    return kinds.get(stat.S_IFMT(mode), "device")


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not allowed")


def _whole(text: str) -> int:
    if len(text) > _DIGITS:
        raise ValueError(f"{text[:20]}... is too large a number")
    return int(text)


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:20]} is too large a number")
    return number
