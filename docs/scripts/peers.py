"""Other libraries' own methods next to ours, by equal score calls -> docs/peers.md.

    python docs/scripts/peers.py [--only digits] [--data runs/cifar10-jpeg --checkpoint resnet20_cifar10.safetensors]

Runs `rlprune benchmark` for every workload, kept in --out and gone on with where it was stopped, and writes the page
from what is there. The images of CIFAR-10 (JPEG, an image folder) and a checkpoint of its ResNet-20 have to be named;
without them that workload is left out. --present runs nothing.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlprune.benchmarks import difference
from rlprune.report import comparison, markdown_table, read_results
from rlprune.utils import hardware

DOCS = Path(__file__).resolve().parents[1]
PEERS = ("fastnas", "tp_taylor", "tp_bn_scale", "depgraph")
METHODS = ("ppo", *PEERS, "sensitivity", "fisher", "uniform")
SOURCES = {
    "fastnas": "NVIDIA ModelOpt's FastNAS",
    "tp_taylor": "Torch-Pruning, Taylor",
    "tp_bn_scale": "Torch-Pruning, batch-norm scale",
    "depgraph": "Torch-Pruning, group norms",
}
CIFAR = (
    "model.train.epochs=6", "model.train.lr=0.01", "data.train=3000", "data.calibration=128", "data.validation=1000",
    "data.test=2000", "score.samples=400", "finish.candidates=3", "finish.epochs=1", "threads=1",
)  # fmt: skip


@dataclass(frozen=True)
class Study:
    """A benchmark: the shipped config, seeds, score calls of a search, options and settings."""

    config: str
    seeds: int
    evaluations: int
    options: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()

    def words(self, out: Path, more: Sequence[str] = (), methods: Sequence[str] = METHODS) -> list[str]:
        """The command line after `rlprune`."""
        words = [
            "benchmark",
            self.config,
            "--methods",
            ",".join(methods),
            "--evaluations",
            str(self.evaluations),
        ]
        words += ["--seeds", str(self.seeds), *self.options, "--out", str(out)]
        return [*words, *(["--set", *self.settings, *more] if self.settings or more else [])]


STUDIES = {
    "digits": Study("digits", 3, 80, ("--checkpoints", "3")),
    "cifar10_resnet20": Study("cifar10_resnet20", 1, 80, (), CIFAR),
}


def measured(name: str, options: argparse.Namespace) -> dict[str, Any] | None:
    """The results of a study, measured now where they are not there; None where its data is not named."""
    out = options.out / name
    if not (out / "results.json").is_file() and not options.present:
        more = [f"data.root={options.data}", f"model.checkpoint={options.checkpoint}"]
        if name == "digits":
            more = []
        elif options.data is None or options.checkpoint is None:
            return None
        words = [sys.executable, "-m", "rlprune", *STUDIES[name].words(out, more), "--progress", "none"]
        subprocess.run(words, check=True)
    found: dict[str, Any] | None = read_results(out) if (out / "results.json").is_file() else None
    return found


def section(name: str, results: Mapping[str, Any]) -> str:
    """What a study found."""
    study, (view,) = STUDIES[name], comparison.per_budget(results)
    sizes = ", ".join(f"{count} {split}" for split, count in results["workload"]["sizes"].items())
    command = study.words(Path("runs") / name, _more(name), results["protocol"]["methods"])
    models = "each with a dense model of its own" if study.options else "one dense model"
    seeds = f"{study.seeds} seeds, {models}" if study.seeds > 1 else "One seed, so no interval"
    parts = [
        f"## {results['workload']['name']}, {comparison.share(view)} of the {results['budget']['metric']}",
        f"{seeds}; at most {study.evaluations} score calls; {sizes} samples.",
        f"```sh\nrlprune {shlex.join(command)}\n```",
        markdown_table(*table(view)),
    ]
    if same := start_kept(view):
        parts.append(same)
    if (rows := duels(view)[1]) and study.seeds > 1:
        parts += ["Paired by seed, mean [95% interval] (seeds on which it is lower):", ""]
        parts += [markdown_table(duels(view)[0], rows)]
    return "\n\n".join(part for part in parts if part)


def table(view: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: the methods by the test loss after the fine-tune, the dense model first."""
    header = [
        "method", "by", "score calls", "cost left", "test loss", "test loss, fine-tuned", "test metric, fine-tuned",
        "seconds",
    ]  # fmt: skip
    dense = [row for row in view["rows"] if row["method"] == "dense"]
    full = view["budget"]["dense"]
    rows = []
    entries = sorted(view["summary"], key=lambda entry: entry["test_loss_finetuned"]["mean"])
    for entry in entries:
        own = [row for row in view["rows"] if row["method"] == entry["method"]]
        rows.append(
            [
                entry["method"],
                SOURCES.get(entry["method"], "rlprune"),
                f"{mean(own, 'evaluations'):.0f}",
                f"{mean(own, 'cost') / full:.1%}",
                *(
                    comparison.interval(entry[f])
                    for f in ("test_loss", "test_loss_finetuned", "test_finetuned")
                ),
                f"{entry['seconds']['mean']:.1f}",
            ]
        )
    if dense:
        losses = [f"{mean(dense, f):.4f}" for f in ("test_loss", "test_loss_finetuned", "test_finetuned")]
        rows.insert(0, ["dense", "–", "0", "100.0%", *losses, "–"])
    return header, rows


