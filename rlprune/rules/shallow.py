"""Prune early layers more (a hand rule of AMC)."""

from __future__ import annotations

import numpy as np

from ..utils.arrays import Floats
from .context import Context, rule


@rule("early layers more")
def shallow(context: Context) -> Floats:
    """AMC's hand rule "shallow" (He et al. 2018, arXiv 1802.03494, table 1): prune the early layers hard.

    The paper gives no formula; here the share falls linearly with the depth of the group's first
    producing layer, from 1 at the input to 0.1 at the output.
    """
    return np.array([1.0 - 0.9 * g.depth for g in context.space.groups])
