"""What a rule may look at, and the registry that every rule puts itself into."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, update_wrapper
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from ..arrays import Bools, Floats, Ints
from ..errors import ConfigError, DataError
from ..pruning.space import PruningSpace
from ..pruning.statistics import Statistics, collect
from ..workloads.base import Workload

LANGUAGE_KINDS = ("attention", "ffn", "hidden")
"""The kinds of group that only causal language models have."""


@dataclass(frozen=True)
class Context:
    """What a rule sees of the model that is to be pruned.

    ``importance`` holds one array of unit scores a group (higher is kept). ``budget`` and ``metric`` are
    those of ``PruningSpace.project``. ``probe(widths)`` returns the loss of a built candidate (lower is
    better) and is charged to the rule; without it a rule that needs losses measures them on the
    workload's validation split. ``shared`` remembers what is slow to measure and depends on the model, the
    space's groups and the calibration data alone; give all contexts of one model the same dict.
    """

    space: PruningSpace
    model: nn.Module
    importance: Sequence[NDArray[Any]]
    budget: Any
    metric: str = "macs"
    workload: Workload | None = None
    probe: Callable[[Ints], float] | None = None
    seed: int = 0
    shared: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def active(self) -> Bools:
        """The groups, (G,), that the pruning is spread over: those whose units cost something in the metric.

        Feed-forward neurons hold no KV cache, so cutting them for that budget would be loss without gain;
        the hidden size is left to the searches, because its cut is not exact.
        """
        costs = self.space.unit_costs(self.space.widths, self.metric)
        hidden = np.array([g.kind == "hidden" for g in self.space.groups], dtype=bool)
        found: Bools = (costs > 0) & (self.space.widths > 0) & ~hidden
        return found if found.any() else np.ones(len(hidden), dtype=bool)

    def data(self, rule: str) -> Workload:
        """The workload; DataError naming the rule where there is none."""
        if self.workload is None:
            raise DataError(f"the rule {rule!r} needs a workload: it reads data; give Context(workload=...)")
        return self.workload

    def cached(self, key: str, make: Callable[[], Any]) -> Any:
        """``make()``, once for all the contexts that have the same ``shared``."""
        if key not in self.shared:
            self.shared[key] = make()
        return self.shared[key]

    def statistics(self) -> Statistics:
        """Input moments and cosines of a language model on the calibration split (``pruning.statistics``)."""

        def make() -> Statistics:
            batches = self.data("statistics").batches("calibration")
            return collect(self.model, self.space, batches)

        found: Statistics = self.cached("statistics", make)
        return found


RuleFunction = Callable[[Context], Floats]
ProbeCount = Callable[[PruningSpace], int]


@dataclass(frozen=True)
class Rule:
    """A closed-form distribution: ``function(context)`` gives non-negative numbers of shape (G,).

    ``counter`` belongs to a rule that scores candidates to find its distribution; they are charged to whoever
    asks. ``language`` marks a rule for language models only, ``costly`` one that runs backward passes, or
    dozens of forward passes, over the calibration split. ``peer`` marks another library's own method for
    models of images: it stands in comparisons, and no search starts from it. ``shipped`` says that a rule comes
    with rlprune: only those are among the starts of every search, so that a rule of yours changes nobody else's
    results.
    """

    name: str
    summary: str
    function: RuleFunction
    needs_workload: bool = False
    counter: ProbeCount | None = None
    language: bool = False
    costly: bool = False
    peer: bool = False
    shipped: bool = True

    @property
    def probes(self) -> bool:
        """Whether the rule scores candidates."""
        return self.counter is not None

    def probe_count(self, space: PruningSpace) -> int:
        """How many candidates the rule scores on a space before it has its distribution."""
        return self.counter(space) if self.counter is not None else 0


RULES: dict[str, Rule] = {}
RESERVED = ("auto", "dense")
"""Names that mean something else where a rule or an agent is named."""


def is_language(space: PruningSpace) -> bool:
    """Whether a space is that of a causal language model."""
    return any(g.kind in LANGUAGE_KINDS for g in space.groups)


def rules_for(space: PruningSpace, *, peers: bool = False) -> dict[str, Rule]:
    """The rules that apply to a space, by name: those for language models stay out of other models.

    With ``peers`` other libraries' methods are among them, where they apply.
    """
    language = is_language(space)
    return {
        name: found
        for name, found in RULES.items()
        if (language or not found.language) and (not found.peer or (peers and not language))
    }


def rule(
    summary: str,
    *,
    needs_workload: bool = False,
    probes: ProbeCount | None = None,
    language: bool = False,
    costly: bool = False,
    peer: bool = False,
) -> Callable[[RuleFunction], RuleFunction]:
    """Register a function under its own name, and check what it is given and what it returns.

    Args:
        summary: one line for ``rlprune list rules``.
        needs_workload: refuse contexts without a workload (a probing rule is content with ``probe``).
        probes: how many candidates the rule scores on a space; None for none.
        language: refuse the spaces of other models than causal language models.
        costly: the rule runs backward passes, or dozens of forward passes over the calibration split.
        peer: another library's method: in comparisons only, and not for causal language models.

    Raises (when applied):
        ConfigError: the name is taken, or the summary is missing.
    """
    if not isinstance(summary, str):
        raise ConfigError('rule: needs a summary, as in @rule("what it does")')

    def register(function: RuleFunction) -> RuleFunction:
        name = function.__name__
        check_free("rule", name, RULES[name].function if name in RULES else None, function)

        def checked(context: Context) -> Floats:
            if language and not is_language(context.space):
                raise ConfigError(
                    f"rule: {name!r} is for causal language models; allowed here: "
                    f"{', '.join(rules_for(context.space))}"
                )
            if peer and is_language(context.space):
                raise ConfigError(f"rule: {name!r} is not for causal language models")
            if needs_workload and not (probes and context.probe):
                context.data(name)
            return _counted(context, _valid(name, function(context), len(context.space.groups)))

        update_wrapper(checked, function)
        shipped = function.__module__.startswith(f"{__package__}.")
        RULES[name] = Rule(name, summary, checked, needs_workload, probes, language, costly, peer, shipped)
        return checked

    return register


def check_free(what: str, name: str, owner: Any, newcomer: Any) -> None:
    """ConfigError where a name belongs to another; only a notebook may define its own function again."""
    again = owner is not None and owner.__module__ == newcomer.__module__ == "__main__"
    if (owner is not None and not again) or name in RESERVED:
        raise ConfigError(f"{what}: the name {name!r} is taken; choose another")


def _valid(name: str, distribution: Any, groups: int) -> Floats:
    """What a rule returned as float64; ConfigError naming the rule where that is no distribution."""
    try:
        values = np.asarray(distribution, dtype=np.float64)
    except (TypeError, ValueError, RuntimeError):
        raise ConfigError(
            f"rule {name!r}: must return {groups} numbers, got {type(distribution).__name__}"
        ) from None
    if values.shape != (groups,):
        raise ConfigError(
            f"rule {name!r}: must return shape ({groups},), one number a group, got {values.shape}"
        )
    if not (np.isfinite(values).all() and (values >= 0).all() and values.any()):
        raise ConfigError(f"rule {name!r}: must return finite numbers of 0 and more, not all of them 0")
    return values


def _counted(context: Context, distribution: Floats) -> Floats:
    """The distribution with nothing on the groups that do not count.

    Where the groups that it names cannot meet the budget by themselves, the other active ones get a trace, so
    that the projection takes the rest from them and not from those that save nothing.
    """
    active = context.active
    if active.all():
        return distribution
    share = np.where(active, distribution, 0.0)
    if not share.any():
        return active.astype(np.float64)
    space = context.space
    furthest = np.where(share > 0, space.minimums, space.widths)
    if space.cost(furthest, context.metric) > space.target(context.budget, context.metric):
        share = np.where(active & (share == 0), 1e-6 * share.max(), share)
    return share
