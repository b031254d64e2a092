"""Seconds to find a model's channels, by labels and by Torch-Pruning's graph -> the table of docs/channels.md.

    python docs/scripts/channels.py     # about ten minutes; run nothing else meanwhile

Every figure is measured in a process of its own, on one thread, with random weights; a process that takes more than
LIMIT_SECONDS or LIMIT_GIGABYTES is stopped.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import time
import warnings
from importlib.metadata import version
from pathlib import Path

import torch

import rlprune
from rlprune.report import markdown_table
from rlprune.vision import base_of, build_model, example_for

PAGE = Path(__file__).resolve().parents[1] / "channels.md"
BEGIN, END = "<!-- table:begin -->", "<!-- table:end -->"
LIMIT_SECONDS, LIMIT_GIGABYTES = 60, 12
MODELS = {
    "resnet50": 64, "densenet121": 64, "mobilenet_v3_large": 64, "googlenet": 64, "shufflenet_v2_x1_0": 64,
    "convnext_tiny": 64, "vit_b_32": 224, "swin_t": 224, "lraspp_mobilenet_v3_large": 96, "timm:mixnet_s": 64,
    "timm:skresnet18": 64, "timm:res2net50_26w_4s": 64, "timm:resnest26d": 64, "timm:vit_tiny_patch16_224": 224,
    "timm:levit_128s": 224, "timm:efficientvit_m0": 224, "timm:nfnet_l0": 96, "timm:cspresnet50": 64,
    "timm:gcresnet33ts": 64, "timm:mobilevit_xxs": 64, "hf:vit": 224,
}  # fmt: skip
WAYS = ("labels", "proved", "torch-pruning")


def measure(name: str, side: int, way: str) -> dict[str, object]:
    """Seconds of one way on one model, and what it found; run in a process of its own."""
    torch.set_num_threads(1)
    limit = LIMIT_GIGABYTES << 30
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    warnings.simplefilter("ignore")
    base = base_of(name, classes=10, side=side)
    model, example = build_model(name, classes=10, side=side), example_for(base, side)
    started = time.monotonic()
    if way == "torch-pruning":
        import torch_pruning

        for parameter in model.parameters():
            parameter.requires_grad_(True)
        torch_pruning.DependencyGraph().build_dependency(model, example, verbose=False)
        return {"seconds": time.monotonic() - started}
    space = rlprune.trace(model, example, verify=way == "proved", max_seconds=LIMIT_SECONDS)
    seconds = time.monotonic() - started
    kilobytes = max(
        resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    facts = {"groups": len(space.groups), "lowest": space.lowest("macs"), "gigabytes": kilobytes / 2**20}
    return {"seconds": seconds, **facts}


def measured(name: str, side: int, way: str) -> dict[str, object]:
    """`measure` in a process; {"error": one line} where it fails or takes too much."""
    command = [sys.executable, __file__, "--measure", name, str(side), way]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=LIMIT_SECONDS + 30, check=False
        )
    except subprocess.TimeoutExpired:
        return {"error": f"more than {LIMIT_SECONDS} s"}
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return {"error": lines[-1][:70]}
    found: dict[str, object] = json.loads(done.stdout.strip().splitlines()[-1])
    if way == "torch-pruning" and float(str(found["seconds"])) > LIMIT_SECONDS:
        return {"error": f"more than {LIMIT_SECONDS} s"}
    return found


def shown(result: dict[str, object]) -> str:
    return (
        str(result["error"]).replace("|", "/")
        if "error" in result
        else f"{float(str(result['seconds'])):.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--measure", nargs=3, metavar=("MODEL", "SIDE", "WAY"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        name, side, way = options.measure
        print(json.dumps(measure(name, int(side), way)))
        return
    rows = []
    for name, side in MODELS.items():
        results = {way: measured(name, side, way) for way in WAYS}
        proved = results["proved"]
        lowest = f"{float(str(proved['lowest'])):.3f}" if "lowest" in proved else "–"
        memory = f"{float(str(proved['gigabytes'])):.1f}" if "gigabytes" in proved else "–"
        found = [str(proved.get("groups", "–")), lowest, *(shown(results[way]) for way in WAYS[:2]), memory]
        found.append(shown(results["torch-pruning"]))
        rows.append([name, str(side), *found])
        print(*rows[-1], flush=True)
    header = [
        "model",
        "input",
        "groups",
        "lowest MACs",
        "labels (s)",
        "with the proof (s)",
        "peak (GB)",
        "graph (s)",
    ]
    versions = f"torch {torch.__version__}, Torch-Pruning {version('torch-pruning')}"
    machine = f"Python {platform.python_version()}, {platform.machine()}, one thread"
    made = f"`python docs/scripts/channels.py`, {versions}, {machine}"
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    table = markdown_table(header, rows)
    PAGE.write_text(f"{before}{BEGIN}\nWritten by {made}.\n\n{table}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
