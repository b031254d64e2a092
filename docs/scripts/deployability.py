"""What deployability costs: the same search on a language model in the spaces of several runtimes.

    python docs/scripts/deployability.py --model FILE.gguf --valid wikitext2_valid.txt --test wikitext2_test.txt \
        --out runs/deployability run
    python docs/scripts/deployability.py ... --out runs/deployability write

Each runtime's search is a run of its own in the --out folder; a killed one goes on where it was, and what is finished
is not done again. No fine-tune: the perplexities are those of the cut and reconstructed models. `--runtime` and
`--set` choose others; `write` puts the table of what is finished into docs/runtimes.md.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import rlprune
from rlprune.config import Config, load_config
from rlprune.report import markdown_table

DOC = Path(__file__).resolve().parents[1] / "runtimes.md"
MARKS = ("<!-- deployability -->", "<!-- /deployability -->")
RUNTIMES = {
    "any": [],
    "llama.cpp": [],
    "vllm": [],
    "vllm, drop": ["prune.drop=true"],
    "uniform": [],
}
"""Row of the table -> settings in addition to ``prune.runtime``."""
FEWER = (
    *(
        "data.calibration=16",
        "data.validation=12",
        "data.test=10",
        "data.sequence_length=128",
        "score.samples=6",
    ),
    *("search.evaluations=40", "search.ppo.surrogate_steps=2048"),
    *("finish.candidates=2", "finish.rules=false", "threads=1"),
)
"""What makes a search of the shipped config short."""


def settings(args: argparse.Namespace, row: str) -> Config:
    return load_config(
        "smollm2_135m",
        [
            f"model.name=hf:{args.model}",
            f"data.files.calibration={args.valid}",
            f"data.files.test={args.test}",
            f"prune.runtime={row.partition(',')[0]}",
            *RUNTIMES[row],
            *FEWER,
            *args.set,
        ],
    )


def folder(args: argparse.Namespace, row: str) -> Path:
    return Path(args.out) / row.replace(", ", "-")


def run(args: argparse.Namespace) -> None:
    for row in args.runtimes:
        out = folder(args, row)
        if not (out / "results.json").is_file():
            rlprune.train(settings(args, row), out, resume=out.exists())
        print(f"{row}: done, {out}", flush=True)


def shape(plan: Mapping[str, Any], kind: str) -> str:
    """The widths of a kind of groups: one number, or the range and how many differ."""
    widths = [w for g, w in zip(plan["groups"], plan["widths"], strict=True) if g["kind"] == kind]
    if not widths:
        return "as they are"
    if len(set(widths)) == 1:
        return f"{widths[0]} in all"
    if len(set(widths)) <= 4:
        return ", ".join(f"{n} x {w}" for w, n in sorted(Counter(widths).items(), reverse=True))
    return f"{min(widths)} to {max(widths)}, {len(set(widths))} sizes"


def facts(args: argparse.Namespace, row: str) -> dict[str, Any]:
    """A finished run as a row of the table."""
    out = folder(args, row)
    results = json.loads((out / "results.json").read_text())
    plan = json.loads((out / "pruned" / "plan.json").read_text())
    rows = {entry["method"]: entry for entry in results["rows"]}
    config = load_config(out / "config.yaml")
    found = rows[config.search.agent]
    return {
        "prune.runtime": row,
        "neurons by block": shape(plan, "ffn"),
        "key-value heads": shape(plan, "attention"),
        "of params": f"{plan['cost']['params'] / plan['dense_cost']['params']:.4f}",
        "evaluations": found.get("evaluations"),
        "score": f"{found['score']:.4f}",
        "perplexity": f"{found['test']:.2f}",
        "dense": f"{rows['dense']['test']:.2f}",
        "hardware": results["hardware"],
        "config": config,
    }


def write(args: argparse.Namespace) -> None:
    rows = [facts(args, row) for row in args.runtimes if (folder(args, row) / "results.json").is_file()]
    if not rows:
        raise SystemExit(f"deployability: no finished run in {args.out}; `run` first")
    head = [name for name in rows[0] if name not in ("dense", "hardware", "config")]
    table = markdown_table(head, [[str(row[name]) for name in head] for row in rows])
    config = rows[0]["config"]  # the runs' own, whatever --set says now
    if any((row["config"].data, row["config"].score) != (config.data, config.score) for row in rows):
        raise SystemExit(
            f"deployability: the runs in {args.out} were made on different data; they are no table"
        )
    data, hardware = config.data, rows[0]["hardware"]
    text = (
        f"SmolLM2-135M-Instruct, {config.budget.target:.0%} of the {config.budget.metric}, seed {config.seed}, "
        f"{config.search.evaluations} evaluations of `{config.search.agent}` at most, {data.calibration} sequences of "
        f"{data.sequence_length} tokens for calibration, {config.score.samples} for a score, no fine-tune. "
        f"Perplexity on the first {data.test} windows of {data.test_length} tokens of WikiText-2's test text; dense "
        f"{rows[0]['dense']}. "
        f"{hardware['processor']}, {hardware['threads']} thread, torch {hardware['libraries']['torch']}.\n\n{table}"
    )
    page = DOC.read_text(encoding="utf-8")
    before, _, rest = page.partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    DOC.write_text(f"{before}{MARKS[0]}\n\n{text}\n{MARKS[1]}{after}", encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", required=True, help="a folder or .gguf file of SmolLM2-135M-Instruct")
    parser.add_argument("--valid", required=True, help="text for calibration and validation")
    parser.add_argument("--test", required=True, help="text for the perplexity")
    parser.add_argument("--out", required=True)
    parser.add_argument(
        "--runtime", action="append", choices=list(RUNTIMES), help="of all, these (may be repeated)"
    )
    parser.add_argument("--set", nargs="*", default=[], help="further settings, a.b=c")
    parser.add_argument("do", choices=("run", "write"))
    args = parser.parse_args(argv)
    args.runtimes = args.runtime or list(RUNTIMES)
    {"run": run, "write": write}[args.do](args)


if __name__ == "__main__":
    main()
