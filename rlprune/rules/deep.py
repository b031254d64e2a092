"""Prune late layers more (a hand rule of AMC)."""

from __future__ import annotations

import numpy as np

from ..utils.arrays import Floats
from .context import Context, rule


@rule("late layers more")
def deep(context: Context) -> Floats:
    """AMC's hand rule "deep" (He et al. 2018, arXiv 1802.03494, table 1): prune the late layers hard.

    The paper gives no formula; here the share rises linearly with the depth of the group's first
    producing layer, from 0.1 at the input to 1 at the output.
    """
    return np.array([0.1 + 0.9 * g.depth for g in context.space.groups])
