"""PPO against the rules and random search on several workloads and budgets -> docs/results.md.

    python docs/scripts/results.py [--configs digits fashion_mnist_resnet20] [--budgets 0.5 0.3]
                                   [--seeds 3] [--evaluations 300] [--jobs 1] [--set KEY=VALUE ...]

Each workload is one `rlprune benchmark`; finished cells in --out are reused.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from rlprune import benchmark, comparison
from rlprune.config import load_config
from rlprune.report import markdown_table

DOCS = Path(__file__).resolve().parents[1]
README = DOCS.parent / "README.md"
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"


def verdict(summary: list[dict[str, Any]], agent: str = "ppo") -> str:
    """One sentence for each claim: above the best rule on every seed, above random search on average."""
    entry = next(entry for entry in summary if entry["method"] == agent)
    rule = next(e["method"] for e in summary if e["best_rule"])
    lines = []
    for label, name, every in (
        ("best rule", f"the best rule ({rule})", True),
        ("random", "random search", False),
    ):
        found = entry["against"].get(label)
        if found is None:
            continue
        holds = found["wins"] == found["seeds"] if every else found["mean"] > 0
        lines.append(
            f"- {agent}'s score {'is' if holds else 'is **not**'} above that of {name} "
            f"{'on every seed' if every else 'on average'}: {found['wins']} of {found['seeds']} seeds, paired "
            f"difference {found['mean']:+.4f} (range {found['min']:+.4f} to {found['max']:+.4f})"
        )
    return "\n".join(lines)


def section(name: str, results: dict[str, Any], settings: list[str]) -> str:
    """Heading, what ran where, the verdict and the table of one workload and budget."""
    workload, hardware = results["workload"], results["hardware"]
    sizes = ", ".join(f"{count} {split}" for split, count in workload["sizes"].items())
    dense = next(row for row in results["rows"] if row["method"] == "dense")
    extra = f" with {', '.join(settings)}" if settings else ""
    return (
        f"## {workload['name']}, {comparison.share(results)} of the {results['budget']['metric']}\n\n"
        f"Config `{name}`{extra}; {sizes} images; {hardware['device']} ({hardware['processor']}, "
        f"{hardware['threads']} threads). Dense: test {dense['test']:.4f}, test loss {dense['test_loss']:.4f}; "
        f"after the same fine-tune {dense['test_finetuned']:.4f} and {dense['test_loss_finetuned']:.4f}.\n\n"
        f"{verdict(results['summary'])}\n\n{markdown_table(*comparison.headline(results))}\n\n"
        f"{markdown_table(*comparison.paired(results))}\n"
    )


def headline(results: dict[str, Any]) -> list[str]:
    """One line of the README's table: the methods that people ask about, score and test loss after the fine-tune."""
    summary = {entry["method"]: entry for entry in results["summary"]}
    rule = next(name for name, entry in summary.items() if entry["best_rule"])
    cells = [f"{results['workload']['name']}, {comparison.share(results)}"]
    for name in ("uniform", rule, "random", "ppo"):
        score, loss = summary[name]["score"]["mean"], summary[name]["test_loss_finetuned"]["mean"]
        cells.append(f"{score:.3f} / {loss:.3f}" + (f" ({name})" if name == rule else ""))
    return cells


def write_readme(lines: list[list[str]], command: str, seeds: int, evaluations: int, processor: str) -> None:
    """Put the table between the marks of the README."""
    header = ["workload, MACs kept", "uniform", "best rule", "random search", "PPO"]
    text = (
        f"Score (−KL to the dense model on validation, 0 is the dense model) / test loss after the same fine-tune; "
        f"mean of {seeds} seeds, {evaluations} evaluations for each search, on {processor}. Written by "
        f"`{command}`; ranges, accuracies and all rules are in [docs/results.md](docs/results.md).\n\n"
        f"{markdown_table(header, lines)}"
    )
    before, rest = README.read_text(encoding="utf-8").split(BEGIN)
    README.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--configs", nargs="+", default=["digits", "fashion_mnist_resnet20"])
    parser.add_argument("--budgets", nargs="+", default=["0.5", "0.3"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--evaluations", type=int, default=300)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--methods", nargs="+", help="all by default; ppo, random and the rules are needed")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", dest="settings")
    parser.add_argument(
        "--doc", default="results.md", help="file in docs/; results.md goes into the README too"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/results"))
    arguments = parser.parse_args()
    command = " ".join(["python docs/scripts/results.py", *sys.argv[1:]])
    parts: list[str] = []
    lines: list[list[str]] = []
    for name in arguments.configs:
        config = load_config(name, arguments.settings)
        results = benchmark.run(
            config, arguments.methods, arguments.seeds, arguments.evaluations, arguments.out / name,
            budgets=arguments.budgets, jobs=arguments.jobs,
        )  # fmt: skip
        for view in comparison.per_budget(results):
            parts.append(section(name, view, arguments.settings))
            lines.append(headline(view))
            print(parts[-1], flush=True)
        text = PAGE.format(
            command=command, torch=torch.__version__,
            seeds=arguments.seeds, evaluations=arguments.evaluations, parts="\n".join(parts),
        )  # fmt: skip
        (DOCS / arguments.doc).write_text(text, encoding="utf-8")
        if arguments.doc == "results.md":
            processor = results["hardware"]["processor"]
            write_readme(lines, command, arguments.seeds, arguments.evaluations, processor)
    return 0


PAGE = """# Results

Written by `{command}` (torch {torch}).

Every method goes through the same door: the same workload, recovery, starts (uniform and the rules, charged)
and final fine-tune; each agent may have {evaluations} distinct plans scored, under each of {seeds} seeds. The
score is that of the plan that validation chose, before any rule joins as a fallback (nats, 0 is the dense
model); cells show the mean over the seeds and its 95% interval (bootstrap). A rule's plan is the same for every
seed, its fine-tune is not. Differences are paired by seed; in brackets the seeds on which the method is strictly
better.

{parts}"""

if __name__ == "__main__":
    sys.exit(main())
