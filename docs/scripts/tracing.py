"""Time and memory of tracing language models without their weights -> docs/tracing.md, docs/tracing.png.

    python docs/scripts/tracing.py     # about two minutes; run nothing else meanwhile

Each measurement runs in a process of its own: building the model on `meta` is not counted, importing the
libraries is not counted in the time and is counted in the peak memory. For comparison, the seconds that
Torch-Pruning takes to build its dependency graph for a narrow model of the same depth.
"""

from __future__ import annotations

import argparse
import json
import platform
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import rlprune
from rlprune.report import markdown_table

DOCS = Path(__file__).resolve().parents[1]
LIMIT_SECONDS, LENGTH = 120, 2048
REPEATS = 15
DEPTHS = (2, 4, 8, 16, 32)
LARGE: dict[str, dict[str, int]] = {
    "8B": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "70B": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
    },
}
NARROW = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4}


def config(job: str) -> Any:
    """A Llama config: "8B", "70B", or "depth:8" for the 8B shape at another depth, "narrow:8" for a tiny one."""
    from transformers import LlamaConfig

    kind, _, depth = job.partition(":")
    if kind == "narrow":
        return LlamaConfig(**NARROW, num_key_value_heads=4, num_hidden_layers=int(depth))
    shape = LARGE["8B"] | {"num_hidden_layers": int(depth)} if depth else LARGE[kind]
    return LlamaConfig(vocab_size=128256, num_key_value_heads=8, **shape)


def measure(job: str) -> dict[str, Any]:
    """Seconds and peak memory of one job, in this process."""
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    if job.startswith("narrow"):
        return torch_pruning(
            AutoModelForCausalLM.from_config(config(job), attn_implementation="eager").eval()
        )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config(job), dtype=torch.bfloat16)
    ids = torch.zeros(1, LENGTH, dtype=torch.long)
    space = rlprune.trace(model, ids, round_to=64)  # loads what is loaded on first use
    widths = space.project(np.ones(len(space.groups)), 0.8, metric="params")
    traced = fastest(lambda: rlprune.trace(model, ids, round_to=64))
    bare = fastest(lambda: rlprune.trace(model, ids, round_to=64, verify=False))
    planned = fastest(lambda: space.project(np.ones(len(space.groups)), 0.8, metric="params"))
    return {
        "seconds": traced, "bare": bare, "project": planned, "groups": len(space.groups), "memory": peak_memory(),
        "params": space.dense_cost("params"), "kept": space.cost(widths, "params"),
        "macs": space.dense_cost("macs"), "kv_cache": space.dense_cost("kv_cache"),
    }  # fmt: skip


def fastest(task: Callable[[], Any]) -> float:
    """Fewest seconds of REPEATS runs: what other processes on the machine add is not the task's."""
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        task()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def torch_pruning(model: Any) -> dict[str, Any]:
    import torch_pruning as tp

    model.config.use_cache = False
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(LIMIT_SECONDS)  # ends this process: of the graph's own time, imports do not count
    ids = torch.zeros(1, 8, dtype=torch.long)
    seconds = fastest(
        lambda: tp.DependencyGraph().build_dependency(model, ids, output_transform=lambda out: out.logits)
    )
    return {"seconds": seconds, "memory": peak_memory()}


def peak_memory() -> float:
    """Peak resident memory of this process in GB."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)


def in_own_process(job: str) -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", __file__, "--one", job]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == -signal.SIGALRM:
        return {}
    if done.returncode:
        raise RuntimeError(f"{job}: {done.stderr.strip().splitlines()[-1:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def plot(ours: dict[int, float], bare: dict[int, float], theirs: dict[int, float], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(list(ours), list(ours.values()), "o-", label="rlprune: 8B shape on meta, proof included")
    axes.plot(list(bare), list(bare.values()), "^-", label="the same without the proof")
    if theirs:
        axes.plot(list(theirs), list(theirs.values()), "s--", label="Torch-Pruning: narrow model, graph only")
    axes.set(xlabel="blocks", ylabel="seconds", xscale="log", yscale="log")
    axes.set_xticks(DEPTHS, [str(d) for d in DEPTHS])
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        warnings.simplefilter("ignore")
        print(json.dumps(measure(arguments.one)))
        return 0
    large, ours, bare, theirs, lines = [], {}, {}, {}, []
    for name in LARGE:
        facts = in_own_process(name)
        print(name, facts, flush=True)
        large.append([
            name, str(facts["groups"]), f"{facts['params'] / 1e9:.2f}", f"{facts['macs'] / 1e12:.1f}",
            f"{facts['kv_cache'] / 1e3:.0f}", f"{facts['seconds']:.2f}", f"{facts['bare']:.2f}",
            f"{1000 * facts['project']:.0f}", f"{facts['memory']:.2f}",
        ])  # fmt: skip
    for depth in DEPTHS:
        own, other = in_own_process(f"depth:{depth}"), in_own_process(f"narrow:{depth}")
        ours[depth], bare[depth] = own["seconds"], own["bare"]
        if other:
            theirs[depth] = other["seconds"]
        print(depth, own, other, flush=True)
        lines.append([
            str(depth), f"{own['seconds']:.3f}", f"{own['bare']:.3f}", f"{own['memory']:.2f}",
            f"{other['seconds']:.3f}" if other else f"more than {LIMIT_SECONDS}",
        ])  # fmt: skip
    folder = DOCS / "images"
    image = (folder if folder.is_dir() else DOCS) / "tracing.png"
    plot(ours, bare, theirs, image)
    text = PAGE.format(
        large=markdown_table(LARGE_HEADER, large), depth=markdown_table(DEPTH_HEADER, lines), length=LENGTH,
        repeats=REPEATS,
        image=image.relative_to(DOCS).as_posix(), torch=torch.__version__, python=platform.python_version(),
    )  # fmt: skip
    (DOCS / "tracing.md").write_text(text, encoding="utf-8")
    return 0


LARGE_HEADER = ["shape", "groups", "params (G)", "MACs (T)", "cache per token (kB)", "trace (s)",
                "without the proof (s)", "projection (ms)", "peak memory (GB)"]  # fmt: skip
DEPTH_HEADER = ["blocks", "trace, 8B shape (s)", "without the proof (s)", "peak memory (GB)",
                "Torch-Pruning, narrow model (s)"]  # fmt: skip
PAGE = """# Tracing language models

Written by `python docs/scripts/tracing.py` (torch {torch}, Python {python}, one CPU thread, each row in a process
of its own). Llama-3 shapes on the `meta` device, so without weights; MACs of {length} tokens. "trace" holds
everything `rlprune.trace` does: groups, costs, and the proof on a narrow skeleton of the config. Peak memory is
that of the whole process with its libraries.

{large}

Seconds are the fastest of {repeats} runs in one process, after a first one.

Time against depth, with the width of the 8B shape. The proof runs on a skeleton of two blocks, so its time does
not depend on the depth. The last column is no like-for-like comparison: it is Torch-Pruning's `build_dependency`
alone, without any group, cost or proof, for a model of hidden size 32 with real weights (it fails on `meta`).

{depth}

![seconds against blocks]({image})
"""

if __name__ == "__main__":
    sys.exit(main())
