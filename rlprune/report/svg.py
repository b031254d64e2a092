"""Small charts as SVG: a frame with axes, and lines, dots and words in it.

A chart is drawn once for a desk and once for a phone, with the same size of letters; the page shows the one that fits.
Colours are classes of the page's style, so that a chart is dark where the page is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

Point = tuple[float, float]
Box = tuple[float, float, float, float]
_LEAST = 1e-12  # numbers below are drawn as 0
LETTER, LINE = 6.2, 13.0
"""Width and height in pixels that a letter of a chart takes at most, at its 11 pixels."""


@dataclass(frozen=True)
class Line:
    """Joined points, or with ``filled`` the area that they enclose."""

    points: Sequence[Point]
    css: str
    title: str = ""
    filled: bool = False

    @property
    def path(self) -> str:
        return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in self.points) + ("Z" if self.filled else "")


@dataclass(frozen=True)
class Dot:
    """A mark of a shape; ``key`` ties it to a row of the page's table, ``title`` is told when it is pointed at."""

    x: float
    y: float
    shape: Literal["circle", "square", "diamond", "star"]
    css: str
    title: str = ""
    key: str = ""

    @property
    def path(self) -> str:
        outlines: dict[str, list[Point]] = {
            "square": [(-4, -4), (4, -4), (4, 4), (-4, 4)],
            "diamond": [(0, -6), (6, 0), (0, 6), (-6, 0)],
            "star": [_polar(7.5 if i % 2 == 0 else 3.4, math.pi * (i / 5 - 0.5)) for i in range(10)],
        }
        outline = outlines.get(self.shape) or [_polar(4.4, math.pi * i / 8) for i in range(16)]
        return Line([(self.x + dx, self.y + dy) for dx, dy in outline], "", filled=True).path


@dataclass(frozen=True)
class Word:
    """A text; ``x`` is where it starts, ends or has its middle."""

    x: float
    y: float
    text: str
    anchor: Literal["start", "middle", "end"] = "start"
    css: str = ""

    @property
    def box(self) -> Box:
        """Left, top, right and bottom, estimated from the letters."""
        width = (LETTER if self.css != "name" else 1.15 * LETTER) * len(self.text)
        left = self.x - {"start": 0.0, "middle": 0.5, "end": 1.0}[self.anchor] * width
        return left, self.y - 0.8 * LINE, left + width, self.y + 0.2 * LINE


@dataclass(frozen=True)
class Drawing:
    """A chart of one size."""

    width: int
    height: int
    lines: Sequence[Line] = ()
    dots: Sequence[Dot] = ()
    words: Sequence[Word] = ()


@dataclass(frozen=True)
class Picture:
    """A chart for the page: its heading, what it shows for those who cannot see it, its two sizes, and a legend.

    ``legend`` is (class of the colour, shape, text) of every entry; ``note`` a line below.
    """

    title: str
    alt: str
    wide: Drawing
    narrow: Drawing
    legend: Sequence[tuple[str, str, str]] = ()
    note: str = ""


