"""An ImageNet network under rules and searches, without a fine-tune -> docs/imagenet-sample.md.

    PYTHONPATH=docs/scripts IMAGENET_SAMPLE=FOLDER rlprune benchmark docs/scripts/efficientnet_lite0.yaml \\
        --methods ppo,evopress,fisher,fisher_probed,sensitivity,lamp,global_taylor,uniform --budgets 0.8 --seeds 3 \\
        --out runs/efficientnet-80
    (the same with --evaluations 200, and with --budgets 0.6, to other folders)
    rlprune benchmark digits --methods fisher,lamp,uniform,global_taylor --budgets 0.5 0.3 --seeds 3 --checkpoints 3 \\
        --set prune.importance=obs_fisher recovery.statistics=measured --out runs/digits-measured
    (both again with the other recovery.statistics, for the pairs of --statistics)
    python docs/scripts/imagenet.py runs/efficientnet-80 ... --commit HASH [--statistics CORRECTED:MEASURED ...]

FOLDER: see docs/scripts/imagenet_sample.py. Nothing is measured here: each argument names a run, whose rows are kept in
docs/imagenet-sample.json by budget and evaluations; a later run takes the place of an earlier one. Each pair of
--statistics names two runs that differ in `recovery.statistics` alone; without any their tables stay as they are.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from kept import Kept

from rlprune import load_config
from rlprune.benchmarks import difference, spread
from rlprune.report import markdown_table, read_results

DOCS = Path(__file__).resolve().parents[1]


def by_method(results: Mapping[str, Any], budget: float) -> dict[str, dict[int, Any]]:
    """{method: {seed: row}} at a budget, the lowest mean test loss first."""
    found: dict[str, dict[int, Any]] = {}
    for row in results["rows"]:
        if row.get("budget", budget) == budget and row.get("kind") != "dense":
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


def taken(run: Path, commit: str) -> dict[str, Any]:
    """{budget and evaluations: what the page says of a run at this budget}."""
    config, results = load_config(run / "config.yaml"), read_results(run)
    protocol, machine = results["protocol"], results["hardware"]
    dense = next(row for row in results["rows"] if row["kind"] == "dense")
    about = {
        "seeds": protocol["seeds"],
        "evaluations": protocol["evaluations"],
        "samples": config.score.samples,
        # Rows name what `auto` stood for.
        "importance": next(row["importance"] for row in results["rows"] if row.get("importance")),
        "statistics": config.recovery.statistics,
        "commit": commit,
        "hardware": f"{machine['processor']}, torch {machine['libraries']['torch']}",
        "dense": {name: dense[name] for name in ("test_loss", "test")},
    }
    found = {}
    for budget in (b["asked"] for b in results["budgets"]):
        rows = [
            {name: row[name] for name in ("method", "seed", "evaluations", "score", "test_loss", "test")}
            for by_seed in by_method(results, budget).values()
            for row in by_seed.values()
        ]
        found[f"{budget:.0%}, {protocol['evaluations']} evaluations"] = about | {
            "budget": budget,
            "rows": rows,
        }
    return found


def section(about: Mapping[str, Any]) -> str:
    """The table of one budget."""
    table = []
    for method, rows in by_method(about, about["budget"]).items():
        cells = [cell(rows, field) for field in ("score", "test_loss", "test")]
        table.append([method, str(max(row["evaluations"] for row in rows.values())), str(len(rows)), *cells])
    head = ["method", "evaluations", "seeds", "score", "test loss", "test accuracy"]
    dense, scored = about["dense"], about["samples"] or "all"
    return (
        f"## {about['budget']:.0%} of the MACs, {about['evaluations']} evaluations\n\n"
        f"`prune.importance: {about['importance']}`, `recovery.statistics: {about['statistics']}`, "
        f"searches on {scored} validation images, {about['seeds']} seeds; code of commit "
        f"{about['commit']}; {about['hardware']}. "
        f"Dense: test loss {dense['test_loss']:.4f}, accuracy {dense['test']:.4f}.\n\n"
        f"{markdown_table(head, table)}\n\n"
    )


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
    parser.add_argument("runs", nargs="*", type=Path)
    parser.add_argument("--commit", help="that the runs are of")
    parser.add_argument("--statistics", nargs="*", default=[], metavar="CORRECTED:MEASURED")
    arguments = parser.parse_args()
    if arguments.runs and not arguments.commit:
        parser.error("--commit: name the commit whose code the runs are of")
    kept = Kept(DOCS / "imagenet-sample.json")
    for run in arguments.runs:
        for key, about in taken(run, arguments.commit).items():
            kept.keep(key, about, f"{len(about['rows'])} rows")
    page = DOCS / "imagenet-sample.md"
    tables = (
        statistics(arguments.statistics) or page.read_text(encoding="utf-8").split(STATISTICS)[1].lstrip()
    )
    parts = "".join(section(kept.cells[key]) for key in sorted(kept.cells, reverse=True))
    page.write_text(
        PAGE.format(parts=parts.rstrip()) + f"{STATISTICS}\n\n{tables.rstrip()}\n", encoding="utf-8"
    )
    return 0


STATISTICS = "how many seeds the former is lower."
PAGE = """# An ImageNet network without a fine-tune

Written by `python docs/scripts/imagenet.py` from runs of `rlprune benchmark` (the commands are at its head): one thread
of a CPU, no GPU, other programs on the cores.

EfficientNet-Lite0 with its published weights on 1,000 images of ImageNet at 160 pixels, one a class, which are from its
training set: losses and accuracies are flattered. 450 images are no training set, so that nothing is fine-tuned; 200 of
them are the calibration split, 250 others choose, 300 are the test split, which is read once for each row. One dense
model; seeds are those of the searches, and a rule's plan is the same for all of them. Cells: mean [95% BCa interval,
too narrow for three seeds]. FastNAS is not among the methods: ModelOpt 0.47 finds nothing to configure in this network,
whose convolutions are subclasses with a padding of their own.

300 images settle no small difference: with code of commit fbc8506, 150 scored images and 60 evaluations at 80%,
`fisher_probed` ended at a test loss of 0.831 (score -0.189) and `ppo` at 0.927 [0.859, 1.007] (score -0.213).

{parts}

## Batch-norm statistics of few images

The recovery's step `bn` changes the dense model's own statistics by what a cut changes on the calibration images
(`recovery.statistics: corrected`); `measured` takes those of the images alone, as EagleEye does. Where nothing is cut
the former changes nothing. Differences are corrected minus measured (lower is better), paired by seed; in brackets on
"""

if __name__ == "__main__":
    sys.exit(main())
