"""What an agent sees of its account: evaluations it may spend, and the plans it starts from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from ..envs.task import Scored

Starts = Sequence[Sequence[Any]]


class Purse(Protocol):
    """An account as the agents see it (:class:`rlprune.evaluation.ledger.Account`)."""

    @property
    def limit(self) -> int: ...
    @property
    def left(self) -> int: ...
    @property
    def spent(self) -> int: ...
    @property
    def history(self) -> Sequence[Scored]: ...
    def evaluate(self, widths: Any) -> Any: ...
    def evaluate_staged(self, history: Any) -> Any: ...
    def evaluate_many(self, plans: Sequence[Any]) -> Any: ...
    @property
    def dropped(self) -> Any: ...