def start_kept(view: Mapping[str, Any]) -> str:
    """On how many seeds the row of FastNAS is not FastNAS's own plan but its one start; empty for none."""
    widths = {(row["method"], row["seed"]): row["widths"] for row in view["rows"]}
    seeds = [seed for method, seed in widths if method == "fastnas" and ("uniform", seed) in widths]
    kept = sum(widths["fastnas", seed] == widths["uniform", seed] for seed in seeds)
    if not kept:
        return ""
    return (
        f"**On {kept} of {len(seeds)} seeds the row of `fastnas` is the plan of `uniform`**: a search begins with it, "
        "validation preferred it to what FastNAS itself found, and no row shows that plan. There the row says nothing "
        "of FastNAS's own plan after the fine-tune."
    )


def mean(rows: Sequence[Mapping[str, Any]], field: str) -> float:
    return float(sum(row[field] for row in rows) / len(rows))


def duels(view: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: ppo and the rules minus FastNAS under the same seed."""
    by_seed: dict[str, dict[int, Any]] = {}
    for row in view["rows"]:
        by_seed.setdefault(row["method"], {})[row["seed"]] = row
    fields = {"test_loss": "test loss", "test_loss_finetuned": "test loss, fine-tuned"}
    rows = []
    for ours, theirs in [(m, "fastnas") for m in METHODS if m != "fastnas"] + [
        ("ppo", m) for m in ("tp_taylor", "sensitivity", "fisher")
    ]:
        if ours in by_seed and theirs in by_seed:
            cells = [
                comparison.against(difference(by_seed[ours], by_seed[theirs], f, higher=False))
                for f in fields
            ]
            rows.append([f"{ours} − {theirs}", *cells])
    return ["difference", *fields.values()], rows


def verdict(every: Mapping[str, Mapping[str, Any]]) -> str:
    """Who has the lowest mean test loss, before and after the fine-tune, in each study."""
    lines = []
    for results in every.values():
        (view,) = comparison.per_budget(results)
        named = []
        for field, when in (("test_loss", "before"), ("test_loss_finetuned", "after")):
            order = sorted(view["summary"], key=lambda entry: entry[field]["mean"])
            means = {entry["method"]: entry[field]["mean"] for entry in order}
            place = 1 + [*means].index("fastnas")
            best = order[0]["method"]
            named.append(
                f"{when} the fine-tune {best} is lowest ({means[best]:.4f}), ppo {means['ppo']:.4f}, fastnas "
                f"{means['fastnas']:.4f} (place {place} of {len(means)})"
            )
        lines.append(f"- {results['workload']['name']}, {comparison.share(view)}: {'; '.join(named)}.")
    return "\n".join(lines)


def whole(results: Mapping[str, Any] | None) -> bool:
    """Whether every method of a study was measured."""
    return results is not None and set(METHODS) <= set(results["protocol"]["methods"])


def missing(names: Sequence[str]) -> str:
    """What has not been measured, with the command."""
    if not names:
        return ""
    lines = [
        shlex.join(["rlprune", *STUDIES[name].words(Path("runs") / name, _more(name))]) for name in names
    ]
    text = "\n".join(lines)
    return f"## Open\n\nNot measured yet, or not with every method:\n\n```sh\n{text}\n```\n"


def _more(name: str) -> list[str]:
    """The settings that name data and checkpoint, as a page shows them."""
    if name == "digits":
        return []
    return ["data.root=cifar10-jpeg", "model.checkpoint=resnet20_cifar10.safetensors"]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(STUDIES), default=list(STUDIES), metavar="NAME")
    parser.add_argument("--present", action="store_true", help="run nothing: write what has been run")
    parser.add_argument("--data", type=Path, help="CIFAR-10 as an image folder")
    parser.add_argument("--checkpoint", type=Path, help="a checkpoint of its ResNet-20")
    parser.add_argument("--out", type=Path, default=Path("runs/peers"))
    options = parser.parse_args()
    found = {name: measured(name, options) for name in options.only}
    every = {name: results for name, results in found.items() if results is not None}
    facts = hardware()
    text = PAGE.format(
        machine=f"{facts['processor']}, 1 thread, torch {facts['libraries']['torch']}",
        verdict=verdict(every),
        studies="\n\n".join(section(name, results) for name, results in every.items()),
        missing=missing([name for name in STUDIES if not whole(every.get(name))]),
    )
    print(text)
    if set(options.only) == set(STUDIES):
        (DOCS / "peers.md").write_text(text, encoding="utf-8")
    return 0


PAGE = """# Outside peers

Written by `python docs/scripts/peers.py` ({machine};
nvidia-modelopt 0.47, torch-pruning 1.6); seeds from 0. Seconds were taken while other work ran.

Methods of other libraries, run by these libraries themselves, next to ours: the same dense models, splits, groups of
channels, repair, score and final fine-tune, the same exact budget, and at most as many score calls
([agents.md](agents.md) says how FastNAS and Torch-Pruning are asked). Validation picks each method's plan, the test
split is read once for each row, at the end. FastNAS asks for fewer scores where a smaller width of a layer cost
nothing. A search of rlprune scores the rules too and is charged for them. "Cost left" is counted by rlprune on the
model that was built. Cells: mean [95% interval over the seeds]; intervals of so few seeds are too narrow. Neither
FastNAS nor Torch-Pruning's pruners are there for language models.

{verdict}

{studies}

{missing}"""

if __name__ == "__main__":
    sys.exit(main())
