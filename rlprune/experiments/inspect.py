"""Looking without changing: what can be pruned in a model, and how good a pruned model is."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from ..config.config import Config
from ..pruning.cost import plain_amount
from ..pruning.cost_terms import narrow_lines
from ..pruning.space import PruningSpace
from ..tracing.trace import TraceOptions
from ..utils.findings import Findings
from ..utils.progress import Callback, Console
from ..workloads.adapter import Target, adapter_of, adapter_of_base, read_pruned
from ..workloads.builder import Inspected, builder_of
from .build import build_workload, resolve_device
from .prepare import timed_space


def inspect(config: Config) -> Findings:
    """Groups, widths, costs, protected parts and feasible budgets; nothing is trained or searched."""
    device = resolve_device(config.device)
    if config.workload is None:
        found = builder_of(config.model.name).inspected(config, device)
    else:
        own = build_workload(config, train=False)
        found = Inspected(own.model, own.example_inputs, own)
    adapter = adapter_of(found.model) if found.workload is None else found.workload.adapter
    options = TraceOptions.of(config.prune)
    space = adapter.trace(found.model, found.example_inputs, options)
    if config.budget.metric == "latency":
        assert found.workload is not None
        space = timed_space(config, found.workload, space)
    lines = [*adapter.group_lines(space), "", *adapter.protected_lines(space.protected)]
    lines += [
        f"not exact: {name}: {reason}; cut all the same (prune.inexact)"
        for name, reason in space.inexact.items()
    ]
    lines += [f"unused in eval mode: {name}" for name in space.unused]
    lines += adapter.cost_lines(space, found.model)
    lines += [f"warning: {line}" for line in narrow_lines(space)]
    if "latency" in space.costs:
        lines.append(_latency_line(space))
    lines.append(_budget_line(space, config))
    target = Target(config.budget.target, config.budget.metric)
    lines += adapter.runtime_lines(found.model, found.example_inputs, options, target)
    lines += adapter.memory_lines(config, space, found.model, device)
    return Findings("\n".join(lines), _facts(space, config))


def _facts(space: PruningSpace, config: Config) -> dict[str, object]:
    """What `inspect` says, as plain values; budgets are absolute costs, latency in milliseconds."""
    metric = config.budget.metric
    return {
        "groups": [
            {"name": group.name, "kind": group.kind, "width": group.width, "minimum": int(least)}
            for group, least in zip(space.groups, space.minimums, strict=True)
        ],
        "protected": dict(space.protected),
        "inexact": dict(space.inexact),
        "unused": list(space.unused),
        "costs": {
            name: {"dense": float(space.feasible(name)[1]), "lowest": float(space.feasible(name)[0])}
            for name in space.costs
        },
        "budget": {
            "asked": config.budget.target,
            "metric": metric,
            "target": float(space.target(config.budget.target, metric)),
        },
    }


def resources(seconds: float) -> str:
    """What a command took: seconds, and the largest memory of this process where the system tells it."""
    try:
        import resource
    except ImportError:  # not on Windows
        return f"took {seconds:.1f} s"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return f"took {seconds:.1f} s, peak memory {peak / 1e6:,.0f} MB"


def evaluate(
    directory: Path,
    config: Config | None,
    tasks: Sequence[Path] = (),
    limit: int | None = None,
    callback: Callback | None = None,
) -> Findings:
    """A saved pruned model compared with its dense base: costs, latency and, with a config, its quality on test.

    Args:
        tasks: multiple-choice files for a language model's zero-shot accuracy (see `zeroshot`).
        limit: only the first ``limit`` questions of each.
        callback: is told of the progress; bars without one.
    """
    document = read_pruned(directory)
    adapter = adapter_of_base(document["base"])
    adapter.check_tasks(document, directory, tasks)
    watching = callback or Console(True)
    workload = build_workload(config, progress=watching.training) if config is not None else None
    return adapter.comparison(directory, document, workload, tasks, limit)


def _budget_line(space: PruningSpace, config: Config) -> str:
    target = space.target(config.budget.target, config.budget.metric)
    metric = config.budget.metric
    return f"budget: {config.budget.target} of {metric} = {plain_amount(target, metric)}"


def _latency_line(space: PruningSpace) -> str:
    """What the latency table says, where it was measured, and how far it is from the models that it was tied to."""
    low, dense = space.feasible("latency")
    table = space.costs["latency"].table  # type: ignore[attr-defined]
    # The dense model comes first; what was measured of it is in the table as it is.
    off = sorted(abs(check["table"] / check["measured"] - 1.0) for check in table.checks[1:])
    where = f"{table.machine['device']}, {table.machine['threads']} threads, batch size {table.batch_size}"
    fit = (
        f"; off by {off[len(off) // 2]:.1%} (median) and {off[-1]:.1%} (most) on {len(off)} cut models"
        if off
        else ""
    )
    return (
        f"latency: dense {dense:,.3f} ms; feasible budgets {low / dense:.4f} to 1 ({low:,.3f} to {dense:,.3f} ms); "
        f"table of {len(table.tables)} layers on {where}{fit}"
    )
