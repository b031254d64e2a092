"""Which cell comes next, and how long the rest will take."""

from __future__ import annotations

from collections.abc import Sequence

from ..rules import RULES
from .cells import DENSE, Cell


class Schedule:
    """Long cells first, so that no process works alone on a long one at the end.

    How long a cell takes is not known before one of its method is finished; until then an agent counts as
    longer than anything that has been measured, and a rule as shorter.
    """

    def __init__(self, jobs: int = 1) -> None:
        self.jobs = jobs
        self._seconds: dict[str, list[float]] = {}

    def took(self, cell: Cell, seconds: float) -> None:
        """A cell has been finished."""
        self._seconds.setdefault(cell.method, []).append(seconds)

    def take(self, left: Sequence[Cell]) -> Cell:
        """The longest of the cells that are left, the first of equals."""
        return max(left, key=lambda cell: (self._unknown_search(cell), self.estimate(cell)))

    def estimate(self, cell: Cell) -> float:
        """Seconds that a cell will take; a method without one finished counts as the mean of its like."""
        like = [name for name in self._seconds if _is_agent(name) == _is_agent(cell.method)]
        known = self._seconds.get(cell.method) or [s for name in like for s in self._seconds[name]]
        return sum(known) / len(known) if known else 0.0

    def time_left(self, left: Sequence[Cell]) -> str:
        """In words, to be put behind a progress line; nothing where there is nothing to go by."""
        seconds = sum(self.estimate(cell) for cell in left) / self.jobs
        if not left or not seconds:
            return ""
        if seconds < 90:
            return f"; about {seconds:.0f} s left"
        return (
            f"; about {seconds / 60:.0f} min left"
            if seconds < 5400
            else f"; about {seconds / 3600:.1f} h left"
        )

    def _unknown_search(self, cell: Cell) -> bool:
        return _is_agent(cell.method) and cell.method not in self._seconds


def _is_agent(name: str) -> bool:
    return name not in RULES and name != DENSE
