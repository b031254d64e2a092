"""What one score of a language-model candidate costs beside a plain forward, and the peak memory of a search.

    python docs/scripts/language_cost.py --model FILE.gguf --valid TEXT --test TEXT --doc docs/language-cost.md

Times are medians of interleaved rounds in one process, one thread: quote the ratios. Memory is that of the
process (resident set, high-water mark), measured after the imports, after loading and over a short search.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rlprune import Config, load_config, prune
from rlprune.evaluation import EvaluationLog, Recovery
from rlprune.experiments import Experiment, prepare_experiment, run_agent
from rlprune.report import markdown_table
from rlprune.utils import hardware, write_text_atomic


def settings(args: argparse.Namespace, *more: str) -> Config:
    overrides = [f"model.name=hf:{args.model}", f"data.files.calibration={args.valid}"]
    overrides += [f"data.files.test={args.test}", "threads=1", f"score.samples={args.sequences}"]
    overrides += [f"data.calibration={args.calibration}", *more]
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


def resident(field: str) -> float:
    """VmRSS or VmHWM (high-water mark) of this process in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"{field} is not in /proc/self/status")


def memory(args: argparse.Namespace) -> dict[str, float]:
    """MiB after the imports, the peak while preparing and searching, and the size of the dense weights."""
    # What the search imports on its way is no memory of the search.
    for name in ("transformers.models.llama.modeling_llama", "accelerate", "gguf", "sklearn", "scipy.linalg"):
        importlib.import_module(name)
    facts = {"imports": resident("VmRSS")}
    experiment = prepare_experiment(settings(args))
    facts["peak with loading"] = resident("VmHWM")
    weights = sum(p.numel() * p.element_size() for p in experiment.workload.model.parameters())
    facts["dense weights"] = weights / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    run_agent("random", [experiment], EvaluationLog(), seed=0, evaluations=args.evaluations)
    facts["peak of the search"] = resident("VmHWM")
    return facts


def text(facts: dict[str, float], used: dict[str, float], args: argparse.Namespace) -> str:
    plain = facts["plain forward"]
    without = facts["build"] + facts["judge"]
    rows = [[name, f"{seconds:.2f}", f"{seconds / plain:.2f}"] for name, seconds in facts.items()]
    rows.append(["score without the closed form (build + judge)", f"{without:.2f}", f"{without / plain:.2f}"])
    total = without + facts["closed form"]
    rows.append(["score with the closed form", f"{total:.2f}", f"{total / plain:.2f}"])
    dense = used["dense weights"]
    above = [
        [name, f"{mib:,.0f}", f"{(mib - used['imports']) / dense:.2f}"]
        for name, mib in used.items()
        if name.startswith("peak")
    ]
    machine = hardware()
    command = (
        "python docs/scripts/language_cost.py --model FILE.gguf --valid TEXT --test TEXT "
        f"--evaluations {args.evaluations} --calibration {args.calibration} --rounds {args.rounds}"
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
            f"Memory: {dense:,.0f} MiB of dense weights (float32), {used['imports']:,.0f} MiB after the imports; "
            f"a random search of {args.evaluations} evaluations, its rules included. Multiples count what lies "
            "above the imports, in dense weights; the first row includes dequantising the GGUF file and the "
            "Gram matrices, the second is the search alone, with the model and all its factors in memory.",
            "",
            markdown_table(["", "MiB", "multiple of the dense weights"], above),
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
    parser.add_argument("--evaluations", type=int, default=24)
    parser.add_argument("--doc", type=Path, help="file to write")
    parser.add_argument("--memory", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    if args.memory:
        print(json.dumps(memory(args)))
        return
    words = [sys.executable, __file__, "--memory", "--model", args.model, "--valid", args.valid]
    words += ["--test", args.test, "--evaluations", str(args.evaluations)]
    words += ["--sequences", str(args.sequences), "--calibration", str(args.calibration)]
    child = subprocess.run(words, capture_output=True, text=True, check=True)
    used = json.loads(child.stdout.strip().splitlines()[-1])
    found = text(times(prepare_experiment(settings(args)), args.rounds, args.sequences), used, args)
    print(found)
    if args.doc:
        write_text_atomic(args.doc, found)


if __name__ == "__main__":
    main()
