"""Erdos-Renyi-Kernel: small layers keep more."""

from __future__ import annotations

import numpy as np

from ..utils.arrays import Floats
from .context import Context, rule
from .threshold import scaled_distribution


@rule("Erdos-Renyi-Kernel: keep in inverse proportion to the layer's size")
def erk(context: Context) -> Floats:
    """Erdos-Renyi-Kernel densities (Evci et al. 2020, arXiv 1911.11134, section 3).

    A layer keeps the share ~ (c_in + c_out + k_h + k_w) / (c_in c_out k_h k_w), one factor for all layers.
    Carried over to groups: numerator and denominator are summed over the group's producing layers (the
    mean of their densities, weighted by parameters), the kept share is that of the units, it is held
    between the minimum and 1, and the factor is the one that meets the budget.
    """
    modules = dict(context.model.named_modules())
    ratios = []
    for group in context.space.groups:
        shapes = [
            tuple(weight.shape)
            for member in group.members
            if member.role == "out"
            and (weight := getattr(modules[member.module], "weight", None)) is not None
        ]
        shapes = shapes or [(group.width * group.unit, 1)]
        # A part that an earlier stage has dropped has no weights left.
        ratios.append(sum(sum(s) for s in shapes) / max(sum(float(np.prod(s)) for s in shapes), 1.0))
    ratio = np.array(ratios)
    # At t = 1 even the largest layer keeps everything.
    return scaled_distribution(context, lambda t: t / ratio.min() * ratio)
