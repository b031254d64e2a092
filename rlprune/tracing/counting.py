"""What torch's FLOP counter counts: the one place where it is called."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


@contextmanager
def without_fused_kernels() -> Iterator[None]:
    """Attention and recurrent layers as plain matrix products: fused ones escape whoever counts or follows operations.

    Kernels of the CPU for attention do so without gradients always, and in some versions of torch (2.14) with them;
    oneDNN's recurrent layers do in float32 only, so that a count would depend on the number format; the fast
    path of torch's transformer layers does without gradients.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    with ExitStack() as stack:
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about Intel GPUs, which are none of our business
            stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        yield


@contextmanager
def flop_counter() -> Iterator[FlopCounterMode]:
    """Count the floating-point operations of what runs inside, two for each multiply-add."""
    with without_fused_kernels(), torch.enable_grad(), FlopCounterMode(display=False) as counter:
        yield counter
