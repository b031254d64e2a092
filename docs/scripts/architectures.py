"""Surgery and cost on many architectures with random weights -> docs/architectures.md.

    python docs/scripts/architectures.py                     # all of them, a few minutes
    python docs/scripts/architectures.py resnet18 vgg11_bn   # only print these

Each one runs in a process of its own with a limit on time and memory: none can hang or exhaust the machine.
What has to hold for "works", on widths drawn at random at half of the MACs (or as close as is feasible):
the cost formula equals what torch's own FLOP counter finds on the built model, the parameter counts agree,
the output equals that of the masked dense model in float64, and a saved model loads to the same output.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import rlprune
from rlprune import masked
from rlprune.report import markdown_table
from rlprune.tracing import count_macs
from rlprune.vision import base_of, build_model

DOCS = Path(__file__).resolve().parents[1]
LIMIT_SECONDS, TRACE_SECONDS, TRACE_GIGABYTES = 600, 60.0, 6.0
EXACT = 1e-9

ARCHITECTURES: dict[str, int] = {  # name -> side of the square input, in pixels
    "resnet18": 64, "resnet50": 64, "wide_resnet50_2": 64, "resnext50_32x4d": 64, "vgg11_bn": 64,
    "googlenet": 64, "inception_v3": 96, "densenet121": 64, "mobilenet_v2": 64, "mobilenet_v3_small": 64,
    "mobilenet_v3_large": 64, "efficientnet_b0": 64, "efficientnet_v2_s": 64, "mnasnet1_0": 64,
    "squeezenet1_1": 64, "regnet_y_400mf": 64, "regnet_x_400mf": 64, "shufflenet_v2_x1_0": 64, "alexnet": 64,
    "convnext_tiny": 64, "vit_b_16": 224, "swin_t": 224, "cifar_resnet20": 32, "cifar_resnet56": 32,
    "cifar_googlenet": 32,
    "timm:resnetv2_50": 64, "timm:convmixer_768_32": 64, "timm:resnest26d": 64, "timm:seresnet50": 64,
    "timm:ghostnet_100": 64, "timm:repvgg_b0": 64, "timm:dla34": 64, "timm:hrnet_w18_small": 64,
    "timm:res2net50_26w_4s": 64, "timm:darknet53": 64, "timm:convnextv2_atto": 64, "timm:mixer_b16_224": 224,
}  # fmt: skip


def examine(name: str) -> dict[str, Any]:
    """Trace, cut and check one architecture; GraphError passes through."""
    torch.set_num_threads(1)
    size = ARCHITECTURES[name]
    torch.manual_seed(0)
    model = scrambled(build_model(name, classes=10, channels=3)).double()
    inputs = torch.randn(2, 3, size, size, dtype=torch.float64)
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # unused heads: said in the protected column
        space = rlprune.trace(model, inputs[:1], max_seconds=TRACE_SECONDS, max_memory_gb=TRACE_GIGABYTES)
    seconds = time.perf_counter() - start
    rng = np.random.default_rng(0)
    lowest, dense = space.feasible("macs")
    ratio = max(0.5, 1.02 * lowest / dense)
    widths = space.project(rng.random(len(space.groups)), ratio, metric="macs")
    # Units at random, so that a wrong index map cannot hide behind a prefix.
    importance = [rng.random(group.width) for group in space.groups]
    plan = rlprune.make_plan(space, importance=importance, widths=widths)
    slim = rlprune.prune(model, plan)
    with torch.no_grad():
        wanted, found, whole = (m(inputs) for m in (masked(model, plan), slim, model))
        with tempfile.TemporaryDirectory() as folder:
            rlprune.save(slim, plan, Path(folder) / "pruned", base=base_of(name, 10, 3))
            loaded = rlprune.load(Path(folder) / "pruned").double()
            reloaded = torch.equal(loaded.eval()(inputs), found)
    counted = count_macs(slim, inputs[:1])
    return {
        "input": size, "seconds": seconds, "groups": len(space.groups), "protected": len(space.protected),
        "macs": dense, "ratio": counted / dense, "macs_equal": counted == space.cost(widths, "macs"),
        "params_equal": sum(p.numel() for p in slim.parameters()) == space.cost(widths, "params"),
        "difference": float((found - wanted).abs().max() / wanted.abs().max()),
        "changed": float((whole - wanted).abs().max() / wanted.abs().max()), "reloaded": reloaded,
    }  # fmt: skip


def scrambled(model: nn.Module) -> nn.Module:
    """Random statistics, shifts and scales: f(0) = 0, or a branch scaled by 0, would hide a wrong cut."""
    for module in model.modules():
        for key, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and key == "running_mean":
                tensor.normal_(0, 0.2)
            elif isinstance(module, nn.modules.batchnorm._BatchNorm) and key == "running_var":
                tensor.uniform_(0.7, 1.4)
            elif tensor.is_floating_point() and tensor.ndim == 1:
                with torch.no_grad():
                    tensor.normal_(0, 0.2) if key == "bias" else tensor.uniform_(0.7, 1.3)
            elif isinstance(tensor, nn.Parameter) and tensor.abs().max() < 1e-3:
                with torch.no_grad():  # layer scales of 1e-6, heads of 0: they would hide everything
                    tensor.normal_(0, 0.1)
    return model


def works(facts: dict[str, Any]) -> bool:
    """Whether everything that the table claims holds for one architecture."""
    exact = facts["difference"] <= EXACT < facts["changed"]
    return exact and facts["macs_equal"] and facts["params_equal"] and facts["reloaded"]


def in_own_process(name: str) -> dict[str, Any]:
    """Facts of `examine`, or {"refused": line} or {"failed": line}."""
    command = [sys.executable, __file__, "--one", name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return {"failed": f"stopped after {LIMIT_SECONDS} s"}
    if done.returncode == 0:
        return dict(json.loads(done.stdout.splitlines()[-1]))
    lines = done.stderr.strip().splitlines() or [f"ended with code {done.returncode}"]
    return {"refused" if done.returncode == 2 else "failed": lines[-1]}


def one(name: str) -> int:
    """Child process: the facts as JSON on stdout, exit 2 with one line where the model is refused."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (12 * 2**30, 12 * 2**30))
    except (ImportError, ValueError):  # Windows, macOS: only the tracer's own limit holds
        pass
    try:
        print(json.dumps(examine(name)))
    except rlprune.GraphError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def row(name: str, facts: dict[str, Any]) -> list[str]:
    """One line of the table."""
    if "difference" not in facts:
        kind = "refused" if "refused" in facts else "failed"
        return [name, str(ARCHITECTURES[name]), kind, *["–"] * 9]
    marks = [("yes" if facts[key] else "NO") for key in ("macs_equal", "params_equal")]
    return [
        name, str(facts["input"]), "works" if works(facts) else "WRONG", f"{facts['seconds']:.1f}",
        str(facts["groups"]), str(facts["protected"]), f"{facts['macs'] / 1e6:.1f}",
        f"{100 * facts['ratio']:.1f}%", *marks, f"{facts['difference']:.0e}" if facts["difference"] else "0",
        "yes" if facts["reloaded"] else "NO",
    ]  # fmt: skip


