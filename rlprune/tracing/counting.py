"""What torch's FLOP counter counts: the one place where it is called."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..utils.pytrees import Inputs, batch_size, call


@contextmanager
def without_fused_kernels() -> Iterator[None]:
    """Attention and recurrent layers as plain matrix products: fused ones are invisible to tracing and FLOP counting.

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


def layer_macs(counter: FlopCounterMode, model: nn.Module, batch: int) -> dict[str, float]:
    """Multiply-accumulates that were counted, for one sample and by layer: the modules without children."""
    layers = {name for name, module in model.named_modules() if name and not any(module.children())}
    found = {}
    for path, operations in counter.get_flop_counts().items():
        name = path.partition(".")[2]  # the first word is the model's class
        if name in layers:
            found[name] = sum(operations.values()) / 2 / batch
    return found


def macs_of_layers(model: nn.Module, example_inputs: Inputs) -> dict[str, float]:
    """`layer_macs` of one forward pass."""
    with flop_counter() as counter:
        call(model, example_inputs)
    return layer_macs(counter, model, batch_size(example_inputs))


def wrong_layer(
    slim: Mapping[str, float], dense: Mapping[str, float], ratios: Mapping[str, float]
) -> str | None:
    """The first layer whose multiply-accumulates are not its share of the dense ones, or None.

    For models that do more or less work for the same input as their weights change, as detectors do with the boxes that
    they propose: ``dense`` is counted on the masked dense model, which proposes the boxes of the cut one.
    """
    for name, macs in dense.items():
        expected = macs * ratios.get(name, 1.0)
        if not math.isclose(slim.get(name, 0.0), expected, rel_tol=1e-9):
            return name
    return None
