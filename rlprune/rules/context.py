"""What a rule may look at, and the registry that every rule puts itself into."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from ..errors import DataError
from ..pruning.space import PruningSpace
from ..workloads.base import Workload

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Context:
    """What a rule sees of the model that is to be pruned.

    ``importance`` holds one array of unit scores a group (higher is kept). ``budget`` and ``metric`` are
    those of ``PruningSpace.project``. ``probe(widths)`` returns the loss of a built candidate (lower is
    better) and is charged to the rule; without it a rule that needs losses measures them on the
    workload's validation split.
    """

    space: PruningSpace
    model: nn.Module
    importance: Sequence[NDArray[Any]]
    budget: Any
    metric: str = "macs"
    workload: Workload | None = None
    probe: Callable[[NDArray[np.int64]], float] | None = None
    seed: int = 0


RuleFunction = Callable[[Context], Floats]


@dataclass(frozen=True)
class Rule:
    """A closed-form distribution: ``function(context)`` gives non-negative numbers of shape (G,).

    ``probes`` marks a rule that scores candidates to find its distribution; they are charged to whoever asks.
    """

    name: str
    summary: str
    function: RuleFunction
    needs_workload: bool = False
    probes: bool = False


RULES: dict[str, Rule] = {}


def rule(
    summary: str, *, needs_workload: bool = False, probes: bool = False
) -> Callable[[RuleFunction], RuleFunction]:
    """Register a function under its own name; with ``needs_workload``, refuse contexts without one."""

    def register(function: RuleFunction) -> RuleFunction:
        name = function.__name__

        def checked(context: Context) -> Floats:
            if needs_workload and context.workload is None and context.probe is None:
                raise DataError(
                    f"the rule {name!r} needs a workload: it reads data; give Context(workload=...)"
                )
            return function(context)

        checked.__name__, checked.__qualname__, checked.__doc__ = name, name, function.__doc__
        RULES[name] = Rule(name, summary, checked, needs_workload, probes)
        return checked

    return register
