"""Further costs of a model: what stands in addition to those that tracing counts, registered one by one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor, nn

from ..config.names import COST_METRICS
from ..errors import ConfigError
from ..utils.registry import Named, named_errors
from .cost import Cost, CostFormula, FormulaBuilder
from .space import PruningSpace

Measure = Callable[[PruningSpace, nn.Module], Cost | None]
_NEEDED = ("increase", "unit_costs", "root")


def cost_metric(
    summary: str, *, wing: str | None = None, name: str | None = None
) -> Callable[[Measure], Measure]:
    """Register a cost (a name for ``budget.metric``) under the name of the function below.

    The function takes a traced space and its dense model, and returns a ``Cost``: a function of the widths that never
    falls when one of them grows. `parameter_cost` makes one from the tensors of the model, `FormulaBuilder` with
    ``space.axis_sizes()`` any other that is a sum over layers. None leaves the model without this cost.

    Args:
        summary: one line for ``rlprune list costs``.
        wing: the only wing whose models have the cost ("language": causal language models); None for all.
        name: instead of the function's own.

    Raises (when applied):
        ConfigError: the name is taken, or the summary is missing.
    """
    return COST_METRICS.decorator(
        "cost_metric", summary, lambda own, function: Named(own, summary, function, wing), name
    )


def parameter_cost(
    space: PruningSpace, model: nn.Module, weight: Callable[[str, Tensor], float]
) -> CostFormula:
    """The sum of ``weight(name, parameter)`` over all elements of all parameters, each parameter once.

    With a weight of 1 this is the cost `params`. Weights that are multiples of a power of two keep it exact.
    """
    sizes = space.axis_sizes()
    cuts: dict[str, dict[int, int]] = defaultdict(dict)
    for cut in space.cuts:
        cuts[cut.tensor][cut.dim] = cut.axis
    builder = FormulaBuilder(len(space.groups))
    for name, parameter in model.named_parameters():
        rest = [n for dim, n in enumerate(parameter.shape) if dim not in cuts[name]]
        each = float(weight(name, parameter)) * float(np.prod(rest))
        builder.add(each, *(sizes[axis] for axis in cuts[name].values()))
    return builder.build()


@cost_metric("output channels of the convolutions and linear layers that are cut (filters)", wing="vision")
def filters(space: PruningSpace, model: nn.Module) -> CostFormula | None:
    """Filters as RL-Pruner (arXiv 2411.06463) counts them; what cannot be cut, as the last layer, is left out."""
    sizes, parameters = space.axis_sizes(), dict(model.named_parameters())
    builder = FormulaBuilder(len(space.groups))
    found = [
        c for c in space.cuts if not c.consumer and c.tensor in parameters and parameters[c.tensor].ndim > 1
    ]
    for cut in found:
        builder.add(1.0, sizes[cut.axis])
    return builder.build() if found else None


def with_registered_costs(space: PruningSpace, model: nn.Module) -> PruningSpace:
    """The space with the registered costs that its model has; ConfigError naming one that is no cost."""
    further = dict(space.costs)
    COST_METRICS.complete()
    for name, metric in COST_METRICS.items():
        if metric.function is None or metric.wing not in (None, space.wing):
            continue
        with named_errors("cost_metric", name):
            cost = metric.function(space, model)
            if cost is not None:
                _check(name, cost, space)
                further[name] = cost
    return replace(space, costs=further) if len(further) > len(space.costs) else space


def _check(name: str, cost: Any, space: PruningSpace) -> None:
    if not callable(cost) or not all(hasattr(cost, method) for method in _NEEDED):
        raise ConfigError(
            f"cost_metric {name!r}: must return a Cost, such as rlprune.parameter_cost gives it, "
            f"got {type(cost).__name__}"
        )
    dense, least = float(cost(space.widths)), float(cost(space.minimums))
    if not (np.isfinite([dense, least]).all() and 0 <= least <= dense and dense > 0):
        raise ConfigError(
            f"cost_metric {name!r}: must be above 0 for the dense model and not rise when it is cut, "
            f"got {dense:g} and, at the smallest widths, {least:g}"
        )
