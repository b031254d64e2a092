"""What is on its way to a name: made next to it, locked while its process lives, removed once that one is dead.

A file or folder that is replaced as a whole lies next to its place while it is written. A kill leaves it there, and no
code of the killed process removes it: the next write to the same name does, and so does what takes the lock of
a run's folder. The lock of the operating system says whether the writer still lives; its number would not (numbers are
given anew, and a folder may be shared among machines).
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .locks import FOLDERS, take_lock

NEW, OLD = "new", "old"
# Nobody else calls a file so, not even one whose own name begins with a dot.
_NAME = re.compile(rf"\.(?P<target>.+)\.rlprune-(?P<kind>{NEW}|{OLD})-[a-z0-9_]{{8}}")
CONTENT = "content"
"""The name of a folder that was in the place, within the one that keeps it for the moment."""


@contextlib.contextmanager
def fresh_file(target: Path) -> Iterator[tuple[int, Path]]:
    """(handle, path) of an empty file next to ``target``; it is removed at the end where it still has that name."""
    sweep(target.parent, target.name)
    while True:
        handle, name = tempfile.mkstemp(prefix=_prefix(target, NEW), dir=target.parent)
        lock = os.dup(handle) if FOLDERS else None  # the lock is the open file's: it outlives the writing
        if lock is None or _held(lock):
            break
        os.close(handle)  # swept before it could be locked
    try:
        yield handle, Path(name)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    finally:
        if lock is not None:
            os.close(lock)


@contextlib.contextmanager
def fresh_folder(target: Path, kind: str = NEW) -> Iterator[Path]:
    """An empty folder next to ``target``; what is left of it at the end is removed."""
    if kind == NEW:
        sweep(target.parent, target.name)
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_prefix(target, kind), dir=target.parent))
        lock = os.open(folder, os.O_RDONLY) if FOLDERS else None
        if lock is None or _held(lock):
            break
    try:
        yield folder
    finally:
        try:
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            if lock is not None:
                os.close(lock)


def sweep(folder: Path, name: str | None = None) -> None:
    """Remove what dead processes have left in a folder on its way to ``name``, to any name for None.

    A folder that was moved out of its place for another one that never came is put back. What a living process writes
    stays, and so does everything where folders cannot be locked (Windows).
    """
    if not FOLDERS:
        return
    with contextlib.suppress(OSError):  # a folder that cannot be listed is for the writing to complain of
        for path in list(folder.iterdir()):
            known = _NAME.fullmatch(path.name)
            if known is not None and name in (None, known["target"]):
                _remove(path, folder / known["target"], known["kind"])


def sweep_below(folder: Path) -> None:
    """`sweep` for a folder and all that lie in it."""
    for place, _, _ in os.walk(folder):
        sweep(Path(place))


def _remove(path: Path, target: Path, kind: str) -> None:
    with contextlib.suppress(OSError):
        directory = path.is_dir() and not path.is_symlink()
        handle = os.open(path, os.O_RDONLY if directory else os.O_RDWR | os.O_NOFOLLOW)
        try:
            if not take_lock(handle):
                return
            if not directory:
                path.unlink()
                return
            if kind == OLD and (path / CONTENT).is_dir() and not os.path.lexists(target):
                os.rename(path / CONTENT, target)
            shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(handle)


def _held(lock: int) -> bool:
    """Lock what was just made; False where somebody has swept it away in between (and then the handle is closed)."""
    take_lock(lock)  # where the file system knows no locks, nobody sweeps either
    if os.fstat(lock).st_nlink:
        return True
    os.close(lock)
    return False


def _prefix(target: Path, kind: str) -> str:
    return f".{target.name}.rlprune-{kind}-"
