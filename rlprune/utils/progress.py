"""What a person watches while a run works: one bar a phase on standard error, and a log file."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TextIO

from tqdm import tqdm

logger = logging.getLogger("rlprune")


class SearchState(Protocol):
    """How far a search is (see :class:`rlprune.agents.callbacks.Progress`)."""

    @property
    def spent(self) -> int: ...
    @property
    def limit(self) -> int: ...
    @property
    def best_score(self) -> float: ...


class Console:
    """Bars on standard error when ``visible``; every finished phase goes to the log as a line."""

    def __init__(self, visible: bool) -> None:
        self.visible = visible
        self._bar: tqdm[Any] | None = None
        self._phase = ""

    def note(self, text: str) -> None:
        """A line for the log, and for the person who watches."""
        logger.info(text)
        if self.visible:
            tqdm.write(text, file=_stderr())

    def training(self, phase: str, done: int, total: int, values: dict[str, float]) -> None:
        """Progress of one training (see ``recovery.finetune.fit``)."""
        facts = ", ".join(f"{name} {value:.4f}" for name, value in values.items())
        self._show(phase, done, total, facts)

    def search(self, label: str) -> Callable[[SearchState], None]:
        """Progress of a search by an agent: evaluations, best score, seconds left."""

        def show(state: SearchState) -> None:
            self._show(label, state.spent, state.limit, f"best score {state.best_score:.4f}")

        return show

    def counting(self, label: str, total: int) -> Callable[[int], None]:
        """Progress of anything that is counted."""
        return lambda done: self._show(label, done, total, "")

    def status(self, label: str, done: int, total: int, facts: str) -> None:
        """Progress of anything that is counted, with what is going on now."""
        self._show(label, done, total, facts)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        self._phase = ""

    def _show(self, phase: str, done: int, total: int, facts: str) -> None:
        if phase != self._phase:
            self.close()
            self._phase = phase
            if self.visible:
                # What was done before the bar appeared says nothing about the pace.
                self._bar = tqdm(
                    total=total, initial=done, desc=phase, file=_stderr(), leave=True, dynamic_ncols=True
                )
        if self._bar is not None:
            self._bar.set_postfix_str(facts, refresh=False)
            self._bar.update(done - self._bar.n)
        if done >= total:
            logger.info("%s: %d of %d %s", phase, done, total, facts)
            self.close()


def log_to(path: Path) -> logging.Handler:
    """Send rlprune's log to a file as well, appending; the caller removes the handler."""
    handler = logging.FileHandler(path, encoding="utf-8", delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    return handler


def _stderr() -> TextIO:
    import sys

    return sys.stderr
