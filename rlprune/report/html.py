"""report.html: one file without any outside resource, rebuilt from what a run recorded.

Read from the run's folder: `results.json` (needed), and where they exist `ledger.jsonl` (learning curve),
`config.yaml`, `pruned/plan.json` and `budgets.json` (quality against budget).
"""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..utils.dotted import flat
from ..utils.files import write_text_atomic
from . import comparison, plots
from .comparison import SCORE_UNITS
from .results import (
    Results,
    as_list,
    as_mapping,
    best,
    best_rule,
    budget_points,
    is_finite,
    kind_of,
    learned,
    learning_curves,
    read_ledger,
    read_results,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MEGA, _KILO = 1e6, 1e3


def build(run_dir: str | Path) -> Path:
    """Write RUN/report.html from the run's files and return its path.

    Raises:
        ArtifactError: results.json is missing, damaged or newer than this version reads.
    """
    folder = Path(run_dir)
    results = read_results(folder)
    target = folder / "report.html"
    write_text_atomic(target, render(results, folder))
    return target


def render(results: Results, folder: Path) -> str:
    """The page's HTML text."""
    workload = as_mapping(results.get("workload"))
    title = f"rlprune: {workload.get('name', folder.name)}"
    config_path = folder / "config.yaml"
    config = config_path.read_text(encoding="utf-8", errors="replace") if config_path.is_file() else ""
    views = comparison.per_budget(results)
    parts = [f"<h1>{_text(title)}</h1>"]
    for view in views:
        if len(views) > 1:
            parts.append(f"<h2>{comparison.share(view)} of the {_text(view['budget']['metric'])}</h2>")
        parts += [_headline(view), *_benchmark(view)]
        parts += [_picture(figure, alt) for figure, alt in figures(view, folder)]
    parts += [
        *[f"<p>{_text(note)}</p>" for note in comparison.notes(results)],
        "<h2>Every method</h2>",
        _table(results),
        "<h2>What was run</h2>",
        _facts(results, folder),
    ]
    if config:
        parts.append(f"<details><summary>config.yaml</summary><pre>{_text(config)}</pre></details>")
    return _PAGE.format(title=_text(title), body="\n".join(parts))


def figures(results: Results, folder: Path) -> list[tuple[Figure, str]]:
    """The report's pictures, each with a text for those who cannot see it; one without data is left out."""
    found: list[tuple[Figure, str]] = []
    unit = _score_unit(results)
    groups = [group for group in as_list(results.get("groups")) if isinstance(group, dict)]
    series = {
        label: row["widths"]
        for label, row in (("learned", learned(results)), ("best rule", best_rule(results)))
        if row is not None and groups and len(as_list(row.get("widths"))) == len(groups)
    }
    series = {f"{label} ({_row_of(results, label)['method']})": widths for label, widths in series.items()}
    if groups:
        alt = "Kept width of every group: dense, best rule and learned plan"
        found.append((plots.widths(groups, series), alt))
    curves = {} if results.get("summary") else learning_curves(results, read_ledger(folder / "ledger.jsonl"))
    if curves:
        figure = plots.learning(curves, _references(results), unit)
        found.append((figure, "Best score so far against the evaluations spent, for every search method"))
    points = budget_points(folder / "budgets.json")
    if points:
        metric = str(points[0].get("metric") or as_mapping(results.get("budget")).get("metric", "macs"))
        picture = plots.quality(points, metric, unit), "Score against the budget, for every method"
        # A policy over a range of budgets is about this curve.
        found.insert(0 if as_mapping(results.get("budget")).get("range") else len(found), picture)
    return found


def _row_of(results: Results, label: str) -> Mapping[str, Any]:
    return (best_rule(results) if label == "best rule" else learned(results)) or {}


def _references(results: Results) -> dict[str, float]:
    references: dict[str, float] = {}
    rule = best_rule(results)
    if rule is not None:
        references[f"best rule: {rule['method']}"] = float(rule["score"])
    for row in as_list(results.get("rows")):
        if row.get("method") == "uniform" and is_finite(row.get("score")) and row is not rule:
            references.setdefault("uniform", float(row["score"]))
    return references


def _score_unit(results: Results) -> str:
    kind = results.get("score") or as_mapping(results.get("workload")).get("score", "kl")
    return SCORE_UNITS.get(str(kind), "score")


def _headline(results: Results) -> str:
    budget, rows = as_mapping(results.get("budget")), as_list(results.get("rows"))
    share = _ratio(budget.get("target"), budget.get("dense"))
    sentences = []
    if share is not None:
        sentences.append(f"Budget: {_percent(share)} of the dense {_text(budget.get('metric', 'macs'))}.")
    means = _means(rows, results)
    for label, kind in (("Dense", "dense"), ("Best rule", "rule"), ("Learned", "agent")):
        row = best(row for row in means if kind_of(row) == kind)
        if row is not None:
            facts = [f"{name} {value}" for name, value in _shown_quality(row) if value != "–"]
            method = "" if label == "Dense" else f" ({_text(row['method'])})"
            sentences.append(f"<b>{label}{method}</b>: {', '.join(facts) or 'not measured'}.")
    return "<p>" + "<br>".join(sentences) + "</p>"


def _means(rows: Sequence[Mapping[str, Any]], results: Results) -> list[dict[str, Any]]:
    """One row a method, the mean over its seeds; of a benchmark of several budgets at the first of them."""
    first = next((budget.get("asked") for budget in as_list(results.get("budgets"))), None)
    by_method: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row.get("budget") in (None, first):
            by_method.setdefault(row["method"], []).append(row)
    return [
        dict(found[0])
        | {
            name: sum(row[name] for row in found) / len(found)
            for name in ("score", "test", "test_finetuned")
            if all(is_finite(row.get(name)) for row in found)
        }
        for found in by_method.values()
    ]


def _shown_quality(row: Mapping[str, object]) -> list[tuple[str, str]]:
    return [
        ("score", _number(row.get("score"))),
        ("test", _number(row.get("test"))),
        ("test after the fine-tune", _number(row.get("test_finetuned"))),
    ]


def table_columns(results: Results) -> list[tuple[str, list[str]]]:
    """Header and cells of every column of the big table, as plain text; empty columns are left out."""
    rows = as_list(results.get("rows"))
    budget = as_mapping(results.get("budget"))
    metric, dense = str(budget.get("metric", "macs")), budget.get("dense")
    scale, unit = (1.0, "ms") if metric == "latency" else (_MEGA, "M")
    columns = [
        ("method", [str(row["method"]) for row in rows]),
        ("seed", [_count(row.get("seed")) for row in rows]),
        ("budget", [_count(row.get("budget")) for row in rows]),
        ("evaluations", [_count(row.get("evaluations")) for row in rows]),
        (f"{metric} ({unit})", [_scaled(row.get("cost"), scale) for row in rows]),
        ("of dense", [_share(row.get("cost"), dense) for row in rows]),
        ("params (k)", [_scaled(row.get("params"), _KILO) for row in rows]),
        ("score", [_number(row.get("score")) for row in rows]),
        ("validation", [_number(row.get("validation")) for row in rows]),
        ("test", [_number(row.get("test")) for row in rows]),
        ("test loss", [_number(row.get("test_loss")) for row in rows]),
        ("test, fine-tuned", [_number(row.get("test_finetuned")) for row in rows]),
        ("test loss, fine-tuned", [_number(row.get("test_loss_finetuned")) for row in rows]),
        ("latency b1 (ms)", [_number(as_mapping(row.get("latency_ms")).get("1"), 3) for row in rows]),
        ("latency b64 (ms)", [_number(as_mapping(row.get("latency_ms")).get("64"), 3) for row in rows]),
        ("seconds", [_number(row.get("seconds"), 3) for row in rows]),
    ]
    return [(header, cells) for header, cells in columns if any(cell != "–" for cell in cells)]


def markdown(results: Results) -> str:
    """The big table in Markdown, for a terminal, a document or an issue."""
    columns = table_columns(results)
    rows = list(zip(*[cells for _, cells in columns], strict=True))
    return markdown_table([header for header, _ in columns], rows)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with padded columns; pipes in the cells are escaped."""
    lines = [[str(cell).replace("|", "\\|") for cell in row] for row in [header, *rows]]
    sizes = [max(3, *(len(row[column]) for row in lines)) for column in range(len(header))]
    lines.insert(1, ["-" * size for size in sizes])
    padded = [[cell.ljust(size) for cell, size in zip(row, sizes, strict=True)] for row in lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in padded)


def _benchmark(results: Results) -> list[str]:
    """The pictures and tables that compare a benchmark's methods; nothing for a run."""
    parts = [_picture(figure, alt) for _, figure, alt in comparison.figures(results)]
    if parts:
        parts += [_plain_table(*comparison.headline(results)), _plain_table(*comparison.paired(results))]
    return parts


def _plain_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{_text(cell)}</th>" for cell in header)
    body = "".join(f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<div class=wide><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _table(results: Results) -> str:
    columns = table_columns(results)
    head = "".join(f"<th>{_text(header)}</th>" for header, _ in columns)
    marked = {id(row) for row in (best_rule(results), learned(results)) if row is not None}
    body = []
    for index, row in enumerate(as_list(results.get("rows"))):
        cells = "".join(f"<td>{_text(cells[index])}</td>" for _, cells in columns)
        body.append(f"<tr{' class=mark' if id(row) in marked else ''}>{cells}</tr>")
    rows = "".join(body)
    return f"<div class=wide><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"


def _facts(results: Results, folder: Path) -> str:
    sections = [(name, as_mapping(results.get(name))) for name in ("workload", "budget", "hardware")]
    try:
        plan = json.loads((folder / "pruned" / "plan.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        plan = {}
    wanted = ("version", "fingerprint", "costs", "libraries", "versions", "inexact")
    sections.append(("pruned model", {key: plan[key] for key in wanted if key in as_mapping(plan)}))
    rows = [
        f"<tr><th>{_text(section)}</th><td>{_text(key)}</td><td>{_text(_words(value))}</td></tr>"
        for section, values in sections
        for key, value in flat(values).items()
        if value != {}
    ]
    return f"<div class=wide><table class=facts><tbody>{''.join(rows)}</tbody></table></div>"


def _words(value: object) -> str:
    return _number(value, 6) if isinstance(value, float) else str(value)


def _picture(figure: Figure, alt: str) -> str:
    data = base64.b64encode(plots.to_svg(figure)).decode("ascii")
    return f'<figure><img src="data:image/svg+xml;base64,{data}" alt="{_text(alt)}"></figure>'


def _text(value: object) -> str:
    return html.escape(str(value), quote=True)


def _ratio(part: object, whole: object) -> float | None:
    return float(part) / float(whole) if is_finite(part) and is_finite(whole) and whole else None


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def _share(part: object, whole: object) -> str:
    share = _ratio(part, whole)
    return "–" if share is None else _percent(share)


def _count(value: object) -> str:
    return "–" if value is None else str(value)


def _scaled(value: object, scale: float) -> str:
    return f"{value / scale:.2f}" if is_finite(value) else "–"


def _number(value: object, digits: int = 4) -> str:
    if not is_finite(value):
        return "–" if value is None or isinstance(value, float) else str(value)
    return f"{value:.{digits}g}" if abs(value) < 1000 else f"{value:.0f}"


_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 1080px;
  margin: 2em auto; padding: 0 1em; }}
h1 {{ font-size: 1.5em; }} h2 {{ font-size: 1.15em; margin-top: 2em; }}
figure {{ margin: 1.5em 0; }} figure img {{ max-width: 100%; height: auto; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: 13px; }}
th, td {{ padding: 0.25em 0.7em; text-align: right; border-bottom: 1px solid #e3e3e3; white-space: nowrap; }}
thead th {{ border-bottom: 2px solid #888; white-space: normal; vertical-align: bottom; }}
th:first-child, td:first-child {{ text-align: left; }}
tr.mark {{ background: #eaf3fb; font-weight: 600; }}
.facts th, .facts td {{ text-align: left; white-space: normal; font-weight: normal;
  overflow-wrap: anywhere; }}
.facts th {{ color: #555; }}
pre {{ background: #f6f6f6; padding: 1em; overflow-x: auto; font-size: 13px; }}
</style></head><body>
{body}
</body></html>
"""
