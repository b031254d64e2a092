"""What one score of a language-model candidate costs compared with a plain forward; its memory: `memory.py`.

    python docs/scripts/language_cost.py --model FILE.gguf --valid TEXT --test TEXT --doc docs/language-cost.md

Times are medians of interleaved rounds in one process, one thread: quote the ratios.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rlprune import Config, load_config, prune
from rlprune.evaluation import Recovery
from rlprune.experiments import Experiment, prepare_experiment
from rlprune.report import markdown_table
from rlprune.utils import hardware, write_text_atomic


def settings(args: argparse.Namespace, *more: str) -> Config:
    overrides = [f"model.name=hf:{args.model}", f"data.files.calibration={args.valid}"]
    overrides += [f"data.files.test={args.test}", "threads=1", f"score.samples={args.sequences}"]
    overrides += [f"data.calibration={args.calibration}", "data.sequence_length=128", *more]
    return load_config("smollm2_135m", overrides)


def timed(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def times(experiment: Experiment, rounds: int, sequences: int) -> dict[str, float]:
    """Median seconds of the parts of a score, in turns; the plain forward is that of the same cut model."""
    evaluator, workload = experiment.evaluator, experiment.workload
    assert evaluator.dtype is not None
    widths = experiment.rule_widths("fisher")
    plan = evaluator.plan(widths)
    closed_form: Recovery = evaluator.recovery
    shared: dict[str, torch.Tensor] = {}
    judge = workload.judge("kl", sequences, top_k=256)

    def build() -> Any:
        return prune(workload.model, plan, dtype=evaluator.dtype, shared=shared)

    slim = build()
    judge(slim)  # the dense answers are made once

    def forward() -> None:
        with torch.no_grad():
            for ids, _ in workload.batches("validation", sequences):
                slim(ids, use_cache=False)

    parts: dict[str, list[float]] = {"plain forward": [], "build": [], "judge": [], "closed form": []}
    for _ in range(rounds):
        parts["plain forward"].append(timed(forward))
        parts["build"].append(timed(build))
        parts["judge"].append(timed(lambda: judge(slim)))
        parts["closed form"].append(timed(lambda: closed_form(slim, plan)))
    return {name: statistics.median(values) for name, values in parts.items()}


def text(facts: dict[str, float], args: argparse.Namespace) -> str:
    plain = facts["plain forward"]
    without = facts["build"] + facts["judge"]
    rows = [[name, f"{seconds:.2f}", f"{seconds / plain:.2f}"] for name, seconds in facts.items()]
    rows.append(["score without the closed form (build + judge)", f"{without:.2f}", f"{without / plain:.2f}"])
    total = without + facts["closed form"]
    rows.append(["score with the closed form", f"{total:.2f}", f"{total / plain:.2f}"])
    machine = hardware()
    command = (
        "python docs/scripts/language_cost.py --model FILE.gguf --valid TEXT --test TEXT "
        f"--calibration {args.calibration} --rounds {args.rounds}"
    )
    return "\n".join(
        [
            "# What a score costs in a language model",
            "",
            f"Written by `{command}` (SmolLM2-135M, {args.sequences} sequences of 128 tokens, "
            f"{args.rounds} rounds, {machine['processor']}, 1 thread, torch {machine['libraries']['torch']}).",
            "",
            "Ratios are to a plain forward of the same cut model over the same tokens, in one process.",
            "",
            markdown_table(["part", "seconds", "ratio"], rows),
            "",
            "Its memory: [memory.md](memory.md).",
            "",
        ]
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder, GGUF file or hub id")
    parser.add_argument("--valid", required=True)
    parser.add_argument("--test", required=True)
    parser.add_argument("--sequences", type=int, default=32, help="sequences of 128 tokens in a score")
    parser.add_argument(
        "--calibration", type=int, default=16, help="calibration sequences (their number moves no peak)"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--doc", type=Path, help="file to write")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    found = text(times(prepare_experiment(settings(args)), args.rounds, args.sequences), args)
    print(found)
    if args.doc:
        write_text_atomic(args.doc, found)


if __name__ == "__main__":
    main()
