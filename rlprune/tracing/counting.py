"""What torch's FLOP counter counts: the one place where it is called."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


@contextmanager
def flop_counter() -> Iterator[FlopCounterMode]:
    """Count the floating-point operations of what runs inside, two for each multiply-add.

    Fused attention kernels of the CPU escape the counter: without gradients always, and in some versions of torch
    (2.14) with them. Attention therefore runs as plain matrix products here.
    """
    with FlopCounterMode(display=False) as counter, torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        yield counter
