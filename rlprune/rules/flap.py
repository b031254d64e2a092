"""FLAP's global allocation: standardised fluctuation scores in one pool."""

from __future__ import annotations

import numpy as np

from ..language.calibration.grams import unit_consumers
from ..utils.arrays import Floats
from .blocks import array, weights
from .context import Context, rule
from .threshold import threshold_distribution


@rule(
    "FLAP: standardised fluctuation scores of all heads and neurons in one pool",
    needs_workload=True,
    wing="language",
)
def flap(context: Context) -> Floats:
    """FLAP's adaptive structure search (An et al. 2023, arXiv 2312.11983, equations 4 to 6).

    The score of an input channel j of o_proj or down_proj is Var(X_j) * ||W_:j||^2, in attention squared (as
    in the authors' code); it is standardised within the layer, (s - mean) / std, averaged over the
    channels of a unit (a KV head with its query heads), and all units of the model are cut from the
    lowest up until the cost of what is left meets the budget.
    """
    return threshold_distribution(context, context.cached("flap", lambda: _scores(context)))


def _scores(context: Context) -> list[Floats]:
    """Standardised scores of the units, one array a group; zeros where a group has no consumer of its own."""
    space, moments = context.space, context.statistics().inputs
    scores = [np.zeros(g.units) for g in space.groups]
    for consumer in unit_consumers(space):
        squares = (weights(context, consumer) ** 2).sum(axis=1)
        fluctuation = array(moments[consumer.name].variance) * squares
        if space.groups[consumer.group].kind == "attention":
            fluctuation = fluctuation**2
        spread = fluctuation.std(ddof=1) if len(fluctuation) > 1 else 0.0
        standard = (fluctuation - fluctuation.mean()) / (spread if spread > 0 else 1.0)
        scores[consumer.group][consumer.place] = standard[consumer.columns].mean(axis=1)
    return scores
