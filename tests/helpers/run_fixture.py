"""A made-up finished run, for the tests of the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np


def write_run(
    folder: Path, groups: int = 12, seeds: int = 3, evaluations: int = 60, seed: int = 0
) -> dict[str, Any]:
    """Write the files of a run with `groups` groups into `folder` and return the results."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    dense = [int(w) for w in np.repeat([16, 32, 64, 128], -(-groups // 4))[:groups]]
    names = [f"layer{1 + i // 4}.{i % 4}.conv{1 + i % 2}" for i in range(groups)]
    ledger: list[dict[str, Any]] = []

    def row(method: str, seed: int, score: float, spent: int, kind: str) -> dict[str, Any]:
        widths = [max(1, int(w * rng.uniform(0.3, 1.0))) for w in dense] if kind != "dense" else dense
        return {
            "method": method, "kind": kind, "seed": seed, "evaluations": spent,
            "cost": 40.55e6 if kind == "dense" else 20.27e6,
            "macs": 40.55e6 if kind == "dense" else 20.27e6, "params": 270_000.0,
            "score": score, "validation": 0.93 + score / 10, "test": 0.92 + score / 10, "test_loss": 0.3,
            "test_finetuned": 0.94, "test_loss_finetuned": 0.21, "latency_ms": {"1": 1.234, "64": 22.71},
            "seconds": 12.5, "widths": widths,
        }  # fmt: skip

    rows = [row("dense", 0, 0.0, 0, "dense")]
    rows += [
        row(m, 0, s, 1, "rule") for m, s in [("uniform", -0.61), ("erk", -0.44), ("global_taylor", -0.4)]
    ]
    for method, kind, limit in [("random", "baseline", -0.36), ("ppo", "agent", -0.25)]:
        for number in range(seeds):
            scores = limit - rng.exponential(0.5, evaluations) * np.exp(-np.arange(evaluations) / evaluations)
            for index, score in enumerate(scores):
                line = {"index": index, "seconds": 0.1, "method": method, "seed": number, "cost": 20e6}
                ledger.append(line | {"widths": dense, "score": float(score), "metric": 0.9})
            rows.append(row(method, number, float(scores.max()), evaluations, kind))
    results = {
        "version": 1,
        "workload": {"name": "digits", "model": "cifar_resnet8", "sizes": {"train": 1000, "test": 400}},
        "budget": {"metric": "macs", "target": 20.275e6, "dense": 40.55e6},
        "hardware": {"device": "cpu", "threads": 1, "torch": "2.15.0"},
        "groups": [{"name": n, "kind": "conv", "width": w} for n, w in zip(names, dense, strict=True)],
        "rows": rows,
    }
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "ledger.jsonl").write_text("".join(json.dumps(line) + "\n" for line in ledger))
    (folder / "config.yaml").write_text("name: digits\nbudget:\n  target: 0.5\n")
    slopes = {"ppo": 0.5, "random": 0.7, "uniform": 1.2}
    budgets = [
        {"budget": share, "method": method, "score": -slope * (1 - share), "metric": "macs"}
        for share in (0.3, 0.5, 0.7)
        for method, slope in slopes.items()
    ]
    (folder / "budgets.json").write_text(json.dumps(budgets))
    (folder / "pruned").mkdir(exist_ok=True)
    (folder / "pruned" / "plan.json").write_text(json.dumps({"version": 1, "fingerprint": "abc123"}))
    return results
