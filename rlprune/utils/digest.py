"""Hashes of tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor


def hash_tensors(update: Callable[[bytes], object], tensors: Mapping[str, Tensor]) -> None:
    """Let a hash take in names, formats, shapes and bytes of tensors."""
    for name, tensor in tensors.items():
        update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
