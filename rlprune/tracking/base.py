"""What a tracker has to do, and the callback that drives any of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from ..utils.dotted import flat
from ..utils.progress import Callback, ProgressEvent, RunShare

# Fields of a row of results.json that are worth a summary's line.
_SUMMARY = (
    "score",
    "test",
    "test_loss",
    "test_finetuned",
    "test_loss_finetuned",
    "macs",
    "params",
    "evaluations",
)


class Tracker(Protocol):
    """A run in a tracker: made before the search, told of figures, ended with the result.

    Steps count the events of one phase (evaluations of a search, steps of a training) from its beginning.
    """

    def begin(self, name: str, settings: Mapping[str, object]) -> None:
        """A run of this name begins; ``settings`` by dotted name, plain values."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Figures by name, as ``ppo/best_score``; all of them finite."""

    def end(self, summary: Mapping[str, float], files: Sequence[Path]) -> None:
        """The run is complete: its figures as ``ppo/test_finetuned``, and files to keep (report.html, results.json)."""


class TrackingCallback(Callback):
    """A run of rlprune in a tracker: its settings, figures while it searches and trains, every row of the result.

    A run that is stopped is left open or marked by the tracker itself, when the process ends.
    """

    def __init__(self, tracker: Tracker) -> None:
        self.tracker = tracker

    def on_start(self, name: str, settings: Mapping[str, object]) -> None:
        """See :class:`Callback`."""
        self.tracker.begin(name, flat(dict(settings)))

    def on_progress(self, event: ProgressEvent) -> None:
        """See :class:`Callback`."""
        values = {f"{event.phase}/{name}": float(value) for name, value in event.values.items()}
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        if finite:
            self.tracker.log(finite, event.done)

    def on_result(self, folder: Path, results: Mapping[str, object]) -> None:
        """See :class:`Callback`."""
        rows = results["rows"]
        assert isinstance(rows, list)
        summary = {
            f"{row['method']}/{name}": float(row[name])
            for row in rows
            for name in _SUMMARY
            if isinstance(row.get(name), int | float)
        }
        files = [path for name in ("report.html", "results.json") if (path := folder / name).is_file()]
        self.tracker.end(summary, files)


class Together(Callback):
    """Several callbacks as one; the search ends early as soon as one of them wants it."""

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        self.callbacks = tuple(callbacks)

    def on_start(self, name: str, settings: Mapping[str, object]) -> None:
        """See :class:`Callback`."""
        for callback in self.callbacks:
            callback.on_start(name, settings)

    def on_stage(self, where: RunShare) -> None:
        """See :class:`Callback`."""
        for callback in self.callbacks:
            callback.on_stage(where)

    def on_progress(self, event: ProgressEvent) -> None:
        """See :class:`Callback`."""
        for callback in self.callbacks:
            callback.on_progress(event)

    def on_note(self, text: str) -> None:
        """See :class:`Callback`."""
        for callback in self.callbacks:
            callback.on_note(text)

    def should_stop(self) -> bool:
        """See :class:`Callback`."""
        answers = [callback.should_stop() for callback in self.callbacks]  # each is asked: some count
        return any(answers)

    def on_close(self) -> None:
        """See :class:`Callback`."""
        for callback in self.callbacks:
            callback.on_close()

    def on_result(self, folder: Path, results: Mapping[str, object]) -> None:
        """See :class:`Callback`."""
        for callback in self.callbacks:
            callback.on_result(folder, results)
