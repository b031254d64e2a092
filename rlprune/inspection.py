"""Looking without changing: what can be pruned in a model, and how good a pruned model is."""

from __future__ import annotations

import contextlib
import platform
from pathlib import Path
from typing import Any

import torch

from .artifacts import library_versions, load, read_plan
from .config import Config
from .errors import ArtifactError
from .latency import measure
from .progress import Console
from .pruning.tracing import count_macs, trace
from .workloads.build import build_workload
from .workloads.zoo import rebuild


def inspect(config: Config) -> str:
    """Groups, widths, costs, protected parts and feasible budgets as text; nothing is trained or searched."""
    workload = build_workload(config, train=False)
    cut = config.prune
    space = trace(workload.model, workload.example_inputs, cut.ignore, cut.round_to, cut.minimum)
    macs, params = space.unit_costs(space.widths, "macs"), space.unit_costs(space.widths, "params")
    head = ("group", "kind", "width", "unit", "min", "step", "macs/unit", "params/unit")
    lines = ["{:<34} {:<10} {:>6} {:>5} {:>5} {:>5} {:>12} {:>12}".format(*head)]
    for g, m, p in zip(space.groups, macs, params, strict=True):
        sizes = f"{g.width:>6} {g.unit:>5} {g.minimum:>5} {g.step:>5}"
        lines.append(f"{g.name:<34} {g.kind:<10} {sizes} {m:>12,.0f} {p:>12,.0f}")
    lines.append("")
    lines += [f"protected: {name}: {reason}" for name, reason in space.protected.items()]
    lines += [f"unused in eval mode: {name}" for name in space.unused]
    for metric in space.costs:
        low, dense = space.feasible(metric)
        budgets = f"feasible budgets {low / dense:.4f} to 1 ({low:,.0f} to {dense:,.0f})"
        lines.append(f"{metric}: dense {dense:,.0f}; {budgets}")
    target = space.target(config.budget.target, config.budget.metric)
    lines.append(f"budget: {config.budget.target} of {config.budget.metric} = {target:,.0f}")
    return "\n".join(lines)


def evaluate(directory: Path, config: Config | None) -> str:
    """A saved pruned model beside its dense base: costs, latency and, with a config, its quality on test."""
    plan = read_plan(directory)
    workload = None
    if config is not None:
        workload = build_workload(config, progress=Console(True).training)
        dense, example = workload.model, workload.example_inputs
        slim = load(directory, base=dense).to(workload.device)
    else:
        slim, dense, example = load(directory), rebuild(plan["base"]).eval(), _example_of(plan)
    models = {"dense": dense, "pruned": slim}
    times = measure(models, example, budget_seconds=10.0)
    lines = [f"{'':<8} {'macs':>16} {'params':>14} {'ms batch 1':>11} {'ms batch 64':>12}  quality"]
    for name, model in models.items():
        quality = "(give CONFIG to measure it)"
        if workload is not None:
            with workload.test_opened():
                q = workload.evaluate(model, "test")
            quality = f"test {workload.metric_name} {q.metric:.4f}, loss {q.loss:.4f} ({q.count} samples)"
        costs = f"{count_macs(model, example):>16,.0f} {sum(p.numel() for p in model.parameters()):>14,}"
        lines.append(f"{name:<8} {costs} {times[name][1]:>11.3f} {times[name][64]:>12.3f}  {quality}")
    return "\n".join(lines)


def hardware() -> dict[str, Any]:
    """What figures were measured on."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "device": gpu or "cpu",
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "libraries": library_versions(),
    }


def _example_of(plan: dict[str, Any]) -> torch.Tensor:
    shape = plan.get("input")
    if not shape:
        raise ArtifactError("plan.json: does not say the input's shape; give CONFIG")
    return torch.zeros(1, *shape[1:])


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
