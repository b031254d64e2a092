"""Two ways of ranking the units of a group, under the same methods -> docs/importances.md.

    rlprune benchmark digits --methods ppo,random,fisher,lamp,uniform,sensitivity --budgets 0.5 0.3 \\
        --checkpoints 3 --evaluations 100 --set prune.importance=taylor --out runs/digits-taylor
    rlprune benchmark digits ... --set prune.importance=obs_fisher --out runs/digits-obs_fisher
    python docs/scripts/importances.py runs/digits-taylor:runs/digits-obs_fisher ...

Nothing is measured here: each argument names two runs of one workload that differ in `prune.importance` alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlprune import load_config
from rlprune.benchmarks import difference
from rlprune.report import markdown_table, read_results
from rlprune.utils import hardware

DOCS = Path(__file__).resolve().parents[1]
FIELDS = {"test_loss": "test loss", "test_loss_finetuned": "after the fine-tune"}


def rows_of(results: Mapping[str, Any], budget: float) -> dict[str, dict[int, Any]]:
    """{method: {seed: row}} at a budget."""
    found: dict[str, dict[int, Any]] = {}
    for row in results["rows"]:
        if row["budget"] == budget:
            found.setdefault(row["method"], {})[row["seed"]] = row
    return found


def mean(rows: Mapping[int, Any], field: str) -> float:
    return sum(float(row[field]) for row in rows.values()) / len(rows)


def section(first: Path, second: Path) -> str:
    """A table for each budget of two runs."""
    configs, results = zip(
        *((load_config(run / "config.yaml"), read_results(run)) for run in (first, second)), strict=True
    )
    names = [config.prune.importance for config in configs]
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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN:RUN")
    arguments = parser.parse_args()
    machine = hardware()
    parts = [section(*map(Path, pair.split(":"))) for pair in arguments.runs]
    text = PAGE.format(
        processor=machine["processor"], torch=machine["libraries"]["torch"], parts="\n".join(parts)
    )
    (DOCS / "importances.md").write_text(text, encoding="utf-8")


PAGE = """# How units are ranked

Written by `python docs/scripts/importances.py` from runs of `rlprune benchmark` (the commands are at its head): one
thread of an {processor}, no GPU, torch {torch}, other programs on the cores.

`prune.importance` says which units of a group go first; every method of a run uses the same ranking. `taylor` is the
default of models of images; `obs_fisher` removes the unit whose loss costs the fewest expected nats, one after another
([expected-curves.md](expected-curves.md)). Scores are minus the divergence from the dense model (higher is better),
losses those of the test split before and after the same fine-tune. Differences are paired by seed, the second ranking
minus the first (lower is better), with a 95% BCa interval and the seeds on which the second is lower.

{parts}"""

if __name__ == "__main__":
    main()
