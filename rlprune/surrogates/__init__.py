"""Models of the score, and what they propose to evaluate next.

The names of :data:`__all__` load when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..utils.lazy import lazy_names

if TYPE_CHECKING:
    from .composite import CompositeGP
    from .logit_gp import LogitGP, LogitProbes
    from .proposals import neighbours
    from .score_gp import ScoreGP

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "CompositeGP": "composite",
        "LogitGP": "logit_gp",
        "LogitProbes": "logit_gp",
        "ScoreGP": "score_gp",
        "neighbours": "proposals",
    },
)

__all__ = [
    "CompositeGP",
    "LogitGP",
    "LogitProbes",
    "ScoreGP",
    "neighbours",
]