HEADER = ["model", "input", "result", "trace (s)", "groups", "protected", "dense (M MACs)", "cut to",
          "formula = counter", "params equal", "largest difference", "save, load"]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", help="only these, printed and not written")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        return one(arguments.one)
    lines, good, reasons = [], 0, []
    for name in arguments.names or ARCHITECTURES:
        facts = in_own_process(name)
        good += "difference" in facts and works(facts)
        lines.append(row(name, facts))
        reasons += [f"- {name}: {facts[kind]}" for kind in ("refused", "failed") if kind in facts]
        print("  ".join([*lines[-1], facts.get("refused", facts.get("failed", ""))]), flush=True)
    if not arguments.names:
        text = PAGE.format(
            table=markdown_table(HEADER, lines), good=good, all=len(lines), exact=EXACT,
            reasons="\n".join(reasons), torch=torch.__version__, python=platform.python_version(),
        )  # fmt: skip
        (DOCS / "architectures.md").write_text(text, encoding="utf-8")
    return 0


PAGE = """# Architectures

Written by `python docs/scripts/architectures.py` (torch {torch}, Python {python}, CPU, random weights,
float64). {good} of {all} work.

"works" means, for widths and units drawn at random at half of the MACs (or the nearest feasible cost):
the cost formula equals half of what torch's FLOP counter finds on the built model, the parameter counts
agree, the output equals that of the masked dense model to {exact:g} of the largest output, and the saved
model loads to the same output. Biases and normalisation statistics are random too, so that f(0) is not 0.
"protected" counts the layers whose outputs keep their width (the classifier is always one). The rest is
refused in one line; nothing hangs: each model runs in a process of its own under a limit of time and memory.

{table}

Why, in the words of the error:

{reasons}
"""

if __name__ == "__main__":
    sys.exit(main())
