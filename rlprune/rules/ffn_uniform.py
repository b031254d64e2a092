"""The same share from every feed-forward part, attention left whole."""

from __future__ import annotations

import numpy as np

from ..utils.arrays import Floats
from .blocks import of_kind
from .context import Context, rule


@rule("the same share of neurons from every feed-forward part, attention whole", wing="language", alike="ffn")
def ffn_uniform(context: Context) -> Floats:
    """Uniform over the feed-forward neurons: a KV head costs far more loss than the same parameters of neurons.

    All parts of one width keep one width: stock transformers, vLLM and llama.cpp read the model without code of
    ours, and less than one step of all of them is left of the budget. Where feed-forward parts do not count
    (KV-cache budgets), or there are none, it is uniform over the rest.
    """
    share = of_kind(context.space, "ffn") & context.active
    return share.astype(np.float64) if share.any() else context.active.astype(np.float64)
