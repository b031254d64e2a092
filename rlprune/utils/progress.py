"""Progress of a run: callbacks, bars on a terminal or lines in a log; and the log file."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TextIO

from tqdm import tqdm

from ..errors import ConfigError, near_miss
from .reading import refuse_special

logger = logging.getLogger("rlprune")

SHOWN = ("auto", "bar", "lines", "none")
"""How progress is shown: `auto` is bars on a terminal and lines elsewhere."""
VARIABLE = "RLPRUNE_PROGRESS"
LINE_SECONDS = 20.0
"""Seconds between two lines of one phase."""
_CHOSEN: ContextVar[str | None] = ContextVar("progress", default=None)


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
    run: RunShare | None = None
    """Where the whole run is; None where nobody has said what it consists of."""
    values: Mapping[str, float] = field(default_factory=dict)
    """The figures among the facts: ``best_score`` of a search, losses of a training."""


@dataclass(frozen=True)
class RunShare:
    """Where a run is: in stage ``number`` (from 1) of ``stages``, ``share`` of it done, about ``seconds_left`` to go.

    Both are estimates, from the work that the stages were said to hold and the pace so far; None before there is one.
    """

    stage: str
    number: int
    stages: int
    share: float | None = None
    seconds_left: float | None = None

    @property
    def place(self) -> str:
        """The stage in words: ``[2/4] rules``."""
        return f"[{self.number}/{self.stages}] {self.stage}"

    def __str__(self) -> str:
        if self.share is None:
            return ""
        left = "" if self.seconds_left is None else f", about {span(self.seconds_left)} left"
        return f"run {self.share:.0%}{left}"


def span(seconds: float) -> str:
    """Seconds in words: ``40 s``, ``3 min``, ``2 h 5 min``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


@dataclass
class _Run:
    """The stages of a run, the work that each holds, and what has been seen of them."""

    work: Mapping[str, float]
    stage: str = ""
    part: tuple[int, int] = (0, 1)
    _started: float = 0.0
    _at_start: float = 0.0
    _seen: dict[str, tuple[float, float]] = field(
        default_factory=dict
    )  # stage -> (seconds, work) of its pace

    def enter(self, stage: str, part: int, parts: int) -> None:
        if stage != self.stage:
            self.stage, self._started, self._at_start = stage, _now(), -1.0
        self.part = part, parts

    def at(self, done: int, total: int) -> RunShare:
        """Where the run is with ``done`` of ``total`` of the current part."""
        names = list(self.work)
        part, parts = self.part
        mine = self.work[self.stage] * (part + (done / total if total else 1.0)) / parts
        if self._at_start < 0:
            resumed = part == 0 and done > 1  # what was there before says nothing about the pace
            self._at_start = mine if resumed else 0.0
            self._started = _now() if resumed else self._started
        self._seen[self.stage] = _now() - self._started, mine - self._at_start
        number = names.index(self.stage)
        spent = sum(self.work[name] for name in names[:number]) + mine
        left = self._left(mine, sum(self.work[name] for name in names[number + 1 :]))
        return RunShare(self.stage, number + 1, len(names), spent / sum(self.work.values()), left)

    def _left(self, mine: float, later: float) -> float | None:
        """Seconds to go: the rest of this stage by its own pace, later ones by that of all stages with a pace."""
        seconds, work = self._seen[self.stage]
        if work <= 0 or seconds <= 0:
            return None
        every = [pair for pair in self._seen.values() if pair[1] > 0]
        pace = sum(s for s, _ in every) / sum(w for _, w in every)
        return (self.work[self.stage] - mine) * seconds / work + later * pace


class Callback:
    """Who watches a run, and may end its search early.

    Override what you need: the methods whose names begin with ``on_`` or ``should_``. The others are what rlprune
    reports through; every finished phase also goes to the log as a line.
    """

    _phase = ""
    _run: _Run | None = None

    def on_start(self, name: str, settings: Mapping[str, object]) -> None:
        """Called once when a run begins, with its name and all its settings, nested."""

    def on_result(self, folder: Path, results: Mapping[str, object]) -> None:
        """Called once when a run is complete: its folder, and the content of results.json."""

    def on_stage(self, where: RunShare) -> None:
        """Called when a stage of the run begins: preparing, the rules, a search, finishing."""

    def on_progress(self, event: ProgressEvent) -> None:
        """Called often while a phase runs, and once when it is done."""

    def on_note(self, text: str) -> None:
        """Called with a line of what has been found or done."""

    def should_stop(self) -> bool:
        """Asked before every evaluation. True ends the search: what it has found by then is finished and saved."""
        return False

    def on_close(self) -> None:
        """Called when a phase is over, whether it got to its end or not."""

    def expect(self, work: Mapping[str, float]) -> None:
        """What the run consists of: its stages in their order, and how much work each holds, in any unit."""
        self._run = _Run(dict(work))

    def stage(self, name: str, part: int = 0, parts: int = 1) -> None:
        """The phases that follow belong to a stage that `expect` named, or to one of its equal parts."""
        if self._run is None or name not in self._run.work:
            return
        first = name != self._run.stage
        self._run.enter(name, part, parts)
        if first:
            self.close()
            names = list(self._run.work)
            where = RunShare(name, names.index(name) + 1, len(names))
            logger.info("%s", where.place)
            self.on_stage(where)

    def note(self, text: str) -> None:
        """A line for the log and for `on_note`."""
        logger.info(text)
        self.on_note(text)

    def training(self, phase: str, done: int, total: int, values: Mapping[str, float]) -> None:
        """Progress of one training (see ``recovery.finetune.fit``)."""
        self.status(
            phase, done, total, ", ".join(f"{name} {value:.4f}" for name, value in values.items()), values
        )

    def search(self, label: str) -> Callable[[SearchState], None]:
        """Progress of a search by an agent: evaluations and best score."""
        return lambda state: self.status(
            label,
            state.spent,
            state.limit,
            f"best score {state.best_score:.4f}",
            {"best_score": state.best_score},
        )

    def counting(self, label: str, total: int) -> Callable[[int], None]:
        """Progress of anything that is counted."""
        return lambda done: self.status(label, done, total)

    def status(
        self, phase: str, done: int, total: int, facts: str = "", values: Mapping[str, float] | None = None
    ) -> None:
        """Progress of anything that is counted, with what is going on now."""
        if phase != self._phase:
            self.close()
            self._phase = phase
        run = self._run.at(done, total) if self._run is not None and self._run.stage else None
        self.on_progress(ProgressEvent(phase, done, total, facts, run, values or {}))
        if done >= total:
            logger.info("%s: %d of %d %s", phase, done, total, facts)
            self.close()

    def close(self) -> None:
        """The phase is over."""
        self.on_close()
        self._phase = ""


