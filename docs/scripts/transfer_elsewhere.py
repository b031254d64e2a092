"""A learned policy where more than the seed is another one -> docs/transfer-elsewhere.md.

    python docs/scripts/transfer_elsewhere.py [--config digits] [--budget 0.3] [--policies runs/transfer]

The policies of docs/scripts/transfer.py (which are trained where `--policies` does not hold them) are applied to
checkpoints of another training recipe, at another budget, of another depth and of another data set, against the same
ways without them. Finished parts are kept in --out, so that a stopped run goes on where it was.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transfer import DOCS, TRAINED, Way, experiment, percent, policies, recorded, table, trained, ways

from rlprune import Config, load_config
from rlprune.agents import PROBES, PortablePolicy
from rlprune.experiments import Experiment
from rlprune.report import markdown_table
from rlprune.utils import hardware


@dataclass(frozen=True)
class Place:
    """Checkpoints that the policies were not made for: what is another one, and the settings that make it so."""

    title: str
    text: str
    settings: tuple[str, ...]


PLACES = {
    "recipe": Place(
        "Another training recipe",
        "Twice the epochs at a fifth of the learning rate, batches of 32 images, label smoothing 0.1.",
        ("model.train.epochs=40", "model.train.lr=0.02", "model.train.batch_size=32",
         "model.train.label_smoothing=0.1"),
    ),
    "budget": Place(
        "Another budget",
        "The policies were made for {budget}% of the MACs and are asked for 40%.",
        ("budget.target=0.4",),
    ),
    "depth": Place(
        "Another depth",
        "ResNet-32 (18 groups) instead of ResNet-20 (12 groups). Widths cannot be copied from one to the other, and "
        "the builds start from the network's plan and the rules' alone.",
        ("model.name=cifar_resnet32",),
    ),
    "data": Place(
        "Another data set",
        "Fashion-MNIST at 14x14 pixels (4,000 training images, 12 epochs) instead of 8x8 digits.",
        ("data.name=fashion_mnist", "data.image_size=14", "data.train=4000", "data.test=1000", "model.train.epochs=12"),
    ),
}  # fmt: skip


def brought(widths: Any, target: Experiment) -> Any:
    """Widths of another checkpoint at the target's budget."""
    shares = np.maximum(1.0 - np.array(widths) / target.space.widths, 1e-4)
    return target.space.project(shares, target.budget, target.metric)


def studies(arguments: Any) -> dict[str, dict[str, dict[str, Way]]]:
    """Every way on every checkpoint of every place: {place: {checkpoint: {name: way}}}."""
    settings = [f"budget.target={arguments.budget}", f"search.evaluations={arguments.evaluations}"]
    config = load_config(arguments.config, settings)
    together = load_config(arguments.config, [*settings, f"search.evaluations={arguments.train_evaluations}"])
    folder = f"{arguments.config}-{arguments.budget}-{arguments.evaluations}"
    known, plans = policies(config, together, arguments.policies / folder)
    architecture = experiment(config, TRAINED[0]).space.fingerprint
    results = {}
    for place in arguments.places:
        there = load_config(arguments.config, [*settings, *PLACES[place].settings])
        results[place] = study(there, known, plans, architecture, arguments.out / folder / place, arguments)
    return results


def study(
    config: Config,
    known: dict[str, PortablePolicy],
    plans: dict[str, Any],
    architecture: str,
    out: Path,
    arguments: Any,
) -> dict[str, dict[str, Way]]:
    """Every way on every checkpoint of a place: {checkpoint: {name: way}}."""
    result = {}
    for seed in arguments.seeds:
        target = experiment(config, seed)
        full = trained(config, [target], out / f"full-{seed}")
        same = target.space.fingerprint == architecture
        here = {name: brought(widths, target) for name, widths in plans.items()} if same else {}
        found = ways(target, known, here, full, [PROBES * len(target.space.groups)], arguments.refine)
        result[target.name] = recorded(out / f"ways-{seed}.json", found)
    return result


def summary(results: dict[str, dict[str, dict[str, Way]]]) -> str:
    """Shares of the mean gain, one line a way and two columns a place."""
    names: dict[str, list[str]] = {}
    for result in results.values():
        for name in next(iter(result.values())):
            names.setdefault(general(name), []).append(name)
    lines = []
    for name in names:
        line = [name]
        for result in results.values():
            found = list(result.values())
            exact = [n for n in found[0] if general(n) == name]
            line += [percent(found, exact[0], of) if exact else "–" for of in ("score", "test")]
        lines.append(line)
    heads = [f"{PLACES[place].title.lower()}, {of}" for place in results for of in ("validation", "test")]
    return markdown_table(["", *heads], lines)


def general(name: str) -> str:
    """The name of a way without its number of builds."""
    head, _, rest = name.partition(" (")
    return head + rest.partition(")")[2]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", default="digits")
    parser.add_argument("--budget", default="0.3", help="of the policies, and of all places but one")
    parser.add_argument("--evaluations", type=int, default=300, help="of a full search")
    parser.add_argument("--train-evaluations", type=int, default=205, help="per training checkpoint")
    parser.add_argument("--refine", type=int, default=20, help="evaluations on an unseen checkpoint")
    parser.add_argument("--places", nargs="+", choices=list(PLACES), default=list(PLACES))
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[101, 102, 103], help="of the unseen checkpoints"
    )
    parser.add_argument("--policies", type=Path, default=Path("runs/transfer"), help="--out of transfer.py")
    parser.add_argument("--out", type=Path, default=Path("runs/transfer-elsewhere"))
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    kept = f"{100 * float(arguments.budget):.0f}"
    results = studies(arguments)
    if set(arguments.places) != set(PLACES):
        return 0
    parts = [
        f"## {PLACES[place].title}\n\n{PLACES[place].text.format(budget=kept)}\n\n{table(result, 'score')}\n\n"
        f"The same plans on the test split, whose images no way has seen:\n\n{table(result, 'test')}\n"
        for place, result in results.items()
    ]
    text = PAGE.format(
        config=arguments.config, budget=arguments.budget, kept=kept, evaluations=arguments.evaluations,
        train_evaluations=arguments.train_evaluations, refine=arguments.refine,
        seeds=" ".join(map(str, arguments.seeds)), checkpoints=len(arguments.seeds), trained=len(TRAINED),
        summary=summary(results),
        parts="\n".join(parts), threads=arguments.threads, torch=torch.__version__, processor=hardware()["processor"],
    )  # fmt: skip
    (DOCS / "transfer-elsewhere.md").write_text(text, encoding="utf-8")
    return 0


PAGE = """# A policy where more than the seed is another one

Written by `python docs/scripts/transfer_elsewhere.py --config {config} --budget {budget} --evaluations {evaluations}
--train-evaluations {train_evaluations} --refine {refine} --seeds {seeds}`
(torch {torch}, {processor}, {threads} thread(s)).

The policies of [transfer.md](transfer.md), trained on ResNet-20 of digits at {kept}% of the MACs (one checkpoint,
and {trained} of them), on checkpoints that differ from those by more than the seed; what the rows mean stands there.
Every place has {checkpoints} checkpoints, a full search on each, and eight builds a group. Nothing was chosen by what
came out here.

Shares of the mean gain of the full search over the best rule (hindsight):

{summary}

{parts}"""

if __name__ == "__main__":
    sys.exit(main())
