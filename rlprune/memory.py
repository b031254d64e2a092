"""What the C library does with freed memory."""

from __future__ import annotations

import contextlib
import ctypes
import sys


def return_freed_memory() -> None:
    """Ask the C library to give freed blocks back to the system.

    After large tensors of many sizes glibc keeps hundreds of MiB that no tensor uses, and the next tensors
    come on top of them. Elsewhere than on Linux with glibc nothing happens.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another C library has no malloc_trim
            ctypes.CDLL(None).malloc_trim(0)
