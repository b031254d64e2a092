"""What a run recorded, as tables, plots and pages.

The names of :data:`__all__` load when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..utils.lazy import lazy_names

if TYPE_CHECKING:
    from . import comparison, plots
    from .comparison import SCORE_UNITS
    from .html import markdown_table
    from .results import read_results

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "SCORE_UNITS": "comparison",
        "markdown_table": "html",
        "read_results": "results",
    },
    modules=("comparison", "plots"),
)

__all__ = [
    "SCORE_UNITS",
    "comparison",
    "markdown_table",
    "plots",
    "read_results",
]
