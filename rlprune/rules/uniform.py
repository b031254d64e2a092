"""The same share from every group."""

from __future__ import annotations

import numpy as np

from ..utils.arrays import Floats
from .context import Context, rule


@rule("the same share from every group")
def uniform(context: Context) -> Floats:
    """All ones: every group gives up the same share of its units.

    Groups that save nothing under the budget's metric, and a language model's hidden size, get none.
    """
    return np.ones(len(context.space.groups))
