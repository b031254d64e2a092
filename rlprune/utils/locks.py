"""Operating-system locks on open files: a process that dies releases them."""

from __future__ import annotations

import os

try:
    import fcntl
except ImportError:  # Windows
    FOLDERS = False
else:
    FOLDERS = True
"""Whether a folder can be locked as a file can."""


def take_lock(handle: int) -> bool:
    """Whether this process now holds the lock of an open file."""
    if not FOLDERS:  # byte 100, so that a number at the start stays readable
        import msvcrt

        os.lseek(handle, 100, os.SEEK_SET)
        try:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        except OSError:
            return False
        os.lseek(handle, 0, os.SEEK_SET)
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
