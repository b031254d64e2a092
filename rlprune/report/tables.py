"""The tables of a run: the short one that the page sorts, and the long one with every column, for documents too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..utils.values import is_finite
from . import words
from .decision import Compared, Decision, Row, cost_label, costs_of
from .results import Results, as_list, as_mapping, best_rule, kind_of, learned

_MEGA, _KILO = 1e6, 1e3


@dataclass(frozen=True)
class Cell:
    """What a cell says, and the number by which its column is sorted."""

    text: str
    value: float | str | None = None


@dataclass(frozen=True)
class Line:
    """A row of the short table; ``badge`` is a word next to the method, ``why`` what it means here."""

    key: str
    cells: Sequence[Cell]
    role: str
    badge: str = ""
    why: str = ""


@dataclass(frozen=True)
class ShortTable:
    """Headers and rows; ``spare`` are headers that a narrow table leaves out, the first of them first."""

    header: Sequence[str]
    lines: Sequence[Line]
    spare: Sequence[str] = ()


def role_of(row: Row) -> str:
    """What a row is in pictures: dense, rule or search."""
    kind = kind_of(row)
    return kind if kind in ("dense", "rule") else "search"


def label_of(row: Row, rows: Sequence[Row]) -> str:
    """The method, with its seed where several rows are of one method."""
    name = str(row["method"])
    return f"{name}, seed {row.get('seed')}" if sum(r["method"] == name for r in rows) > 1 else name


def short(results: Results, compared: Compared, decision: Decision) -> ShortTable:
    """Quality after the fine-tune, its change, costs and evaluations of every row; the best quality first."""
    rows, metric = compared.rows, str(as_mapping(results.get("budget")).get("metric", "macs"))
    keys = [
        key for key in costs_of(decision.dense, metric) if any(key in costs_of(r, metric) for r in rows[1:])
    ]
    batches = [key for key in keys if key.startswith("latency b")]
    keys = [key for key in keys if key not in batches[1:]]  # the long table has them all
    loss = "loss " if compared.kind == "loss" else ""
    header = [
        "method",
        f"{compared.metric}{', fine-tuned' if compared.tuned else ''}",
        f"{loss}change, 95% interval",
    ]
    header += [cost_label(key) for key in keys] + ["evaluations"]
    rule, lines = best_rule(results), []
    for index, row in enumerate(rows):
        value, change = compared.quality(row), None
        if row is not decision.dense:
            change = compared.change(row, decision.dense)
        costs = costs_of(row, metric)
        cells = [
            Cell(label_of(row, rows), label_of(row, rows)),
            Cell(words.quality(value, compared.metric), value),
        ]
        cells.append(Cell(interval(compared, change), None if change is None else change.mean))
        cells += [Cell(words.amount(costs.get(key), key), costs.get(key)) for key in keys]
        cells.append(Cell(words.count(row.get("evaluations")), row.get("evaluations")))
        badge, why = _badge(index, row, decision, rule)
        role = "chosen" if row is decision.chosen else role_of(row)
        lines.append(Line(f"row{index}", cells, role, badge, why))
    if all(cell.text == words.NONE for line in lines for cell in line.cells[2:3]):
        header.pop(2)
        lines = [Line(x.key, [*x.cells[:2], *x.cells[3:]], x.role, x.badge, x.why) for x in lines]
    spare = [cost_label(key) for key in (*keys[1:], *keys[:1])]
    return ShortTable(header, sorted(lines, key=lambda line: _order(line, compared.higher)), spare)


def interval(compared: Compared, change: Any) -> str:
    """How much better a row is than the dense model, in the unit of what was measured sample by sample."""
    if change is None:
        return words.NONE
    percent = words.is_share(compared.metric) and compared.kind == "metric"
    sign = 1 if compared.kind == "metric" and compared.higher else -1
    ends = (change.low, change.high) if sign > 0 else (-change.high, -change.low)
    form, scale = (".1f", 100.0) if percent else (".3g", 1.0)
    mean, low, high = (words.signed(scale * v, form) for v in (sign * change.mean, *ends))
    return f"{mean} [{low}, {high}]"


def _badge(index: int, row: Row, decision: Decision, rule: Row | None) -> tuple[str, str]:
    if row is decision.chosen:
        return "chosen", "the plan in the folder pruned/"
    if index in decision.rivals:
        return "as good, cheaper", decision.rivals[index]
    if rule is not None and row is rule:
        return "best rule by score", "by the score before the fine-tune"
    return "", ""


def _order(line: Line, higher: bool) -> tuple[bool, float]:
    value = line.cells[1].value
    if not isinstance(value, int | float):
        return True, 0.0
    return False, -value if higher else value


def table_columns(results: Results) -> list[tuple[str, list[str]]]:
    """Header and cells of every column of the long table, as plain text; empty columns are left out."""
    rows = as_list(results.get("rows"))
    budget = as_mapping(results.get("budget"))
    metric, dense = str(budget.get("metric", "macs")), budget.get("dense")
    scale, unit = (1.0, "ms") if metric == "latency" else (_MEGA, "M")
    batches = dict.fromkeys(batch for row in rows for batch in as_mapping(row.get("latency_ms")))
    columns = [
        ("method", [str(row["method"]) for row in rows]),
        ("seed", [words.count(row.get("seed")) for row in rows]),
        ("budget", [words.count(row.get("budget")) for row in rows]),
        ("evaluations", [words.count(row.get("evaluations")) for row in rows]),
        (f"{metric} ({unit})", [words.scaled(row.get("cost"), scale) for row in rows]),
        ("of dense", [words.share(row.get("cost"), dense) for row in rows]),
        ("params (k)", [words.scaled(row.get("params"), _KILO) for row in rows]),
        ("file (MB)", [words.scaled(row.get("bytes"), _MEGA) for row in rows]),
        ("score", [words.number(row.get("score")) for row in rows]),
        ("validation", [words.number(row.get("validation")) for row in rows]),
        ("test", [words.number(row.get("test")) for row in rows]),
        ("test loss", [words.number(row.get("test_loss")) for row in rows]),
        ("test, fine-tuned", [words.number(row.get("test_finetuned")) for row in rows]),
        ("test loss, fine-tuned", [words.number(row.get("test_loss_finetuned")) for row in rows]),
        *(
            (f"latency b{b} (ms)", [words.number(as_mapping(r.get("latency_ms")).get(b), 3) for r in rows])
            for b in batches
        ),
        ("seconds", [words.number(row.get("seconds"), 3) for row in rows]),
    ]
    return [(header, cells) for header, cells in columns if any(cell != words.NONE for cell in cells)]


def long(results: Results) -> tuple[list[str], list[list[str]], list[bool]]:
    """Header, rows, and which rows are the best rule's and the chosen plan's."""
    columns = table_columns(results)
    marked = {id(row) for row in (best_rule(results), learned(results)) if row is not None}
    rows = [list(cells) for cells in zip(*[cells for _, cells in columns], strict=True)]
    return [name for name, _ in columns], rows, [id(row) in marked for row in as_list(results.get("rows"))]


def markdown(results: Results) -> str:
    """The long table in Markdown, for a document or an issue."""
    header, rows, _ = long(results)
    return markdown_table(header, rows)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with padded columns; pipes in the cells are escaped, line breaks are spaces."""
    lines = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in [header, *rows]]
    sizes = [max(3, *(len(row[column]) for row in lines)) for column in range(len(header))]
    lines.insert(1, ["-" * size for size in sizes])
    padded = [[cell.ljust(size) for cell, size in zip(row, sizes, strict=True)] for row in lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in padded)


@dataclass(frozen=True)
class Bar:
    """A group's widths: dense, and next to it the shares in percent that others keep."""

    name: str
    dense: int
    kept: Sequence[tuple[str, str, int, float]]
    """(class of the colour, label, width, percent of the dense width)"""


def widths(results: Results, chosen: Mapping[str, Any] | None) -> list[Bar]:
    """The width of every group: dense, of the best rule, of the chosen plan; empty where they are not recorded."""
    groups = [group for group in as_list(results.get("groups")) if isinstance(group, dict)]
    series = [("rule", best_rule(results)), ("chosen", chosen)]
    known = [(css, row) for css, row in series if row and len(as_list(row.get("widths"))) == len(groups)]
    bars = []
    for number, group in enumerate(groups):
        dense = int(group["width"])
        kept = []
        for css, row in known:
            width = row["widths"][number]
            if not is_finite(width):
                raise ValueError(f"{row.get('method')}: a width is no number")
            kept.append((css, str(row["method"]), int(width), 100.0 * width / max(1, dense)))
        bars.append(Bar(str(group["name"]), dense, kept))
    return bars
