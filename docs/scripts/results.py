"""PPO against the rules and random search on several workloads and budgets -> docs/results.md.

    python docs/scripts/results.py [--configs digits fashion_mnist_resnet20] [--budgets 0.5 0.3]
                                   [--seeds 3] [--evaluations 300] [--set KEY=VALUE ...]

Each workload and budget is one `rlprune benchmark`; finished cells in --out are reused.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from rlprune import benchmark
from rlprune.config import load_config

DOCS = Path(__file__).resolve().parents[1]


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


def section(name: str, budget: str, results: dict[str, Any], settings: list[str]) -> str:
    """Heading, what ran where, the verdict and the table of one workload and budget."""
    workload, hardware = results["workload"], results["hardware"]
    sizes = ", ".join(f"{count} {split}" for split, count in workload["sizes"].items())
    dense = next(row for row in results["rows"] if row["method"] == "dense")
    extra = f" with {', '.join(settings)}" if settings else ""
    return (
        f"## {workload['name']}, {100 * float(budget):.0f}% of the {results['budget']['metric']}\n\n"
        f"Config `{name}`{extra}; {sizes} images; {hardware['device']} ({hardware['processor']}, "
        f"{hardware['threads']} threads). Dense: test {dense['test']:.4f}, test loss {dense['test_loss']:.4f}; "
        f"after the same fine-tune {dense['test_finetuned']:.4f} and {dense['test_loss_finetuned']:.4f}.\n\n"
        f"{verdict(results['summary'])}\n\n{benchmark.markdown(results)}\n"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--configs", nargs="+", default=["digits", "fashion_mnist_resnet20"])
    parser.add_argument("--budgets", nargs="+", default=["0.5", "0.3"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--evaluations", type=int, default=300)
    parser.add_argument("--methods", nargs="+", help="all by default; ppo, random and the rules are needed")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", dest="settings")
    parser.add_argument("--out", type=Path, default=Path("runs/results"))
    arguments = parser.parse_args()
    parts = []
    for name in arguments.configs:
        for budget in arguments.budgets:
            config = load_config(name, [*arguments.settings, f"budget.target={budget}"])
            out = arguments.out / f"{name}-{budget}"
            results = benchmark.run(config, arguments.methods, arguments.seeds, arguments.evaluations, out)
            parts.append(section(name, budget, results, arguments.settings))
            print(parts[-1], flush=True)
            text = PAGE.format(
                command=" ".join(["python docs/scripts/results.py", *sys.argv[1:]]), torch=torch.__version__,
                seeds=arguments.seeds, evaluations=arguments.evaluations, parts="\n".join(parts),
            )  # fmt: skip
            (DOCS / "results.md").write_text(text, encoding="utf-8")
    return 0


PAGE = """# Results

Written by `{command}` (torch {torch}).

Every method goes through the same door: the same workload, recovery, starts (uniform and the rules, charged)
and final fine-tune; each agent may have {evaluations} distinct plans scored, under each of {seeds} seeds. The
score is that of the plan that validation chose, before any rule joins as a fallback (nats, 0 is the dense
model); cells show the mean [lowest, highest] over the seeds. A rule's plan is the same for every seed, its
fine-tune is not. Differences are paired by seed; in brackets the seeds on which the method is strictly better.

{parts}"""

if __name__ == "__main__":
    sys.exit(main())
