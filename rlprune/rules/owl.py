"""OWL: blocks with more outliers keep more."""

from __future__ import annotations

import numpy as np

from ..language.calibration.grams import Consumer, unit_consumers
from ..utils.arrays import Floats
from .blocks import array, block_count, block_indices, per_group, weights
from .context import Context, rule
from .threshold import as_distribution, mean_share

MULTIPLE = 5.0
BAND = 0.08


@rule(
    "OWL: blocks with more outliers in |weight| * ||input|| keep more", needs_workload=True, wing="language"
)
def owl(context: Context) -> Floats:
    """Outlier-weighed layer-wise sparsity (Yin et al. 2023, arXiv 2310.05175, section 3.2).

    D of a block is the share of its |W_ij| ||X_j|| that lie above 5 times their mean. The kept shares are D
    stretched linearly to a width of 2 * 0.08 and moved so that the mean cut is the budget's p. Derived: the
    outliers are counted in o_proj and down_proj, the two layers of a block that lose input columns.
    """
    outliers = context.cached("owl", lambda: outlier_shares(context))
    return as_distribution(per_group(context.space, block_shares(outliers, mean_share(context))))


def block_shares(outliers: Floats, p: float) -> Floats:
    """Cut shares of the blocks, (B,), from their outlier shares: mean p, width of the band 2 * BAND."""
    span = float(np.ptp(outliers))
    kept = (outliers - outliers.min()) / span * 2 * BAND if span > 0 else np.zeros_like(outliers)
    cut: Floats = np.clip(p - (kept - kept.mean()), 0.0, 1.0)
    return cut


def outlier_shares(context: Context) -> Floats:
    """D of each block, (B,); blocks without a consumer get the mean of the others."""
    space, moments = context.space, context.statistics().inputs
    index = block_indices(space)
    consumers: dict[int, list[Consumer]] = {}
    for consumer in unit_consumers(space):
        consumers.setdefault(int(index[consumer.group]), []).append(consumer)
    shares = np.full(block_count(space), np.nan)
    for block, own in consumers.items():
        parts = []
        for consumer in own:
            norm = np.sqrt(array(moments[consumer.name].second))  # ||X_j|| up to the number of tokens
            parts.append((np.abs(weights(context, consumer)) * norm[:, None]).ravel())
        values = np.concatenate(parts)
        shares[block] = (values > MULTIPLE * values.mean()).mean()
    return np.where(np.isnan(shares), np.nanmean(shares), shares)
