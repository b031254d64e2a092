"""One global threshold over weight norms."""

from __future__ import annotations

import numpy as np

from ..importance import importance
from ..utils.arrays import Floats
from .context import Context, rule
from .threshold import threshold_distribution


@rule("one global threshold over the groups' normalised weight norms")
def global_magnitude(context: Context) -> Floats:
    """Global pruning by magnitude, as Torch-Pruning's ``global_pruning`` (DepGraph, arXiv 2301.12900).

    The score of a unit is the L2 norm of its producing weights, divided by the group's mean; the pooled
    scores get one threshold.
    """
    return threshold_distribution(context, normalised(importance.magnitude(context.model, context.space)))


def normalised(scores: importance.Scores) -> importance.Scores:
    """Each group's scores divided by their mean; a group of zeros stays zero."""
    means = [float(np.mean(s)) if len(s) else 0.0 for s in scores]
    return [s / m if m > 0 else s for s, m in zip(scores, means, strict=True)]
