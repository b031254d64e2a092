"""What each runtime allows of a model, and what that and rounding cost at a budget, in words for `rlprune inspect`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
from torch import nn

from ..config.names import RUNTIMES
from ..errors import BudgetError, RlpruneError
from ..pruning.cost_metrics import with_registered_costs
from ..pruning.space import PruningSpace
from ..tracing.trace import ExampleInputs, TraceOptions
from ..workloads.adapter import Target
from .runtimes import restriction
from .space import language_space

_WORDS = {"ffn": "neurons", "attention": "heads", "hidden": "hidden channels"}


def describe_runtimes(
    model: nn.Module, example_inputs: ExampleInputs, options: TraceOptions, target: Target
) -> list[str]:
    """A line for each registered runtime, the chosen one's first, and one on rounding."""
    RUNTIMES.complete()
    names = [options.runtime, *(name for name in RUNTIMES if name != options.runtime)]
    lines = []
    for name in names:
        own = replace(options, runtime=name, verify=False)
        try:
            space = with_registered_costs(language_space(model, example_inputs, "", own), model)
        except RlpruneError as error:
            lines.append(f"runtime {name}: not for this model: {error}")
            continue
        if name == options.runtime:
            lines += _rounding_lines(space, target)
        note = restriction(model, own).widths
        lines.append(f"runtime {name}: {_allowed(space)}; {_reached(space, target)}{note and '; ' + note}")
    return lines


def _allowed(space: PruningSpace) -> str:
    """What may be cut: free widths and their steps, what may be dropped."""
    free = [g for i, g in enumerate(space.groups) if space.leaders[i] == i]
    parts = []
    for kind, word in _WORDS.items():
        found = [g for g in free if g.kind == kind]
        if not found:
            continue
        many = "one width for all blocks" if space.ties and kind != "hidden" else f"{len(found)} widths"
        whole = all(g.step == g.width for g in found)
        steps = "kept whole or dropped" if whole else f"in steps of {_numbers(g.step for g in found)}"
        dropped = sum(g.minimum == 0 for g in found)
        parts.append(
            f"{word} ({many}, {steps}{f', {dropped} may go whole' if dropped and not whole else ''})"
        )
    return ", ".join(parts)


def _reached(space: PruningSpace, target: Target) -> str:
    """The feasible budgets, and how close uniform pruning comes to the target."""
    metric = target.metric
    if metric not in space.costs:
        return f"{metric} is not counted here"
    low = f"feasible {space.lowest(metric):.4f} to 1 of {metric}"
    try:
        left = unspent(space, target)
    except BudgetError:
        return f"{low}, which {target.budget} is not within"
    return f"{low}; uniform pruning to {target.budget} leaves {left:.3%} of the dense cost unspent"


def unspent(space: PruningSpace, target: Target) -> float:
    """Share of the dense cost by which uniform pruning stays under the budget; BudgetError: it is not feasible."""
    widths = space.project(np.ones(len(space.groups)), target.budget, target.metric)
    allowed = space.target(target.budget, target.metric)
    return float((allowed - space.cost(widths, target.metric)) / space.dense_cost(target.metric))


def _rounding_lines(space: PruningSpace, target: Target) -> list[str]:
    """How many units go together only, and what of the budget that leaves unspent."""
    rounded = [g for g in space.groups if g.step > 1]
    if not rounded or target.metric not in space.costs:
        return []
    units = sum(g.width for g in rounded) / sum(g.width for g in space.groups)
    single = replace(
        space, groups=tuple(replace(g, step=1, minimum=min(1, g.minimum)) for g in space.groups), ties=()
    )
    try:
        here, finest = unspent(space, target), unspent(single, target)
    except BudgetError:
        return []
    return [
        f"rounding: {units:.1%} of the units go in steps of {_numbers(g.step for g in rounded)}, not one by one; "
        f"uniform pruning leaves {here:.3%} of the dense cost unspent, one by one {finest:.3%}"
    ]


def _numbers(values: Iterable[int]) -> str:
    return " or ".join(str(v) for v in sorted(set(values)))
