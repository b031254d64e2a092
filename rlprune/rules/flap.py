"""FLAP's allocations: standardised fluctuation scores in one pool or two, or shares that all layers have."""

from __future__ import annotations

import numpy as np

from ..language.calibration.grams import unit_consumers
from ..language.calibration.importance import FLAP_METRIC, fluctuation
from ..utils.arrays import Bools, Floats, Ints
from .blocks import of_kind, weights
from .context import Context, rule
from .threshold import least_share, mean_share, pooled_widths, threshold_distribution, widths_distribution

# Heads that the authors remove of 1,024 at half of the parameters, in scripts/ablation_metric_structure.sh.
_AL_MM_HEADS, _UL_MM_HEADS, _AT = 380 / 1024, 384 / 1024, 0.5


@rule(
    "FLAP: standardised fluctuation scores of all heads and neurons in one pool",
    needs_workload=True,
    wing="language",
)
def flap(context: Context) -> Floats:
    """FLAP's adaptive structure search (An et al. 2023, arXiv 2312.11983, equations 4 to 6): its structure AL-AM.

    The score of an input channel j of o_proj or down_proj is that of `prune.importance` where this is one of FLAP's
    metrics, and Var(X_j) * ||W_:j||^2 else; in attention squared (as
    in the authors' code); it is standardised within the layer, (s - mean) / std, averaged over the
    channels of a unit (a KV head with its query heads), and all units of the model are cut from the
    lowest up until the cost of what is left meets the budget.
    """
    return threshold_distribution(context, _scores(context))


@rule(
    "FLAP's structure AL-MM: a pool of all heads and a pool of all neurons",
    needs_workload=True,
    wing="language",
    on_request=True,
)
def flap_al_mm(context: Context) -> Floats:
    """FLAP's AL-MM (arXiv 2312.11983; lib/prune.py): scores as in `flap`, heads and neurons pooled each for themselves.

    The authors set the number of heads by hand, 380 of 1,024 at half of the parameters. Derived: 380 / 1,024 * p / 0.5
    of all KV heads at the share p; the neurons take the rest of the budget.
    """
    space, heads = context.space, of_kind(context.space, "attention") & context.active
    share = min(1.0, _AL_MM_HEADS * mean_share(context) / _AT)
    gone = round(share * float(space.widths[heads].sum()))
    widths = pooled_widths(context, _scores(context), heads, gone)
    return _neurons_take_the_rest(context, widths, pooled=True)


@rule(
    "FLAP's structure UL-MM: the same share of heads in all layers, and of neurons",
    needs_workload=True,
    wing="language",
    on_request=True,
)
def flap_ul_mm(context: Context) -> Floats:
    """FLAP's UL-MM (arXiv 2312.11983; lib/prune.py): every layer loses as many heads, and as many neurons.

    The authors set the number of heads by hand, 384 of 1,024 at half of the parameters. Derived: 384 / 1,024 * p / 0.5
    of the KV heads of each layer at the share p; the neurons take the rest of the budget. Their UL-UM, one share for
    both, is the rule `uniform`.
    """
    space, heads = context.space, of_kind(context.space, "attention") & context.active
    share = min(1.0, _UL_MM_HEADS * mean_share(context) / _AT)
    kept = space.widths - np.floor(share * space.widths + 1e-9).astype(np.int64)
    widths = np.where(heads, np.maximum(kept, space.minimums), space.widths)
    return _neurons_take_the_rest(context, widths, pooled=False)


def _neurons_take_the_rest(context: Context, widths: Ints, pooled: bool) -> Floats:
    """The distribution when the groups but the heads are cut further, until the budget is met."""
    space, metric = context.space, context.metric
    target = space.target(context.budget, metric)
    others: Bools = ~of_kind(space, "attention") & context.active
    scores = _scores(context) if pooled else []

    def widths_at(share: float) -> Ints:
        """Widths when this share of the neurons goes."""
        if pooled:
            cut = pooled_widths(context, scores, others, round(share * float(space.widths[others].sum())))
        else:
            cut = space.limits.floor(space.widths.astype(np.float64) * (1.0 - share))
        return np.where(others, np.maximum(cut, space.minimums), widths)

    return widths_distribution(space, least_share(space, metric, target, widths_at))


def _scores(context: Context) -> list[Floats]:
    """Standardised scores of the units, one array a group; zeros where a group has no consumer of its own."""
    metric = str(context.cached(FLAP_METRIC, lambda: "wifv"))
    return context.cached(f"flap {metric}", lambda: _standardised(context, metric))


def _standardised(context: Context, metric: str) -> list[Floats]:
    space = context.space
    of_columns = fluctuation(space, context.statistics(), metric)
    scores = [np.zeros(g.units) for g in space.groups]
    for consumer in unit_consumers(space):
        values = of_columns(consumer, weights(context, consumer))
        spread = values.std(ddof=1) if len(values) > 1 else 0.0
        standard = (values - values.mean()) / (spread if spread > 0 else 1.0)
        scores[consumer.group][consumer.place] = standard[consumer.columns].mean(axis=1)
    return scores
