"""Peaks of memory of preparing and searching language models: measured, and predicted by `rlprune inspect`'s formulas.

    python docs/scripts/memory.py --model FILE.gguf --valid TEXT --test TEXT --out runs/memory --doc docs/memory.md

Every measurement runs in a process of its own, on one thread, and leaves a file in --out; what is there is not measured
again. Peaks are those of anonymous memory above what the process takes after the imports.
"""

from __future__ import annotations

import argparse
import importlib
import json
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from rlprune import Config, Workload, load_config, trace
from rlprune.evaluation import EvaluationLog
from rlprune.experiments import Experiment, prepare_experiment, run_agent
from rlprune.language import footprint
from rlprune.report import markdown_table
from rlprune.utils import hardware, write_json_atomic, write_text_atomic

MIB = 2**20
SMOL = "SmolLM2-135M wanda_sp"
TARGET = 2.5
IMPORTED = ("transformers.models.llama.modeling_llama", "accelerate", "gguf", "sklearn", "scipy.linalg")
LLAMA: dict[str, dict[str, Any]] = {
    # 1.1 billion parameters, the shape of TinyLlama-1.1B
    "1B": {
        "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
        "num_key_value_heads": 4, "vocab_size": 32000, "tie_word_embeddings": False,
    },
    "8B": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False,
    },
    "70B": {
        "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
        "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False,
    },
}  # fmt: skip


class Noise(Workload):
    """A language model on random tokens: memory does not depend on what they say."""

    def __init__(self, model: torch.nn.Module, length: int, sizes: dict[str, int]) -> None:
        self.model = model
        self.example_inputs = torch.zeros(1, length, dtype=torch.long)
        self._length, self._sizes = length, sizes

    def batches(self, split: str, limit: int | None = None) -> Iterator[Any]:
        generator = torch.Generator().manual_seed(0)
        count = min(self._sizes[split], limit or self._sizes[split])
        for _ in range(count):
            ids = torch.randint(0, 32000, (1, self._length), generator=generator)
            yield ids, ids


class Peak:
    """The most anonymous memory of this process since `restart`, looked at every few milliseconds.

    The high-water mark of the resident set would count the pages of libraries too, which the system takes back when
    other programs need memory.
    """

    def __init__(self) -> None:
        self.value = 0.0
        threading.Thread(target=self._look, daemon=True).start()

    def restart(self) -> None:
        self.value = anonymous()

    def _look(self) -> None:
        while True:
            self.value = max(self.value, anonymous())
            time.sleep(0.004)


def anonymous() -> float:
    """Resident memory of this process that belongs to no file, in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("RssAnon is not in /proc/self/status")


def smol(args: argparse.Namespace, importance: str, spilled: bool) -> Config:
    overrides = [f"model.name=hf:{args.model}", f"data.files.calibration={args.valid}", "threads=1"]
    overrides += [f"data.files.test={args.test}", "score.samples=8", "data.calibration=8"]
    overrides.append("data.sequence_length=128")
    if spilled:
        overrides.append(f"recovery.spill={args.out / 'spilled'}")
    return load_config("smollm2_135m", [*overrides, f"prune.importance={importance}"])


def billion() -> tuple[Config, Workload]:
    """The 1B shape in bfloat16 with random weights: 8 calibration and 4 validation sequences of 64 tokens."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = llama("1B")
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.fill_(1.0) if tensor.ndim == 1 else tensor.normal_(0.0, 0.02)
        for module in model.modules():  # angles are no weights: made again where the model was empty
            if hasattr(module, "inv_freq"):
                fresh = type(module)(model.config)
                module.inv_freq = fresh.inv_freq
                module.original_inv_freq = fresh.inv_freq
    settings = [
        *("prune.importance=wanda_sp", "data.sequence_length=64", "data.calibration=8", "data.validation=4"),
        *("score.samples=4", "score.dtype=bfloat16", "budget.target=0.8", "budget.metric=params"),
        *("model.train.epochs=0", "search.evaluations=6", "model.dtype=bfloat16"),
    ]
    sizes = {"train": 1, "calibration": 8, "validation": 4, "test": 1}
    return load_config("tiny_llama", settings), Noise(model.eval(), 64, sizes)


def llama(shape: str) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**LLAMA[shape])).to(torch.bfloat16)


