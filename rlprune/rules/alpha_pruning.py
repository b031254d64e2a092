"""AlphaPruning: blocks whose weight spectra have heavier tails keep more."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..utils.arrays import Floats
from .blocks import block_count, block_prefixes, per_group
from .context import Context, rule
from .threshold import as_distribution, mean_share

LOWEST, HIGHEST = 0.7, 1.3


@rule("AlphaPruning: blocks whose weight spectra have heavier tails keep more", wing="language")
def alpha_pruning(context: Context) -> Floats:
    """Allocation by heavy-tailed self-regularisation (Lu et al. 2024, arXiv 2410.10912, equations 2 and 3).

    The tail exponent of a weight matrix is Hill's estimate over the upper half of its n squared singular
    values, alpha = 1 + k / sum_{i=1..k} ln(l_{n-i+1} / l_{n-k}) with k = n/2; a block has the mean of its
    matrices. The exponents are mapped linearly to [0.7, 1.3] (light tails, little learned: cut more) and
    scaled so that the mean cut is the budget's p.
    """
    exponents = context.cached("alpha_pruning", lambda: block_exponents(context))
    factors = block_factors(exponents)
    shares = np.clip(mean_share(context) * factors / factors.mean(), 0.0, 1.0)
    return as_distribution(per_group(context.space, shares))


def block_factors(exponents: Floats) -> Floats:
    """The exponents of the blocks, (B,), mapped linearly to [LOWEST, HIGHEST]; all 1 where they are equal."""
    span = float(np.ptp(exponents))
    if span == 0:
        return np.ones_like(exponents)
    return LOWEST + (HIGHEST - LOWEST) * (exponents - exponents.min()) / span


def block_exponents(context: Context) -> Floats:
    """Mean tail exponent of each block's matrices, (B,); blocks without a group get the mean of the others."""
    found = np.full(block_count(context.space), np.nan)
    for block, prefix in block_prefixes(context.space).items():
        matrices = [
            matrix
            for n, p in context.model.named_parameters()
            if n.startswith(f"{prefix}.") and p.ndim in (2, 3)
            for matrix in (p.detach() if p.ndim == 3 else [p.detach()])  # experts lie in one tensor
        ]
        found[block] = np.mean([tail_exponent(m) for m in matrices])
    return np.where(np.isnan(found), np.nanmean(found), found)


def tail_exponent(matrix: Tensor) -> float:
    """Hill's estimate of the tail exponent of a matrix's squared singular values, with k = n/2 of them."""
    wide = matrix.float() if matrix.shape[0] <= matrix.shape[1] else matrix.float().T
    # The eigenvalues of the smaller Gram matrix are the squared singular values, at a fraction of the time.
    values = torch.linalg.eigvalsh((wide @ wide.T).double()).cpu().numpy()
    values = np.maximum(values, max(values[-1], 1e-300) * 1e-12)
    k = max(len(values) // 2, 1)
    base = values[max(len(values) - k - 1, 0)]
    logs = float(np.log(values[-k:] / base).sum())
    return 1.0 + k / max(logs, 1e-12)
