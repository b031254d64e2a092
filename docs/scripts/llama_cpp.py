"""Pruned SmolLM2 in llama.cpp: perplexity compared with transformers, greedy text, tokens a second, sizes.

    python docs/scripts/llama_cpp.py --model FILE.gguf --valid wikitext2_valid.txt --test wikitext2_test.txt \
        --out runs/llama_cpp --doc docs/llama-cpp.md

Needs llama-cpp-python. Every plan and figure is kept in the --out folder and not made again: a stopped run goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers import AutoTokenizer

from rlprune import Config, PruningSpace, load, load_config
from rlprune.evaluation import EvaluationLog
from rlprune.experiments import choose, prepare_experiment, run_agent
from rlprune.language import greedy_tokens, run_llama_cpp
from rlprune.report import markdown_table
from rlprune.utils import Console, hardware, write_json_atomic, write_text_atomic

DTYPES = ("f16", "q8_0")
NAMES = {
    "dense": "dense",
    "learned": "learned, 80% of the parameters",
    "parts": "two attentions and one FFN dropped, unequal heads",
}
PROMPT = "The history of the city begins with a small village on the river, which"
GENERATED = 32
LENGTH = 512
DECODED = 64
# Of the plan by hand: block -> what is left of its three key-value heads, of its 1,536 neurons.
HEADS = {4: 2, 9: 0, 13: 1, 17: 0, 22: 2}
NEURONS = {3: 1280, 7: 1024, 12: 0, 16: 1408, 20: 896, 26: 1152}


def settings(args: argparse.Namespace, *more: str) -> Config:
    overrides = [
        f"model.name=hf:{args.model}",
        f"data.files.calibration={args.valid}",
        f"data.files.test={args.test}",
        f"data.calibration={args.calibration}",
        "data.sequence_length=128",
        "data.validation=32",
        "prune.runtime=llama.cpp",
        f"search.evaluations={args.evaluations}",
        "threads=1",
    ]
    return load_config("smollm2_135m", [*overrides, *more])


class Kept:
    """Figures by key in one folder; what is there is not measured again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def __call__(self, key: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        path = self.folder / f"{key}.json"
        if not path.exists():
            started = time.perf_counter()
            facts = make()
            write_json_atomic(path, {**facts, "seconds": time.perf_counter() - started})
            print(f"{key}: {facts}", flush=True)
        found: dict[str, Any] = json.loads(path.read_text())
        return found


def by_hand(space: PruningSpace) -> list[int]:
    """Widths that drop whole parts and leave unequal numbers of heads."""
    chosen = {"attention": HEADS, "ffn": NEURONS}
    return [chosen[g.kind].get(g.block, g.width) for g in space.groups]


def make_plans(args: argparse.Namespace, kept: Kept) -> None:
    """The folders of the three models: dense, learned, and by hand."""

    def learned() -> dict[str, Any]:
        experiment = prepare_experiment(settings(args), callback=Console(False), searches=True)
        evaluator, space = experiment.evaluator, experiment.space
        ledger = EvaluationLog(args.out / "ledger.jsonl")
        found = run_agent("ppo", [experiment], ledger, seed=0, state=args.out / "state")
        widths = choose(experiment, found).history[-1]
        for name, each in (("dense", space.widths), ("learned", widths)):
            experiment.workload.save(evaluator.build(each), evaluator.plan(each), args.out / name)
        return {
            "widths": [int(w) for w in widths],
            "params": space.cost(widths, "params"),
            "dense": space.dense_cost("params"),
            "evaluations": found.account.spent,
            "groups": [[g.kind, g.block, g.width] for g in space.groups],
        }

    def parts() -> dict[str, Any]:
        more = ("prune.drop=true", "prune.importance=wanda_sp", "data.calibration=16")
        experiment = prepare_experiment(settings(args, *more), callback=Console(False))
        widths = by_hand(experiment.space)
        evaluator = experiment.evaluator
        experiment.workload.save(evaluator.build(widths), evaluator.plan(widths), args.out / "parts")
        return {"widths": widths, "params": experiment.space.cost(widths, "params")}

    kept("plan-learned", learned)
    kept("plan-parts", parts)


def blocks_of(args: argparse.Namespace) -> tuple[list[list[int]], list[int]]:
    """The first blocks of the test text, and the tokens of the prompt."""
    tokenizer = AutoTokenizer.from_pretrained(Path(args.model).parent, gguf_file=Path(args.model).name)
    ids = tokenizer(Path(args.test).read_text(encoding="utf-8"), verbose=False)["input_ids"]
    blocks = [ids[i * LENGTH : (i + 1) * LENGTH] for i in range(args.blocks)]
    return blocks, tokenizer(PROMPT)["input_ids"]


def in_transformers(folder: Path, blocks: Sequence[Sequence[int]], prompt: Sequence[int]) -> dict[str, Any]:
    """Perplexity in float32 and greedy tokens of a saved folder."""
    model = load(folder)
    losses = []
    with torch.no_grad():
        for block in blocks:
            logits = model(input_ids=torch.tensor([block])).logits[0, :-1].float()
            losses.append(float(functional.cross_entropy(logits, torch.tensor(block[1:]))))
    loss = statistics.fmean(losses)
    tokens = greedy_tokens(model, prompt, GENERATED)
    weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return {"loss": loss, "perplexity": math.exp(loss), "tokens": tokens, "bytes": weights}


def measure(args: argparse.Namespace, kept: Kept) -> dict[str, dict[str, Any]]:
    """All figures by key."""
    blocks, prompt = blocks_of(args)
    found = {}
    for name in NAMES:
        folder = args.out / name
        found[name] = kept(
            f"transformers-{name}", lambda folder=folder: in_transformers(folder, blocks, prompt)
        )
        for dtype in DTYPES:
            path = args.out / f"{name}-{dtype}.gguf"

            def one(folder: Path = folder, path: Path = path, dtype: str = dtype) -> dict[str, Any]:
                command = [
                    "rlprune",
                    "export",
                    str(folder),
                    "--to",
                    "gguf",
                    "--dtype",
                    dtype,
                    "--out",
                    str(path),
                ]
                said = subprocess.run(
                    [sys.executable, "-m", *command], capture_output=True, text=True, check=True
                ).stdout.splitlines()
                answer = run_llama_cpp(path, blocks, prompt, GENERATED)
                return {
                    "loss": answer.loss,
                    "perplexity": math.exp(answer.loss),
                    "tokens": answer.tokens,
                    "bytes": path.stat().st_size,
                    "said": [line.strip() for line in said[1:]],
                    "version": answer.version,
                }

            found[f"{name} {dtype}"] = kept(f"llama_cpp-{name}-{dtype}", one)
    found["speed"] = kept("speed", lambda: speeds(args, blocks[0], prompt))
    return found


def speeds(args: argparse.Namespace, block: Sequence[int], prompt: Sequence[int]) -> dict[str, Any]:
    """Tokens a second of all files in turns, medians; one thread."""
    rounds: dict[str, list[tuple[float, float]]] = {}
    for _ in range(args.rounds):
        for name in NAMES:
            for dtype in DTYPES:
                answer = run_llama_cpp(args.out / f"{name}-{dtype}.gguf", [block], prompt, DECODED)
                rounds.setdefault(f"{name} {dtype}", []).append((answer.prefill, answer.decode))
    return {
        key: [statistics.median(each) for each in zip(*values, strict=True)] for key, values in rounds.items()
    }


def page(args: argparse.Namespace, found: dict[str, dict[str, Any]], plans: dict[str, dict[str, Any]]) -> str:
    machine = hardware()
    dense = plans["learned"]["dense"]
    rows = []
    for name, words in NAMES.items():
        ours = found[name]
        for dtype in DTYPES:
            there, (prefill, decode) = found[f"{name} {dtype}"], found["speed"][f"{name} {dtype}"]
            apart = there["perplexity"] / ours["perplexity"] - 1
            same = next(
                (i for i, (a, b) in enumerate(zip(ours["tokens"], there["tokens"], strict=True)) if a != b),
                GENERATED,
            )
            rows.append([
                words, dtype, f"{there['bytes'] / 1e6:.1f}", f"{ours['perplexity']:.3f}", f"{there['perplexity']:.3f}",
                f"{apart:+.2%}", f"{same} of {GENERATED}", f"{prefill:.0f}", f"{decode:.1f}",
            ])  # fmt: skip
    head = ["plan", "type", "MB", "transformers", "llama.cpp", "difference", "greedy tokens equal"]
    table = markdown_table([*head, "prefill, tokens/s", "decoding, tokens/s"], rows)
    params = {name: plan["params"] / dense for name, plan in plans.items()}
    said = [
        f"- {NAMES[n]}, {d}: {'; '.join(found[f'{n} {d}']['said'][1:])}"
        for n in ("learned", "parts")
        for d in DTYPES
    ]
    version = found["dense f16"]["version"]
    return "\n".join([
        "# Pruned models in llama.cpp",
        "",
        f"SmolLM2-135M-Instruct (`{Path(args.model).name}`, 98 MB), exported by `rlprune export --to gguf` and run by "
        f"llama-cpp-python {version}. Written by",
        "",
        "```sh",
        "python docs/scripts/llama_cpp.py --model FILE.gguf --valid wikitext2_valid.txt --test wikitext2_test.txt \\",
        f"  --out runs/llama_cpp --evaluations {args.evaluations} --calibration {args.calibration} "
        f"--blocks {args.blocks} --rounds {args.rounds} --doc docs/llama-cpp.md",
        "```",
        "",
        f"on {machine['processor']}, 1 thread, torch {machine['libraries']['torch']}. Perplexities: the first "
        f"{args.blocks} blocks of {LENGTH} tokens of WikiText-2 test ({args.blocks * (LENGTH - 1):,} scored tokens), "
        "the same token ids for both; transformers in float32, llama.cpp with its defaults (a cache in float16). No "
        "fine-tune. Speeds: "
        f"medians of {args.rounds} rounds in which all files take turns, prefill of {LENGTH} tokens, decoding of "
        f"{DECODED} one by one after a prompt of {len(PROMPT.split())} words. {args.note}".strip(),
        "",
        f"- learned: `prune.runtime=llama.cpp`, PPO with {plans['learned']['evaluations']} evaluations of 16 sequences "
        f"of 128 tokens, seed 0, {args.calibration} calibration sequences, recovery `reconstruct`; "
        f"{params['learned']:.1%} of the parameters. So few evaluations are no measure of what a search finds.",
        f"- dropped parts: by hand, to show that such a plan runs, not that it is good; {params['parts']:.1%} of the "
        f"parameters. Key-value heads left of 3 by block: {HEADS}; neurons left of 1,536: {NEURONS}.",
        "",
        table,
        "",
        "What the export said:",
        "",
        *said,
        "",
    ])  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="SmolLM2's GGUF file")
    parser.add_argument("--valid", required=True, help="text for calibration and validation")
    parser.add_argument("--test", required=True, help="text of the perplexities")
    parser.add_argument("--out", type=Path, required=True, help="folder of plans and figures")
    parser.add_argument("--evaluations", type=int, default=40)
    parser.add_argument("--calibration", type=int, default=32, help="calibration sequences of 128 tokens")
    parser.add_argument("--blocks", type=int, default=12, help=f"blocks of {LENGTH} tokens")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of the speeds")
    parser.add_argument("--doc", type=Path, help="page to write")
    parser.add_argument(
        "--note", default="", help="what the page says of the machine and the build, behind the speeds"
    )
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    kept = Kept(args.out)
    make_plans(args, kept)
    found = measure(args, kept)
    plans = {name: kept(f"plan-{name}", dict) for name in ("learned", "parts")}
    text = page(args, found, plans)
    print(text)
    if args.doc:
        write_text_atomic(args.doc, text)


if __name__ == "__main__":
    main()
