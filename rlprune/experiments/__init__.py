"""What the commands do, one verb a file.

The names of :data:`__all__` load when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..utils.lazy import lazy_names

if TYPE_CHECKING:
    from . import fidelity, fidelity_table, tuning_start
    from .apply import refined
    from .build import build_workload
    from .choice import choose
    from .formats import Export, Written
    from .methods import MethodResult, finalists, run_agent, score_rule
    from .prepare import Experiment, prepare_experiment
    from .result import PruningResult
    from .workers import working

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "Experiment": "prepare",
        "Export": "formats",
        "Written": "formats",
        "MethodResult": "methods",
        "PruningResult": "result",
        "build_workload": "build",
        "choose": "choice",
        "finalists": "methods",
        "prepare_experiment": "prepare",
        "refined": "apply",
        "run_agent": "methods",
        "score_rule": "methods",
        "working": "workers",
    },
    modules=("fidelity", "fidelity_table", "tuning_start"),
)

__all__ = [
    "Experiment",
    "Export",
    "MethodResult",
    "PruningResult",
    "Written",
    "build_workload",
    "choose",
    "fidelity",
    "fidelity_table",
    "finalists",
    "prepare_experiment",
    "refined",
    "run_agent",
    "score_rule",
    "tuning_start",
    "working",
]