@dataclass(frozen=True)
class Axis:
    """An axis from ``low`` to ``high``; ``form`` writes the numbers next to the ticks."""

    low: float
    high: float
    label: str
    log: bool = False
    form: Callable[[float], str] = lambda value: plain(value)

    @classmethod
    def over(
        cls,
        values: Iterable[float],
        label: str,
        log: bool = False,
        form: Callable[[float], str] | None = None,
    ) -> Axis:
        """An axis over all values with a little room at both ends."""
        known = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
        low, high = min(known), max(known)
        if log and low > 0:
            room = (high / low) ** 0.06 if high > low else 1.2
            return cls(low / room, high * room, label, True, form or plain)
        room, size = 0.06 * (high - low), max(abs(low), abs(high))
        if high - low <= 1e-6 * size or size < _LEAST:
            room = 0.05 * size if size >= _LEAST else 1.0
        return cls(low - room, high + room, label, False, form or plain)

    def place(self, value: float) -> float:
        """Where a value lies, 0 at the low end and 1 at the high one."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self, most: int) -> list[float]:
        """At most so many round values within the axis."""
        from matplotlib.ticker import LogLocator, MaxNLocator

        decades = math.log10(self.high / self.low) if self.log else 0.0
        locator: Any = LogLocator(subs=(1.0,)) if decades > 3 else LogLocator(subs=(1.0, 2.0, 5.0))
        if not self.log or decades < 0.8:
            locator = MaxNLocator(max(1, most), steps=[1, 2, 2.5, 5, 10])
        found = [float(v) for v in locator.tick_values(self.low, self.high)]
        inside = [v for v in found if self.low <= v <= self.high]
        step = max(1, -(-len(inside) // max(1, most)))
        return inside[::step]


@dataclass
class Frame:
    """The plot's area within a drawing: places data, and gathers what is drawn."""

    width: int
    height: int
    x: Axis
    y: Axis
    left: float = 0.0
    lines: list[Line] = field(default_factory=list)
    dots: list[Dot] = field(default_factory=list)
    words: list[Word] = field(default_factory=list)

    TOP, RIGHT, BOTTOM = 22.0, 14.0, 40.0

    def __post_init__(self) -> None:
        if not self.left:
            widest = max((len(self.y.form(v)) for v in self.y.ticks(6)), default=1)
            self.left = 14 + LETTER * widest

    def at(self, x: float, y: float) -> Point:
        """The pixel of a pair of values."""
        across = self.width - self.left - self.RIGHT
        down = self.height - self.TOP - self.BOTTOM
        return self.left + self.x.place(x) * across, self.height - self.BOTTOM - self.y.place(y) * down

    def draw_axes(self, y_ticks: bool = True) -> None:
        """Grid, ticks with their numbers, and what the axes count."""
        bottom, right = self.height - self.BOTTOM, self.width - self.RIGHT
        widest = max(len(self.x.form(v)) for v in [*self.x.ticks(4), self.x.low])
        for value in self.x.ticks(int((right - self.left) // (LETTER * widest + 16))):
            x = self.at(value, self.y.low)[0]
            self.lines.append(Line([(x, self.TOP), (x, bottom)], "grid"))
            word = Word(x, bottom + 18, self.x.form(value), "middle")
            over = word.box[2] - self.width
            self.words.append(replace(word, x=x - over) if over > 0 else word)
        for value in self.y.ticks(6) if y_ticks else ():
            y = self.at(self.x.low, value)[1]
            self.lines.append(Line([(self.left, y), (right, y)], "grid"))
            self.words.append(Word(self.left - 6, y + 4, self.y.form(value), "end"))
        self.lines.append(Line([(self.left, bottom), (right, bottom)], "axis"))
        self.words.append(Word(right, self.height - 6, self.x.label, "end", "label"))
        if y_ticks:
            self.words.append(Word(2, 12, self.y.label, "start", "label"))

    def name(self, x: float, y: float, text: str) -> None:
        """Write a name next to a point where it covers no other name and no dot; nothing where there is no room."""
        taken = [word.box for word in self.words]
        taken += [(d.x - 4, d.y - 4, d.x + 4, d.y + 4) for d in self.dots]
        for word in (
            Word(x + 9, y + 4, text, css="name"),
            Word(x - 9, y + 4, text, "end", "name"),
            Word(x, y - 10, text, "middle", "name"),
            Word(x, y + 19, text, "middle", "name"),
            Word(x + 7, y - 9, text, css="name"),
            Word(x - 7, y - 9, text, "end", "name"),
            Word(x + 7, y + 17, text, css="name"),
            Word(x - 7, y + 17, text, "end", "name"),
        ):
            left, top, right, bottom = word.box
            inside = left >= self.left and right <= self.width - 2 and top >= self.TOP - 6
            if inside and bottom <= self.height - self.BOTTOM and not any(_meet(word.box, b) for b in taken):
                self.words.append(word)
                return

    def drawing(self) -> Drawing:
        return Drawing(self.width, self.height, self.lines, self.dots, self.words)


def plain(value: float) -> str:
    """A tick's number, its minus as long as a plus."""
    return f"{value:.5g}".replace("-", "−")


def in_percent(value: float) -> str:
    """A share as a tick's number."""
    return f"{100 * value:.4g}%".replace("-", "−")


def shortened(text: str, limit: int) -> str:
    """A name of at most so many letters; of a long one the end, where names differ, is kept."""
    return text if len(text) <= limit else "…" + text[1 - limit :]


def _polar(radius: float, angle: float) -> Point:
    return radius * math.cos(angle), radius * math.sin(angle)


def _meet(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
