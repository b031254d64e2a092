"""The mathematics of pruning: groups, widths, costs, budgets, cuts.

The names of :data:`__all__` load when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..utils.lazy import lazy_names

if TYPE_CHECKING:
    from .cost_terms import NarrowSpaceWarning, ProtectedShare, layer_ratios
    from .plan import Plan, make_plan
    from .space import Group, PruningSpace
    from .surgery import masked, prune

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "Group": "space",
        "NarrowSpaceWarning": "cost_terms",
        "Plan": "plan",
        "ProtectedShare": "cost_terms",
        "PruningSpace": "space",
        "layer_ratios": "cost_terms",
        "make_plan": "plan",
        "masked": "surgery",
        "prune": "surgery",
    },
)

__all__ = [
    "Group",
    "NarrowSpaceWarning",
    "Plan",
    "ProtectedShare",
    "PruningSpace",
    "layer_ratios",
    "make_plan",
    "masked",
    "prune",
]
