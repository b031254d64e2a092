"""Memory that the C library and compiled kernels keep: returned, bounded, or settled before something is timed."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys

import torch

# Just below the 32 MiB at which glibc stops raising its threshold (mallopt(3): M_MMAP_THRESHOLD).
_LARGE_BLOCK = 31 * 2**20
# Numbers of mallopt(3).
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
# Compiled products that oneDNN, and torch's layer above it, keep: a candidate has fewer shapes.
_KERNELS = 64


def return_freed_memory() -> None:
    """Ask the C library to give freed blocks back to the system.

    After large tensors of many sizes glibc keeps hundreds of MiB that no tensor uses, and the next tensors
    come on top of them. Elsewhere than on Linux with glibc nothing happens.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another C library has no malloc_trim
            ctypes.CDLL(None).malloc_trim(0)


def settle_heap() -> None:
    """Bring the C library to where a process is that has freed a large tensor: before anything is timed.

    A young process gives every freed block of a megabyte back to the system, and the next forward pass pays for the
    same pages again; a layer alone may take twice its time, and which one does depends on what lies behind it on the
    heap. glibc raises its limit to the largest block that has been freed; blocks above 32 MiB do not count
    (mallopt(3)). Elsewhere the block is just allocated and freed.
    """
    torch.empty(_LARGE_BLOCK, dtype=torch.uint8)


def keep_large_blocks() -> None:
    """Let the C library keep freed blocks of any size for the next tensor of that size, from now on.

    glibc maps every block above 32 MiB anew, and the system clears its pages: an activation of 64 images at 112 x 112
    pixels is such a block, and one thread spends two thirds of a MobileNetV2's forward pass on them (measured, see
    docs/candidate-cost.md). Numbers that are computed do not change. What the environment says of the C library's
    allocator stays; elsewhere than on Linux with glibc nothing happens.
    """
    if sys.platform != "linux" or any(name.startswith("MALLOC_") for name in os.environ):
        return
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(_MMAP_MAX, 0)
        library.mallopt(_TRIM_THRESHOLD, -1)  # never


def bound_kernel_caches() -> None:
    """Keep fewer of the products that oneDNN compiles for each shape in bfloat16; before the first of them.

    By default a thousand of them are kept in two caches, and every candidate of a search brings dozens of new
    shapes: measured with torch 2.15, 0.8 MiB a shape, which is soon more than the model. Variables that are
    set already stay.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(_KERNELS))
