"""LLM-Pruner's allocation on the feed-forward parts alone."""

from __future__ import annotations

import numpy as np

from ..utils.arrays import Floats
from .blocks import of_kind
from .context import Context, rule
from .llm_pruner import inside


@rule("LLM-Pruner's protected ends, feed-forward parts only", wing="language")
def llm_pruner_ffn(context: Context) -> Floats:
    """Uniform over the feed-forward parts between LLM-Pruner's protected ends (arXiv 2305.11627, section 4.1).

    Leaving attention whole is our variant of ``llm_pruner``; where feed-forward parts do not count it is the same.
    """
    share = inside(context) & of_kind(context.space, "ffn")
    return (share if share.any() else inside(context)).astype(np.float64)
