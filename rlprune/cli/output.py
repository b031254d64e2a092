"""What a command says: tables that fit a terminal, the headline of a run, and a summary for programs.

Colours follow the terminal, `NO_COLOR` (https://no-color.org) and `FORCE_COLOR`; what is piped has none.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console as Terminal

    from ..report.results import Results
    from ..report.tables import ShortTable
    from ..utils.progress import Console

WIDTH = 100
"""Columns that a table takes at most."""


def add_quiet(parser: argparse.ArgumentParser) -> None:
    """--quiet, for commands that take their time."""
    parser.add_argument(
        "--quiet", action="store_true", help="no progress and no tables: the result and errors only"
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    """--json, for commands whose outcome has a summary."""
    parser.add_argument(
        "--json",
        action="store_true",
        help="a JSON object with the result on standard output, all else on standard error",
    )


def watcher(args: argparse.Namespace) -> Console:
    """Who shows the progress of a command; with --quiet it shows nothing."""
    from ..utils.progress import Console

    return Console(not getattr(args, "quiet", False))


def say(args: argparse.Namespace, text: str = "") -> None:
    """Print a line that --quiet leaves out."""
    if not getattr(args, "quiet", False):
        print(text)


def finish(args: argparse.Namespace, text: str, **summary: Any) -> None:
    """The last line of a command, and what --json prints instead: paths as text."""
    print(text)
    args.summary = {k: str(v) if isinstance(v, Path) else v for k, v in summary.items()}


def show_run(out: Path, args: argparse.Namespace) -> None:
    """The table of a finished run, its headline, and where its report is."""
    from ..report import tables
    from ..report.decision import Compared, as_plain, decide, rival_words, sentence
    from ..report.results import read_results

    results = read_results(out)
    decision = decide(results, out)
    report = out / "report.html"
    summary: dict[str, Any] = {"run": str(out), "report": str(report) if report.is_file() else None}
    if decision is None:
        say(args, tables.markdown(results))
    else:
        compared = Compared(results, out)
        if not getattr(args, "quiet", False):
            print_table(tables.short(results, compared, decision))
        print_text(sentence(decision))
        print_text(rival_words(decision, compared.rows))
        rivals = [
            {"method": compared.rows[i].get("method"), "why": why} for i, why in decision.rivals.items()
        ]
        summary |= as_plain(decision) | {"as_good_and_cheaper": rivals}
    args.summary = summary | {"saved": results.get("saved", []), "rows": results["rows"]}
    for line in results.get("saved", ()):
        print(line)
    if report.is_file():
        print(f"report: {report}")


def show_benchmark(out: Path, results: Results, args: argparse.Namespace) -> None:
    """For each budget of a benchmark a sentence and a table; then where everything is."""
    from ..report import benchmark, comparison

    for view in comparison.per_budget(results):
        for line in benchmark.sentences(view):
            print_text(line)
        table = benchmark.short(view)
        if table is not None and not getattr(args, "quiet", False):
            print_table(table)
    for note in comparison.notes(results):
        print_text(note)
    say(args, f"tables: {out / 'benchmark.md'}")
    print(f"report: {out / 'report.html'}")
    args.summary = {"run": str(out), "report": str(out / "report.html"), "summary": results.get("summary")}


def print_table(table: ShortTable) -> None:
    """A table of the report within WIDTH columns, a line a row; marks are explained below it."""
    from ..report.terminal import draw

    for line in draw(table, _terminal()):
        print(line)


def print_text(text: str) -> None:
    """A sentence, wrapped where a person reads it, in one line where a program does."""
    if sys.stdout.isatty():
        from rich.text import Text

        _terminal().print(Text(text))
    else:
        print(text)


def print_rows(rows: Sequence[tuple[str, str]], indent: str = "") -> None:
    """Names and what they are, in two columns: wrapped on a terminal, a line each where they are piped."""
    width = max((len(name) for name, _ in rows), default=0)
    if not sys.stdout.isatty():
        for name, text in rows:
            print(f"{indent}{name:<{width}}  {text}".rstrip())
        return
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for name, text in rows:
        grid.add_row(Text(f"{indent}{name}", style="bold"), Text(text))
    _terminal().print(grid)


def _terminal() -> Terminal:
    from rich.console import Console as Terminal

    columns = shutil.get_terminal_size((WIDTH, 24)).columns if sys.stdout.isatty() else WIDTH
    return Terminal(file=sys.stdout, width=min(WIDTH, columns), highlight=False, soft_wrap=False)
