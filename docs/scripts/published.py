"""The published methods of rlprune/configs/published/ next to their authors' settings -> docs/published.md.

    python docs/scripts/published.py [--only flap rl_pruner] [--out runs/published]

What the authors set stands in docs/scripts/published.yaml. Every config is run once, end to end and in small: a tiny
model on data that need no download, its own hyperparameters but for lengths and counts. Finished runs are kept in
--out. What such a run shows is that the pipeline works, not how good the method is.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from rlprune.report import markdown_table
from rlprune.utils import hardware, read_json

DOCS = Path(__file__).resolve().parents[1]
TABLE: dict[str, Any] = yaml.safe_load((DOCS / "scripts" / "published.yaml").read_text(encoding="utf-8"))
IMAGES = (
    "model.name=cifar_resnet20", "model.arguments={width: 8}", "model.weights=null", "model.checkpoint=null",
    "model.train.epochs=10", "data.name=digits", "data.root=null", "data.image_size=null", "data.calibration=200",
    "data.validation=400", "data.batch_size=256", "prune.round_to=1",
)  # fmt: skip
TEXT = (
    "model.name=tiny_llama",
    "model.arguments={layers: 6, hidden: 64, heads: 4, kv_heads: 2, intermediate: 128, vocab: 512}",
    "model.train.epochs=4", "model.train.lr=0.006", "model.train.batch_size=16", "model.train.weight_decay=0.01",
    "data.name=help_texts", "data.files={}", "data.sequence_length=64", "data.test_length=null", "data.calibration=64",
    "data.validation=64", "data.test=64",
)  # fmt: skip
TUNED = ("finish.steps=50", "finish.batch_size=16")
SMALL = {
    "amc": (
        *IMAGES,
        "search.evaluations=40",
        "search.amc.warmup=10",
        "finish.epochs=3",
        "finish.batch_size=64",
    ),
    "depgraph": (*IMAGES, "finish.epochs=3"),
    "eagleeye": (*IMAGES, "search.evaluations=20", "finish.epochs=3", "finish.batch_size=64"),
    "evopress": (
        *TEXT,
        "search.evaluations=40",
        "search.evopress_drop.initial=8",
        "search.evopress_drop.offspring=8",
    ),
    "fastforward": (*TEXT, "search.evaluations=40"),
    "adapt_pruner": (*TEXT, "rounds.steps=20", "finish.batch_size=16", "finish.lr=1e-3"),
    "compresso": (
        *TEXT,
        *TUNED,
        "data.prompt=Units of yours are being pruned.",
        "search.compresso.steps=300",
        "search.compresso.batch_size=8",
        "search.compresso.lr=1e-3",
    ),
    "bypass": (*TEXT, "data.train=null", "search.bypass_published.steps=300"),
    "flap": TEXT,
    **dict.fromkeys(("flap_ul_um", "flap_ul_mm", "flap_al_mm", "flap_ifv", "flap_wifn"), TEXT),
    "llm_pruner": (*TEXT, *TUNED),
    "rl_pruner": (
        *IMAGES,
        "rounds.count=5",
        "rounds.epochs=2",
        "search.evaluations=40",
        "finish.batch_size=64",
        "search.rl_pruner_published.batches=4",
        "search.rl_pruner_published.samples=5",
    ),
    "saap": (*TEXT, *TUNED),
    "shortgpt": TEXT,
    "spp": (*TEXT, *TUNED),
    "wanda_sp": TEXT,
}
"""What makes a run of each config small."""
NOT_BUILT = {
    "SliceGPT": (
        "arXiv 2401.15024: not built. A plan keeps units; SliceGPT keeps directions: the hidden states are turned "
        "by principal components, folded into the weights once the RMS norms' weights are, and the last ones are "
        "cut. A rotation of its own for each block, as published, needs a matrix in every shortcut, which no "
        "runtime here reads. One rotation for all blocks needs none, but is another method; plan, files and "
        "exactness proof would have to carry the rotation. Where the embeddings are tied, the last norm's weights, "
        "folded into the head, part the two: SmolLM2-135M would grow by 28 of its 135 million parameters first. "
        "[language-results.md](language-results.md) compares it there."
    ),
}


def entry(name: str) -> dict[str, Any]:
    """What the table says of a method; of a variant what is not its own is that of what it is like."""
    own: dict[str, Any] = TABLE[name]
    if "like" not in own:
        return own
    other = TABLE[own["like"]]
    known = {row[0] for row in own["values"]}
    values = own["values"] + [row for row in other["values"] if row[0] not in known]
    differences = own.get("differences", []) + other["differences"]
    return {**other, **own, "values": values, "differences": differences}


def arguments(name: str, out: Path) -> list[str]:
    """The command line of the small run of a config, after `rlprune`."""
    words = ["train", f"published/{name}", "--progress", "none", "--threads", "1", "--out", str(out)]
    return [*words, *(word for override in SMALL[name] for word in ("--set", override))]


def ran(name: str, runs: Path) -> dict[str, Any]:
    """What the small run of a config recorded, run now where it has not been."""
    out = runs / name
    if not (out / "results.json").is_file():
        subprocess.run(
            [sys.executable, "-m", "rlprune", *arguments(name, out)], check=True, stdout=subprocess.DEVNULL
        )
    found: dict[str, Any] = read_json(out / "results.json")
    return found


def last_line(results: dict[str, Any]) -> str:
    """What the small run ended in: dense model, after the cut, after the fine-tune."""
    rows = {row["kind"]: row for row in results["rows"]}
    dense, agent, about = rows["dense"], rows["agent"], results["workload"]
    left = agent["cost"] / results["budget"]["dense"]
    tuned = (
        f", {agent['test_finetuned']:.4g} after training" if agent["test_finetuned"] != agent["test"] else ""
    )
    done = f"{agent['rounds']} rounds of cut and training" if "rounds" in agent else "the cut"
    learned = agent.get("learning")
    read = f" and {learned['steps']} steps on {learned['tokens']:,} tokens" if learned else ""
    return (
        f"{about['model']} on {about['data']}, {left:.1%} of the {results['budget']['metric']} left, "
        f"{agent['evaluations']} evaluation(s){read}: {about['metric']} {dense['test']:.4g} of the dense model, "
        f"{agent['test']:.4g} after {done}{tuned}."
    )


def named(setting: str) -> str:
    return f"`{setting}`" if "." in setting else setting


def shown(value: object) -> str:
    return json.dumps(value) if not isinstance(value, str) else value


def section(name: str, runs: Path, present: bool = False) -> str:
    """The part of the page on one method; with ``present`` its run may be missing."""
    method = entry(name)
    values = method["values"]
    same = [[named(row[0]), shown(row[1]), row[2]] for row in values if len(row) == 3]
    other = [
        [named(row[0]), f"{shown(row[1])} ({row[2]})", shown(row[3]), row[4]]
        for row in values
        if len(row) == 5
    ]
    other += [[shown(cell) for cell in row] for row in method["differences"]]
    parts = [
        f"## {method['title']}",
        f"`rlprune train published/{name}` · {method['paper']} · code: {method['code']}",
        markdown_table(["setting", "published", "ours", "reason"], other),
    ]
    if same:
        parts += ["As published:", markdown_table(["setting", "value", "where it is read"], same)]
    style = ", ".join(f"`{setting}`" for setting in method["style"])
    parts += [f"Of this package, without a published value that could be read: {style}."]
    missing = present and not (runs / name / "results.json").is_file()
    return "\n\n".join([*parts, f"Small run: {'not yet.' if missing else last_line(ran(name, runs))}"])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(SMALL), default=list(SMALL), metavar="NAME")
    parser.add_argument("--present", action="store_true", help="run nothing: write what has been run")
    parser.add_argument("--out", type=Path, default=Path("runs/published"))
    options = parser.parse_args()
    facts = hardware()
    text = PAGE.format(
        machine=f"{facts['processor']}, 1 thread, torch {facts['libraries']['torch']}",
        methods="\n\n".join(section(name, options.out, options.present) for name in sorted(options.only)),
        missing=markdown_table(["method", "what is missing"], [list(row) for row in NOT_BUILT.items()]),
    )
    print(text)
    if set(options.only) == set(SMALL):
        (DOCS / "published.md").write_text(text, encoding="utf-8")
    return 0


PAGE = """# Published methods

Written by `python docs/scripts/published.py` on {machine}; seed 0.

`rlprune train published/NAME` runs a method of the literature with its authors' settings (`rlprune list configs`): the
method's own plan is final (`search.starts: none`), no rule joins it. Give your model and data by `--set`. A
test compares every number of these files with the table of the authors' values, `docs/scripts/published.yaml`. Below
is what differs, and why; "style" in a name says that the source could not be read well enough to call it published,
"second hand" that a value comes from notes on the source. Our own variants have other names ([agents.md](agents.md)).
The small runs, one seed on tiny models, show that the pipeline works, not how good a method is.

{methods}

## Not built

{missing}
"""

if __name__ == "__main__":
    sys.exit(main())
