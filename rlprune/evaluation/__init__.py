"""From a plan to a built, recovered and scored candidate, and who is charged for it.

The names of :data:`__all__` load when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..utils.lazy import lazy_names

if TYPE_CHECKING:
    from .candidate import Candidate
    from .evaluator import Evaluator
    from .importance import compute
    from .ledger import BudgetExhausted, EvaluationBudget, EvaluationLog
    from .parallel import Workers, workers_of
    from .recovery import Recovery

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "BudgetExhausted": "ledger",
        "Candidate": "candidate",
        "EvaluationBudget": "ledger",
        "EvaluationLog": "ledger",
        "Evaluator": "evaluator",
        "Recovery": "recovery",
        "Workers": "parallel",
        "compute": "importance",
        "workers_of": "parallel",
    },
)

__all__ = [
    "BudgetExhausted",
    "Candidate",
    "EvaluationBudget",
    "EvaluationLog",
    "Evaluator",
    "Recovery",
    "Workers",
    "compute",
    "workers_of",
]
