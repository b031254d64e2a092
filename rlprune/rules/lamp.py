"""LAMP: layer-adaptive scores and one global threshold."""

from __future__ import annotations

import numpy as np

from ..utils.arrays import Floats
from .context import Context, rule
from .threshold import threshold_distribution


@rule("LAMP: squared score over the sum of all larger ones, one global threshold")
def lamp(context: Context) -> Floats:
    """Layer-adaptive magnitude-based scores (Lee et al. 2021, arXiv 2010.07611, equation 3).

    The score of a weight is w^2 over the sum of the w^2 of the same layer that are not smaller. Carried
    over to groups: w is the importance of a unit, the layer is the group. The largest unit of every
    group has score 1, so no group is emptied.
    """
    return threshold_distribution(context, [_scores(np.asarray(s)) for s in context.importance])


def _scores(importance: Floats) -> Floats:
    """LAMP scores of one group in ascending order of importance, shape (width,)."""
    squares = np.sort(np.abs(importance).astype(np.float64)) ** 2
    not_smaller = np.cumsum(squares[::-1])[::-1]
    # Units without any importance have no larger company to be compared with: they go first.
    return np.divide(squares, not_smaller, out=np.zeros_like(squares), where=not_smaller > 0)
