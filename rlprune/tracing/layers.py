"""Layers of our own that the tracer understands: they move channels in a way no library operator describes."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class ChannelPad(nn.Module):
    """Put zero channels around the channels of a feature map.

    The parameter-free (option A) shortcut of the CIFAR ResNets widens the residual stream this way
    (He et al. 2015, arXiv 1512.03385, section 4.2). Channel ``i`` of the input becomes channel
    ``before + i`` of the output, so surgery has to change ``before`` and ``after`` as well.

    Shapes: (N, C, H, W) -> (N, before + C + after, H, W).
    """

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.before = before
        self.after = after

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x, (0, 0, 0, 0, self.before, self.after))

    def extra_repr(self) -> str:
        return f"before={self.before}, after={self.after}"
