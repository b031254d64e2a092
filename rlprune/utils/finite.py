"""Questions about the values of tensors."""

from __future__ import annotations

import torch
from torch import Tensor


def all_finite(tensor: Tensor) -> bool:
    """Whether a floating-point tensor of any shape holds neither NaN nor infinite values.

    By its extremes, which NaN passes through: ``torch.isfinite`` of the whole tensor makes several tables of its size,
    which for embeddings is the highest peak of loading a small language model.
    """
    if not tensor.numel():
        return True
    wide = tensor.float() if tensor.dtype.itemsize == 1 else tensor  # torch compares no numbers of 8 bits
    return bool(torch.isfinite(torch.stack(torch.aminmax(wide))).all())
