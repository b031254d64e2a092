"""An ImageNet network under rules and searches, without a fine-tune -> docs/imagenet-sample.md.

    PYTHONPATH=docs/scripts IMAGENET_SAMPLE=FOLDER rlprune benchmark docs/scripts/efficientnet_lite0.yaml \\
        --methods ppo,fisher,sensitivity,lamp,global_taylor,uniform --seeds 1 \\
        --set prune.importance=obs_fisher --out runs/efficientnet
    (the same with --methods ppo --seeds 3, to another folder; with --budgets 0.6 --seeds 3 and evopress too)
    rlprune benchmark digits --methods fisher,lamp,uniform,global_taylor --budgets 0.5 0.3 --seeds 3 --checkpoints 3 \\
        --set prune.importance=obs_fisher recovery.statistics=measured --out runs/digits-measured
    (both again with the other recovery.statistics, for the pairs of --statistics)
    python docs/scripts/imagenet.py runs/efficientnet ... [--statistics CORRECTED:MEASURED ...]

FOLDER: see docs/scripts/imagenet_sample.py. Nothing is measured here: each argument names a run; each pair of
--statistics two runs that differ in `recovery.statistics` alone.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rlprune import load_config
from rlprune.benchmarks import difference, spread
from rlprune.report import markdown_table, read_results
from rlprune.utils import hardware

DOCS = Path(__file__).resolve().parents[1]


def by_method(results: Mapping[str, Any], budget: float) -> dict[str, dict[int, Any]]:
    """{method: {seed: row}} at a budget, the lowest mean test loss first."""
    found: dict[str, dict[int, Any]] = {}
    for row in results["rows"]:
        if row["budget"] == budget:
            found.setdefault(row["method"], {})[row["seed"]] = row
    return dict(sorted(found.items(), key=lambda item: mean(item[1].values(), "test_loss")))


def mean(rows: Iterable[Mapping[str, Any]], field: str) -> float:
    values = [float(row[field]) for row in rows]
    return sum(values) / len(values)


def cell(rows: Mapping[int, Mapping[str, Any]], field: str) -> str:
    """Mean over the seeds, and its interval where they differ."""
    values = [float(row[field]) for row in rows.values()]
    found = spread(values)
    interval = f" [{found['low']:.4f}, {found['high']:.4f}]" if len(set(values)) > 1 else ""
    return f"{found['mean']:.4f}{interval}"


def section(run: Path) -> str:
    """The tables of a run, one a budget."""
    config, results = load_config(run / "config.yaml"), read_results(run)
    protocol, text = results["protocol"], ""
    for budget in (b["asked"] for b in results["budgets"]):
        table = []
        for method, rows in by_method(results, budget).items():
            spent = max(row["evaluations"] for row in rows.values())
            cells = [cell(rows, field) for field in ("score", "test_loss", "test")]
            table.append([method, str(spent), str(len(rows)), *cells])
        head = ["method", "evaluations", "seeds", "score", "test loss", "test accuracy"]
        dense = next(row for row in results["rows"] if row["kind"] == "dense")
        # Rows name what `auto` stood for; older ones had a ranking of their config's.
        ranking = next((row["importance"] for row in results["rows"] if row.get("importance")), None)
        ranking = ranking or config.prune.importance
        text += (
            f"## {budget:.0%} of the MACs, {protocol['seeds']} seed(s)\n\n"
            f"`prune.importance: {ranking}`, `recovery.statistics: {config.recovery.statistics}`, "
            f"searches of {protocol['evaluations']} evaluations on {config.score.samples} validation images. "
            f"Dense: test loss {dense['test_loss']:.4f}, accuracy {dense['test']:.4f}.\n\n"
            f"{markdown_table(head, table)}\n\n"
        )
    return text


def statistics(pairs: Iterable[str]) -> str:
    """Tables of pairs of runs, `recovery.statistics` being corrected in the first and measured in the second."""
    text = ""
    for pair in pairs:
        runs = [Path(part) for part in pair.split(":")]
        name = load_config(runs[0] / "config.yaml").name
        ours, theirs = (read_results(run) for run in runs)
        for budget in (b["asked"] for b in ours["budgets"]):
            a, b = by_method(ours, budget), by_method(theirs, budget)
            table = []
            for method in (m for m in a if m in b and m != "dense"):
                cells = [f"{mean(rows[method].values(), 'score'):.4f}" for rows in (a, b)]
                for field in ("test_loss", "test_loss_finetuned"):
                    change = difference(a[method], b[method], field, higher=False)
                    cells += [f"{mean(rows[method].values(), field):.4f}" for rows in (a, b)]
                    cells.append(
                        f"{change['mean']:+.4f} [{change['low']:+.4f}, {change['high']:+.4f}] "
                        f"({change['wins']} of {change['seeds']})"
                    )
                table.append([method, *cells])
            head = ["method", "score, corrected", "measured"]
            for label in ("test loss", "after the fine-tune"):
                head += [f"{label}, corrected", "measured", "difference"]
            text += f"### {name}, {budget:.0%} of the MACs\n\n{markdown_table(head, table)}\n\n"
    return text


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--statistics", nargs="*", default=[], metavar="CORRECTED:MEASURED")
    arguments = parser.parse_args()
    machine = hardware()
    text = PAGE.format(
        processor=machine["processor"], torch=machine["libraries"]["torch"],
        parts="".join(map(section, arguments.runs)).rstrip(), statistics=statistics(arguments.statistics).rstrip(),
    )  # fmt: skip
    (DOCS / "imagenet-sample.md").write_text(text, encoding="utf-8")
    return 0


PAGE = """# An ImageNet network without a fine-tune

Written by `python docs/scripts/imagenet.py` from runs of `rlprune benchmark` (the commands are at its head): one thread
of an {processor}, no GPU, torch {torch}, other programs on the cores.

EfficientNet-Lite0 with its published weights on 1,000 images of ImageNet at 160 pixels, one a class, which are from its
training set: losses and accuracies are flattered. 450 images are no training set, so that nothing is fine-tuned; 200 of
them are the calibration split, 250 others choose, 300 are the test split, which is read once for each row. One dense
model; seeds are those of the searches, and a rule's plan is the same for all of them. Cells: mean [95% BCa interval,
too narrow for three seeds]. FastNAS is not among the methods: ModelOpt 0.47 finds nothing to configure in this network,
whose convolutions are subclasses with a padding of their own.

{parts}

## Batch-norm statistics of few images

The recovery's step `bn` changes the dense model's own statistics by what a cut changes on the calibration images
(`recovery.statistics: corrected`); `measured` takes those of the images alone, as EagleEye does. Where nothing is cut
the former changes nothing. Differences are corrected minus measured (lower is better), paired by seed; in brackets on
how many seeds the former is lower.

{statistics}
"""

if __name__ == "__main__":
    sys.exit(main())
