"""What a benchmark writes when its cells are finished: results.json, ledger.jsonl, tables, plots, report.html."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from torch import Tensor, nn

from ..config.config import Config
from ..evaluation.ledger import charged_scores
from ..experiments.train import outcome as outcome_of
from ..pruning.plan import make_plan
from ..pruning.space import PruningSpace
from ..pruning.surgery import prune
from ..report import comparison, plots
from ..report import html as report
from ..report.results import Results
from ..utils.files import write_bytes_atomic, write_json_atomic, write_text_atomic
from ..utils.timing import measure
from ..workloads.base import Workload
from .cells import Cell
from .statistics import Row, improvements, summarise

LATENCY_SECONDS = 15.0
LATENCY_BYTES = 2**30  # of the pruned models that are timed in turns, so that they fit into memory together


@dataclass(frozen=True)
class Outcome:
    """All that is written: the cells' contents in order, and what they have in common."""

    config: Config
    workload: Workload
    space: PruningSpace
    budgets: Sequence[str | float]
    protocol: Mapping[str, Any]
    content: Mapping[Cell, Mapping[str, Any]]


def write(folder: Path, outcome: Outcome) -> Results:
    """Write everything into ``folder`` and return the content of results.json."""
    results = _results(outcome)
    lines = [
        line | {"budget": cell.budget, "checkpoint": cell.checkpoint}
        for cell, content in outcome.content.items()
        for line in content["ledger"]
    ]
    text = "".join(json.dumps(line | {"index": index}) + "\n" for index, line in enumerate(lines))
    write_text_atomic(folder / "ledger.jsonl", text)
    write_json_atomic(folder / "results.json", results)
    write_text_atomic(folder / "benchmark.md", page(results))
    views = comparison.per_budget(results)
    for view in views:
        mark = f"-{comparison.share(view).rstrip('%')}" if len(views) > 1 else ""
        for name, figure, _ in comparison.figures(view):
            write_bytes_atomic(folder / f"{name}{mark}.png", plots.to_png(figure))
    report.build(folder)
    return results


def page(results: Results) -> str:
    """benchmark.md: for each budget the two tables of the methods, then every row."""
    parts = []
    for view in comparison.per_budget(results):
        parts.append(f"## {comparison.share(view)} of the {view['budget']['metric']}\n")
        parts += [report.markdown_table(*comparison.headline(view)), ""]
        parts += [report.markdown_table(*comparison.paired(view)), ""]
        if (table := comparison.equal_seconds(view))[1]:
            parts += [f"{comparison.EQUAL_SECONDS}:\n", report.markdown_table(*table), ""]
    parts += [f"- {note}" for note in comparison.notes(results)]
    return "\n".join([*parts, "", "## Every cell", "", report.markdown(results), ""])


def _results(outcome: Outcome) -> Results:
    space, metric = outcome.space, outcome.config.budget.metric
    rows = {
        cell: content["row"] | {"checkpoint": cell.checkpoint} for cell, content in outcome.content.items()
    }
    _add_latency(outcome, list(rows.values()))
    summary: list[Row] = []
    budgets = []
    for budget in outcome.budgets:
        target = float(space.target(budget, metric))
        budgets.append(
            {"asked": budget, "metric": metric, "target": target, "dense": space.dense_cost(metric)}
        )
        curves = {}
        for cell, content in outcome.content.items():
            if cell.budget == budget:
                curves[cell.method, cell.seed] = scores = charged_scores(content["ledger"], target)
                rows[cell]["improvements"] = improvements(scores)
        ours = [row for row in rows.values() if row["budget"] == budget]
        limit = outcome.config.search.evaluations
        summary += [{"budget": budget} | entry for entry in summarise(ours, curves, limit)]
    common = outcome_of(outcome.config, outcome.workload, space, list(rows.values()))
    found = common | {"budgets": budgets, "protocol": dict(outcome.protocol), "summary": summary}
    return cast(Results, found)


def _add_latency(outcome: Outcome, rows: Sequence[Row]) -> None:
    """Measured at the end, in turns, once for all rows of the same widths; only the shapes matter.

    Where a forward pass takes seconds, the first seed's plans are timed only (``LatencySettings.every_seed``).
    """
    how = outcome.workload.adapter.latency
    timed = [row for row in rows if how.every_seed or row["seed"] == outcome.config.seed]
    widths = list(dict.fromkeys(tuple(row["widths"]) for row in timed))
    found: dict[tuple[int, ...], dict[int, float]] = {}
    for part in _parts(outcome.space, widths):
        shared: dict[str, Tensor] = {}
        models = {str(i): _cut(outcome, w, shared if how.share else None) for i, w in enumerate(part)}
        times = measure(
            models,
            outcome.workload.example_inputs,
            batch_sizes=how.batch_sizes,
            budget_seconds=LATENCY_SECONDS * len(part) / len(widths),
            warmup=how.warmup,
        )
        found |= {w: times[str(i)] for i, w in enumerate(part)}
    for row in timed:
        times_of_row = found[tuple(row["widths"])]
        row["latency_ms"] = {str(batch): round(ms, 4) for batch, ms in times_of_row.items()}


def _cut(outcome: Outcome, widths: Sequence[int], shared: dict[str, Tensor] | None) -> nn.Module:
    space = outcome.space
    plan = make_plan(space, importance=[np.zeros(g.units) for g in space.groups], widths=np.array(widths))
    return prune(outcome.workload.model, plan, shared=shared)


def _parts(space: PruningSpace, widths: Sequence[tuple[int, ...]]) -> Iterator[list[tuple[int, ...]]]:
    """Plans whose models fit into memory together."""
    part: list[tuple[int, ...]] = []
    size = 0.0
    for each in widths:
        needed = 4 * space.cost(np.array(each), "params")
        if part and size + needed > LATENCY_BYTES:
            yield part
            part, size = [], 0.0
        part.append(each)
        size += needed
    if part:
        yield part
