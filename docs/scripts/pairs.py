"""Two benchmarks that differ in one setting, method by method and seed by seed, where several pages compare such."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from pathlib import Path
from typing import Any

from rlprune import Config, load_config
from rlprune.benchmarks import difference
from rlprune.report import markdown_table, read_results

FIELDS = {"test_loss": "test loss", "test_loss_finetuned": "after the fine-tune"}
Run = tuple[Config, Mapping[str, Any]]
Runs = tuple[Run, Run]


def read(pair: str) -> Runs:
    """The settings and results of both runs of RUN:RUN."""
    first, second = (
        (load_config(run / "config.yaml"), read_results(run)) for run in map(Path, pair.split(":"))
    )
    return first, second


def value(config: Config, setting: str) -> str:
    """What a config has for a setting by dotted name."""
    return str(reduce(getattr, setting.split("."), config))


def rows_of(results: Mapping[str, Any], budget: float) -> dict[str, dict[int, Any]]:
    """{method: {seed: row}} at a budget."""
    found: dict[str, dict[int, Any]] = {}
    for row in results["rows"]:
        if row["budget"] == budget:
            found.setdefault(row["method"], {})[row["seed"]] = row
    return found


def mean(rows: Mapping[int, Any], field: str) -> float:
    return sum(float(row[field]) for row in rows.values()) / len(rows)


def summary(runs: Runs, setting: str) -> str:
    """What the tables of two runs say, a line for each budget."""
    (config, first), (other, second) = runs
    lines = []
    for budget in (b["asked"] for b in first["budgets"]):
        ours, theirs = rows_of(first, budget), rows_of(second, budget)
        methods = sorted(set(ours) & set(theirs) - {"dense"})
        said = []
        for field, label in FIELDS.items():
            pairs = [
                {i: rows[m][seed] for i, (m, seed) in enumerate((m, s) for m in methods for s in ours[m])}
                for rows in (theirs, ours)
            ]
            change = difference(*pairs, field, higher=False)
            lower = sum(mean(theirs[m], field) < mean(ours[m], field) for m in methods)
            interval = f"{change['mean']:+.4f} [{change['low']:+.4f}, {change['high']:+.4f}]"
            said.append(f"{label} lower for {lower} of {len(methods)} methods, mean difference {interval}")
        name = f"{config.name} at {budget:.0%}"
        against = f"{value(other, setting)} against {value(config, setting)}"
        lines.append(f"- {name}, {against}: {'; '.join(said)}.")
    return "\n".join(lines)


def section(runs: Runs, setting: str) -> str:
    """A table for each budget of two runs."""
    configs, results = zip(*runs, strict=True)
    names = [value(config, setting) for config in configs]
    protocol = results[0]["protocol"]
    text = f"## {configs[0].name}\n"
    for budget in (b["asked"] for b in results[0]["budgets"]):
        ours, theirs = (rows_of(r, budget) for r in results)
        table = []
        for method in sorted(set(ours) & set(theirs), key=lambda m: mean(theirs[m], "test_loss")):
            cells = [method, *(f"{mean(rows[method], 'score'):.4f}" for rows in (ours, theirs))]
            for field in FIELDS:
                change = difference(theirs[method], ours[method], field, higher=False)
                interval = f"[{change['low']:+.4f}, {change['high']:+.4f}]"
                cells += [*(f"{mean(rows[method], field):.4f}" for rows in (ours, theirs))]
                cells += [f"{change['mean']:+.4f} {interval} ({change['wins']} of {change['seeds']})"]
            table.append(cells)
        head = ["method", *(f"score, {name}" for name in names)]
        for label in FIELDS.values():
            head += [*(f"{label}, {name}" for name in names), "difference"]
        text += (
            f"\n{budget:.0%} of the {results[0]['budget']['metric']}, {protocol['seeds']} seeds over "
            f"{protocol.get('checkpoints', 1)} dense models, searches of {protocol['evaluations']} evaluations:\n\n"
            f"{markdown_table(head, table)}\n"
        )
    return text
