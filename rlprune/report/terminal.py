"""Results in text: a run's short table and its headline, for a terminal and for ``print(result)``."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from . import tables
from .decision import Compared, decide, rival_words, sentence

if TYPE_CHECKING:
    from rich.console import Console as Terminal

    from .results import Results

WIDTH = 100
"""Columns that a table takes at most."""
_MARKS = {"best rule by score": "†", "best rule": "†", "as good, cheaper": "+"}


def words(results: Results, folder: Path | None = None) -> str:
    """The table of a run within WIDTH columns, the headline sentence, and what is as good and cheaper.

    Args:
        folder: of the run; its outcomes make the intervals paired.
    """
    from rich.console import Console as Terminal

    decision = decide(results, folder)
    if decision is None:
        return tables.markdown(results)
    compared, text = Compared(results, folder), io.StringIO()
    table = tables.short(results, compared, decision)
    terminal = Terminal(file=text, width=WIDTH, highlight=False, soft_wrap=False, color_system=None)
    legend = draw(table, terminal)
    lines = (line.rstrip() for line in text.getvalue().splitlines())
    told = (sentence(decision), rival_words(decision, compared.rows))
    return "\n".join([*lines, *legend, *(line for part in told for line in textwrap.wrap(part, WIDTH))])


def draw(table: tables.ShortTable, terminal: Terminal) -> Sequence[str]:
    """Print a table within the terminal's columns, a line a row; returns the line that explains its marks, if any."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    sizes = _fitting(table, terminal.width)
    columns = list(sizes)
    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), show_edge=False)
    for number, size in sizes.items():
        justify: Literal["left", "right"] = "left" if number == 0 else "right"
        header = Text("\n".join(textwrap.wrap(table.header[number], size)))
        drawn.add_column(header, justify=justify, vertical="bottom", no_wrap=True)
    for line in table.lines:
        cells = [Text(line.cells[number].text) for number in columns]
        if line.badge:
            cells[0].append(f" {_MARKS.get(line.badge, '*')}", style="bold cyan")
        drawn.add_row(*cells, style="bold" if line.role in ("chosen", "agent") else "")
    terminal.print(drawn)
    badges = dict.fromkeys(line.badge for line in table.lines if line.badge)
    return [", ".join(f"{_MARKS.get(badge, '*')} {badge}" for badge in badges)] if badges else []


def _fitting(table: tables.ShortTable, width: int) -> dict[int, int]:
    """{number of a column: letters of its cells} of those that fit side by side: spare ones go until the others do."""
    sizes = {}
    for number, header in enumerate(table.header):
        cells = [
            len(line.cells[number].text) + 2 * (number == 0 and bool(line.badge)) for line in table.lines
        ]
        sizes[number] = max(*map(len, header.split()), *cells)
    for name in table.spare:
        if sum(sizes.values()) + 3 * len(sizes) <= width:
            break
        sizes.pop(table.header.index(name))
    return sizes
