"""`rlprune train` from start to report on models of every task, each with the plan's cost counted by torch."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import rlprune
from helpers import task_runs
from helpers.task_runs import RUNS
from rlprune.cli.main import main
from rlprune.utils.pytrees import batch_size, call, to_double
from rlprune.vision.adapter import ADAPTER

SETTINGS = """
workload: helpers.task_runs:{name}
budget: {{target: 90%}}
search: {{evaluations: 4, agent: random, baselines: []}}
finish: {{epochs: 1, lr: 1.0e-4, rules: false, candidates: 1}}
device: cpu
"""
LARGE = {"segmentation": "backbone.[0-9].*", "detection": "backbone.features.0.[0-9]*"}
"""Models of many groups, of which the rules probe each: some are left alone, and the recovery is the cheap one."""


@pytest.fixture(autouse=True)
def _few_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes of 64 images take a detector seconds each."""
    monkeypatch.setattr(ADAPTER, "latency", replace(ADAPTER.latency, batch_sizes=(1, 2)), raising=False)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n == "detection" else n for n in RUNS]
)
def test_from_start_to_report(name: str, tmp_path: Path) -> None:
    config, out = tmp_path / "run.yaml", tmp_path / "run"
    config.write_text(SETTINGS.format(name=name))
    cheap = ["--set", "recovery.steps=[bn]", f"prune.ignore=['{LARGE[name]}']"] if name in LARGE else []
    assert main(["train", str(config), "--out", str(out), *cheap]) == 0
    results = json.loads((out / "results.json").read_text())
    wanted = RUNS[name]
    assert {key: results["workload"][key] for key in wanted} == wanted
    rows = {row["kind"]: row for row in results["rows"]}
    dense, ours = rows["dense"], rows["agent"]
    for row in (dense, ours):
        numbers = [
            row[key] for key in ("score", "test", "test_finetuned", "test_loss", "test_loss_finetuned")
        ]
        assert all(math.isfinite(number) for number in numbers)
    assert ours["score"] < dense["score"] == 0.0
    assert ours["cost"] <= 0.9 * dense["cost"]
    workload = getattr(task_runs, name)()
    slim = rlprune.load(out / "pruned", base=workload.model)
    for model, row in ((workload.model, dense), (slim, ours)):
        # Fused kernels of LSTMs (in float32) and of attention do their work uncounted.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            call(copy.deepcopy(model).double(), to_double(workload.example_inputs))
        assert counter.get_total_flops() / 2 / batch_size(workload.example_inputs) == row["macs"]
    inputs, _ = next(iter(workload.batches("validation", 2)))
    with torch.no_grad():
        assert call(slim, inputs) is not None
    page = (out / "report.html").read_text()
    assert wanted["metric"] in page