def measured(args: argparse.Namespace, what: str) -> dict[str, Any]:
    """Peaks of one model in this process, in MiB above the imports, and what the formulas say."""
    torch.set_num_threads(1)
    for name in (*IMPORTED, "rlprune.agents", "rlprune.rules", "rlprune.language.build"):
        importlib.import_module(name)
    base, peak = anonymous(), Peak()
    workload = None
    if what == "1B":
        config, workload = billion()
    else:
        _, importance, *spilled = what.split(" ")
        config = smol(args, importance, bool(spilled))
    experiment = prepare_experiment(config, workload=workload)
    facts: dict[str, Any] = {"imports": base, "prepare": peak.value - base}
    peak.restart()
    search(experiment, 6 if what == "1B" else args.evaluations)
    facts["search"] = peak.value - base
    facts["whole process, resident"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    model = experiment.workload.model
    first = next(model.parameters())
    facts["weights"] = sum(p.numel() * p.element_size() for p in model.parameters()) / MIB
    said = footprint(model, experiment.space, config, element=first.element_size())
    facts |= {"prepare predicted": said.prepare_peak / MIB, "search predicted": said.search_peak / MIB}
    facts["held by the closed form"] = experiment.evaluator.recovery.nbytes / MIB
    return facts


def search(experiment: Experiment, evaluations: int) -> None:
    """A random search; the 1B model, whose rules would take minutes, scores two plans instead."""
    if evaluations > 6:
        run_agent("random", [experiment], EvaluationLog(), seed=0, evaluations=evaluations)
        return
    for target in (0.9, 0.8):
        widths = experiment.space.project([1.0] * len(experiment.space.groups), target, "params")
        experiment.evaluator.evaluate(widths)


def predicted(shape: str, importance: str, spill: bool, devices: int) -> list[str]:
    """A row of the table of large models: GB on each of some equal devices."""
    with torch.device("meta"):
        model = llama(shape)
    space = trace(model, torch.zeros(1, 2048, dtype=torch.long, device="meta"), verify=False)
    settings = [
        *(f"prune.importance={importance}", "model.dtype=bfloat16", "score.dtype=bfloat16"),
        *("data.sequence_length=2048", "data.calibration=128", "data.validation=32", "score.samples=32"),
        *("budget.target=0.8", "budget.metric=params", f"recovery.spill={'disk' if spill else 'null'}"),
    ]
    found = footprint(model, space, load_config("tiny_llama", settings), device="cuda", element=2)
    cells = []
    for parts, each in zip((found.prepare, found.search), found.fullest(devices), strict=True):
        cells += [f"{sum(parts.values()) / 1e9:,.0f}", f"{each / 1e9:,.1f}"]
    return [shape, importance, "yes" if spill else "no", str(devices), *cells, f"{found.spilled / 1e9:,.0f}"]


def met(facts: dict[str, dict[str, Any]]) -> str:
    """What the page says of the target."""
    shares = {name: facts[name]["search"] / facts[name]["weights"] for name in (SMOL, f"{SMOL} spilled")}
    plain, spilled = shares.values()
    verdict = "met" if plain <= TARGET else "missed"
    return (
        f"**The target** of {TARGET} times the dense weights for the peak of a SmolLM2 search (wanda_sp) is {verdict}: "
        f"{plain:.2f}. With `recovery.spill` the factors are on the disk: {spilled:.2f}."
    )


def page(args: argparse.Namespace, facts: dict[str, dict[str, Any]]) -> str:
    machine = hardware()
    rows = []
    for name, found in facts.items():
        for phase in ("prepare", "search"):
            peak, said = found[phase], found[f"{phase} predicted"]
            rows.append(
                [name, phase, f"{found['weights']:,.0f}", f"{peak:,.0f}", f"{peak / found['weights']:.2f}",
                 f"{said:,.0f}", f"{said / peak - 1:+.1%}"]
            )  # fmt: skip
    large = [
        predicted(shape, importance, spill, devices)
        for shape, devices in (("8B", 1), ("70B", 8))
        for importance, spill in (
            ("obs_fisher", False),
            ("obs_fisher", True),
            ("wanda_sp", False),
            ("wanda_sp", True),
        )
    ]
    head = ["model", "phase", "weights", "peak", "of the weights", "predicted", "off by"]
    wide = [
        "shape",
        "importance",
        "spilled",
        "GPUs",
        "prepare, all",
        "each",
        "search, all",
        "each",
        "on disk",
    ]
    text = Path(__file__).with_name("memory.txt").read_text()
    command = "python docs/scripts/memory.py --model FILE.gguf --valid TEXT --test TEXT"
    return text.format(
        command=f"{command} --evaluations {args.evaluations}",
        machine=f"{machine['processor']}, 2 cores, no GPU, 1 thread, torch {machine['libraries']['torch']}",
        measured=markdown_table(head, rows),
        target=met(facts),
        large=markdown_table(wide, large),
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="SmolLM2-135M: folder, GGUF file or hub id")
    parser.add_argument("--valid", required=True)
    parser.add_argument("--test", required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder of the measurements")
    parser.add_argument("--evaluations", type=int, default=12)
    parser.add_argument("--doc", type=Path, help="file to write")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.measure:
        print(json.dumps(measured(args, args.measure)))
        return
    facts = {}
    for what in (SMOL, f"{SMOL} spilled", "SmolLM2-135M obs_fisher", "1B"):
        file = args.out / f"{what.replace(' ', '-')}.json"
        if not file.exists():
            words = [
                sys.executable,
                __file__,
                "--model",
                args.model,
                "--valid",
                args.valid,
                "--test",
                args.test,
            ]
            words += ["--out", str(args.out), "--evaluations", str(args.evaluations), "--measure", what]
            child = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
            write_json_atomic(file, json.loads(child.stdout.strip().splitlines()[-1]))
        facts[what] = json.loads(file.read_text())
        print(what, json.dumps(facts[what]), flush=True)
    found = page(args, facts)
    print(found)
    if args.doc:
        write_text_atomic(args.doc, found)


if __name__ == "__main__":
    main()