@contextlib.contextmanager
def shown_as(kind: str | None) -> Iterator[None]:
    """Inside of it a `Console` shows progress so, whatever the environment says; None changes nothing."""
    token = _CHOSEN.set(_known(kind, "--progress") if kind is not None else _CHOSEN.get())
    try:
        yield
    finally:
        _CHOSEN.reset(token)


def _known(kind: str, where: str) -> str:
    if kind not in SHOWN:
        raise ConfigError(f"{where}: {kind!r} is not one of {', '.join(SHOWN)}{near_miss(kind, SHOWN)}")
    return kind


class Console(Callback):
    """Progress on standard error: a bar a phase on a terminal, a line now and then where there is none.

    Args:
        visible: whether anything is shown.
        shown: one of `SHOWN`; None for what ``--progress`` says, or the environment variable RLPRUNE_PROGRESS, or auto.
    """

    def __init__(self, visible: bool = True, shown: str | None = None) -> None:
        shown = shown if visible else "none"
        chosen = shown or _CHOSEN.get() or _known(os.environ.get(VARIABLE) or "auto", VARIABLE)
        self._shown = _known(chosen, "shown")
        self._bar: tqdm[Any] | None = None
        self._whole: tqdm[Any] | None = None
        self._last = 0.0
        self._begun = ""
        self._stage = ""

    @property
    def shown(self) -> str:
        """One of bar, lines and none; asked anew each time, for streams may be redirected."""
        if self._shown != "auto":
            return self._shown
        return "bar" if _stderr().isatty() else "lines"

    def on_note(self, text: str) -> None:
        self._say_stage()
        if self.shown != "none":
            tqdm.write(text, file=_stderr())

    def on_stage(self, where: RunShare) -> None:
        self._say_stage()
        self._stage = where.place

    def _say_stage(self) -> None:
        """The stage's name, before the first that it has to say: settings that it refuses are an error's line alone."""
        if self._stage and self.shown != "none":
            tqdm.write(self._stage, file=_stderr())
        self._stage = ""

    def on_progress(self, event: ProgressEvent) -> None:
        if self._bar is None:
            self._say_stage()
        if self.shown == "bar":
            self._move_bar(event)
        elif self.shown == "lines":
            self._write_line(event)

    def _move_bar(self, event: ProgressEvent) -> None:
        if self._bar is None:
            # What was done before the bar appeared says nothing about the pace.
            self._bar = tqdm(
                total=event.total,
                initial=event.done,
                desc=event.phase,
                file=_stderr(),
                leave=True,
                dynamic_ncols=True,
            )
        if event.run is not None and event.run.share is not None:
            self._move_whole(event.run, event.run.share)
        self._bar.set_postfix_str(event.facts, refresh=False)
        self._bar.update(event.done - self._bar.n)

    def _move_whole(self, run: RunShare, share: float) -> None:
        """The bar of the whole run, below that of the phase; it goes with the phase, the next one brings it back."""
        if self._whole is None:
            self._whole = tqdm(
                total=1.0,
                initial=share,
                desc=f"run {run.place}",
                bar_format="{desc} {percentage:3.0f}%|{bar}|{postfix}",
                position=1,
                file=_stderr(),
                leave=False,
                dynamic_ncols=True,
            )
        if run.seconds_left is not None:
            self._whole.set_postfix_str(f"about {span(run.seconds_left)} left", refresh=False)
        self._whole.update(share - self._whole.n)

    def _write_line(self, event: ProgressEvent) -> None:
        """A line when a phase is over, and one every `LINE_SECONDS` while it runs."""
        now = _now()
        if event.phase != self._begun:
            self._begun, self._last = event.phase, now
        if event.done < event.total and now - self._last < LINE_SECONDS:
            return
        self._last = now
        share = f" ({event.done / event.total:.0%})" if event.total else ""
        about = _joined(event.facts, event.run)
        text = f"{event.phase}: {event.done} of {event.total}{share}{', ' if about else ''}{about}"
        tqdm.write(text, file=_stderr())

    def on_close(self) -> None:
        self._begun = ""
        if self._whole is not None:
            self._whole.close()
            self._whole = None
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def default_callback() -> Callback:
    """For a call from Python that names no callback: bars where standard error is a terminal, else nothing.

    The environment variable RLPRUNE_PROGRESS chooses as it does for commands.
    """
    return Console() if os.environ.get(VARIABLE) or _stderr().isatty() else Callback()


def _now() -> float:
    return time.monotonic()


def _joined(facts: str, run: RunShare | None) -> str:
    return ", ".join(text for text in (facts, str(run or "")) if text)


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
