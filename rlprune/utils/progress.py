"""Who watches a run: a callback of yours, or bars on standard error; and the log file."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TextIO

from tqdm import tqdm

from .reading import refuse_special

logger = logging.getLogger("rlprune")


class SearchState(Protocol):
    """What is told of a running search."""

    @property
    def spent(self) -> int: ...
    @property
    def limit(self) -> int: ...
    @property
    def best_score(self) -> float: ...


@dataclass(frozen=True)
class ProgressEvent:
    """Something that is counted has moved on: ``done`` of ``total`` in a ``phase``, and what there is to say of it."""

    phase: str
    done: int
    total: int
    facts: str = ""


class Callback:
    """Who watches a run, and may end its search early.

    Override what you need: the three methods whose names begin with ``on_`` or ``should_``. The others are what rlprune
    reports through; every finished phase also goes to the log as a line.
    """

    _phase = ""

    def on_progress(self, event: ProgressEvent) -> None:
        """Called often while a phase runs, and once when it is done."""

    def on_note(self, text: str) -> None:
        """Called with a line of what has been found or done."""

    def should_stop(self) -> bool:
        """Asked before every evaluation. True ends the search: what it has found by then is finished and saved."""
        return False

    def on_close(self) -> None:
        """Called when a phase is over, whether it got to its end or not."""

    def note(self, text: str) -> None:
        """A line for the log, and for whoever watches."""
        logger.info(text)
        self.on_note(text)

    def training(self, phase: str, done: int, total: int, values: Mapping[str, float]) -> None:
        """Progress of one training (see ``recovery.finetune.fit``)."""
        self.status(phase, done, total, ", ".join(f"{name} {value:.4f}" for name, value in values.items()))

    def search(self, label: str) -> Callable[[SearchState], None]:
        """Progress of a search by an agent: evaluations and best score."""
        return lambda state: self.status(
            label, state.spent, state.limit, f"best score {state.best_score:.4f}"
        )

    def counting(self, label: str, total: int) -> Callable[[int], None]:
        """Progress of anything that is counted."""
        return lambda done: self.status(label, done, total)

    def status(self, phase: str, done: int, total: int, facts: str = "") -> None:
        """Progress of anything that is counted, with what is going on now."""
        if phase != self._phase:
            self.close()
            self._phase = phase
        self.on_progress(ProgressEvent(phase, done, total, facts))
        if done >= total:
            logger.info("%s: %d of %d %s", phase, done, total, facts)
            self.close()

    def close(self) -> None:
        """The phase is over."""
        self.on_close()
        self._phase = ""


class Console(Callback):
    """Bars on standard error, one a phase."""

    def __init__(self, visible: bool = True) -> None:
        self.visible = visible
        self._bar: tqdm[Any] | None = None

    def on_note(self, text: str) -> None:
        if self.visible:
            tqdm.write(text, file=_stderr())

    def on_progress(self, event: ProgressEvent) -> None:
        if self._bar is None and self.visible:
            # What was done before the bar appeared says nothing about the pace.
            self._bar = tqdm(
                total=event.total,
                initial=event.done,
                desc=event.phase,
                file=_stderr(),
                leave=True,
                dynamic_ncols=True,
            )
        if self._bar is not None:
            self._bar.set_postfix_str(event.facts, refresh=False)
            self._bar.update(event.done - self._bar.n)

    def on_close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def log_to(path: Path) -> logging.Handler:
    """Send rlprune's log to a file as well, appending; the caller removes the handler."""
    refuse_special(path)
    handler = logging.FileHandler(path, encoding="utf-8", delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    return handler


def _stderr() -> TextIO:
    import sys

    return sys.stderr
