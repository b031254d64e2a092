"""What a rule may look at, and the registry that every rule puts itself into."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, update_wrapper
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import nn

from ..config.config import AUTO
from ..errors import ConfigError, DataError
from ..importance.calibration_cache import CalibrationCache
from ..language.calibration.cache import language_calibration
from ..language.calibration.statistics import Statistics
from ..pruning.plan import make_plan
from ..pruning.space import PruningSpace
from ..pruning.surgery import prune
from ..pruning.ties import Ties
from ..utils.arrays import Bools, Floats, Ints
from ..utils.registry import Registry
from ..workloads.adapter import adapter_named
from ..workloads.base import Workload

Measured = TypeVar("Measured")


@dataclass(frozen=True)
class Context:
    """What a rule sees of the model that is to be pruned.

    ``importance`` holds one array of unit scores a group (higher is kept). ``budget`` and ``metric`` are
    those of ``PruningSpace.project``. ``probe(widths)`` returns the loss of a built candidate (lower is
    better) and is charged to the rule; without it a rule that needs losses measures them on the
    workload's validation split. ``divergence(widths)`` is charged like it and returns how far the outputs of the
    candidate are from the dense model's, in nats; without it a rule takes the loss that a candidate adds.
    ``expect(plans)`` may be told of the probes that will follow, which are scored at the same time then, where there
    are workers. ``calibration`` remembers what is slow to measure and depends on the model, the space's groups and the
    calibration data alone; give all contexts of one model the same one (it is made where none is given).
    """

    space: PruningSpace
    model: nn.Module
    importance: Sequence[NDArray[Any]]
    budget: Any
    metric: str = "macs"
    workload: Workload | None = None
    probe: Callable[[Ints], float] | None = None
    seed: int = 0
    expect: Callable[[Sequence[Ints]], None] | None = field(default=None, repr=False, compare=False)
    calibration: CalibrationCache | None = field(default=None, repr=False, compare=False)
    divergence: Callable[[Ints], float] | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.calibration is None:
            adapter = adapter_named(self.space.wing)
            made = adapter.calibration(self.workload, self.space, self.model, seed=self.seed)
            object.__setattr__(self, "calibration", made)

    @cached_property
    def active(self) -> Bools:
        """The groups, (G,), that the pruning is spread over: those whose units cost something in the metric.

        Feed-forward neurons hold no KV cache, so cutting them for that budget would be loss without gain;
        groups without an exact cut (the hidden size) are left to the searches.
        """
        costs = self.space.unit_costs(self.space.widths, self.metric)
        exact = np.array([g.exact for g in self.space.groups], dtype=bool)
        found: Bools = (costs > 0) & (self.space.widths > 0) & exact
        return found if found.any() else np.ones(len(exact), dtype=bool)

    def data(self, rule: str) -> Workload:
        """The workload; DataError naming the rule where there is none."""
        if self.workload is None:
            raise DataError(f"the rule {rule!r} needs a workload: it reads data; give Context(workload=...)")
        return self.workload

    def loss_probe(self, rule: str) -> Callable[[Ints], float]:
        """``probe``, or without one the loss of the cut model on the validation split, without recovery."""
        if self.probe is not None:
            return self.probe
        workload = self.data(rule)

        def loss(widths: Ints) -> float:
            plan = make_plan(self.space, importance=self.importance, widths=widths)
            return workload.evaluate(prune(self.model, plan), "validation").loss

        return loss

    def cached(self, name: str, make: Callable[[], Measured]) -> Measured:
        """``make()``, once for all the contexts that have the same ``calibration``."""
        assert self.calibration is not None
        return self.calibration.cached(name, make)

    def statistics(self) -> Statistics:
        """Input moments and cosines of a language model on the calibration split
        (``language.calibration.statistics``)."""
        assert self.calibration is not None
        return language_calibration(self.calibration, "statistics").statistics()


RuleFunction = Callable[[Context], Floats]
ProbeCount = Callable[[PruningSpace], int]


@dataclass(frozen=True)
class Rule:
    """A closed-form distribution: ``function(context)`` gives non-negative numbers of shape (G,).

    ``counter`` belongs to a rule that scores candidates to find its distribution; they are charged to the method that
    asks. ``wing`` names the only wing whose models have the rule (``PruningSpace.wing``), None stands for all;
    ``costly`` marks one that runs backward passes, or dozens of forward passes, over the calibration split;
    ``measures`` is the name of what they give in the calibration cache, where that is not the rule's own.
    ``external`` marks another library's own method: it stands in comparisons, and no search starts from it.
    ``alike`` names a kind of groups that the rule gives one width, where they are as wide: what the budget leaves over
    then stays unspent, because one step of a single group would make them differ. ``shipped`` says that a rule comes
    with rlprune: only those are among the starts of every search, so that a rule of yours changes nobody else's
    results. ``on_request`` marks a variant of another rule, which runs only where it is named.
    """

    name: str
    summary: str
    function: RuleFunction
    needs_workload: bool = False
    counter: ProbeCount | None = None
    wing: str | None = None
    costly: bool = False
    external: bool = False
    shipped: bool = True
    alike: str | None = None
    on_request: bool = False
    measures: str | None = None

    @property
    def probes(self) -> bool:
        """Whether the rule scores candidates."""
        return self.counter is not None

    def probe_count(self, space: PruningSpace) -> int:
        """How many candidates the rule scores on a space before it has its distribution."""
        return self.counter(space) if self.counter is not None else 0


RULES: Registry[Rule] = Registry("rule", reserved=(AUTO,))
RESERVED = ("auto", "dense")
"""Names that mean something else where a rule or an agent is named."""


def applies(rule: Rule, space: PruningSpace) -> bool:
    """Whether a space is of the wing that a rule is for."""
    return rule.wing in (None, space.wing)


def rules_for(space: PruningSpace, *, external: bool = False) -> dict[str, Rule]:
    """The rules that apply to a space, by name; with ``external`` other libraries' methods are among them.

    Those that run on request only are not.
    """
    RULES.complete()
    return {
        name: found
        for name, found in RULES.items()
        if applies(found, space) and (external or not found.external) and not found.on_request
    }


def rule_widths(found: Rule, context: Context) -> Ints:
    """Widths (G,) that a rule gives at the context's budget: no step more fits, where groups have one width of all."""
    space = context.space
    if found.alike is not None and not space.ties:
        space = replace(space, ties=_ties(space, found.alike))
    return space.project(found.function(context), context.budget, context.metric)


def _ties(space: PruningSpace, kind: str) -> Ties:
    """The groups of a kind, together where they have one width and one step."""
    alike: dict[tuple[int, int, int], list[int]] = {}
    for index, g in enumerate(space.groups):
        if g.kind == kind:
            alike.setdefault((g.width, g.minimum, g.step), []).append(index)
    return tuple(tuple(found) for found in alike.values() if len(found) > 1)


def rule(
    summary: str,
    *,
    needs_workload: bool = False,
    probes: ProbeCount | None = None,
    wing: str | None = None,
    costly: bool = False,
    external: bool = False,
    alike: str | None = None,
    on_request: bool = False,
    measures: str | None = None,
) -> Callable[[RuleFunction], RuleFunction]:
    """Register a function under its own name, and check what it is given and what it returns.

    Args:
        summary: one line for ``rlprune list rules``.
        needs_workload: refuse contexts without a workload (a probing rule is content with ``probe``).
        probes: how many candidates the rule scores on a space; None for none.
        wing: the only wing whose models have the rule ("language": causal language models); None for all.
        costly: the rule runs backward passes, or dozens of forward passes over the calibration split.
        external: another library's method: in comparisons only.
        alike: a kind of groups ("ffn") that get one width, where they are as wide.
        on_request: the rule runs only where it is named.
        measures: the name in the calibration cache of what a costly rule reads, where that is not its own.

    Raises (when applied):
        ConfigError: the name is taken, or the summary is missing.
    """
    if not isinstance(summary, str):
        raise ConfigError('rule: needs a summary, as in @rule("what it does")')

    def register(function: RuleFunction) -> RuleFunction:
        name = function.__name__
        check_free("rule", name, RULES[name].function if name in RULES else None, function)

        def checked(context: Context) -> Floats:
            if not applies(RULES[name], context.space):
                raise ConfigError(
                    f"rule: {name!r} is for {adapter_named(wing or '').models}; allowed here: "
                    f"{', '.join(rules_for(context.space))}"
                )
            if needs_workload and not (probes and context.probe):
                context.data(name)
            return _counted(context, _valid(name, function(context), len(context.space.groups)))

        update_wrapper(checked, function)
        shipped = function.__module__.startswith(f"{__package__}.")
        kind = (wing, costly, external, shipped, alike, on_request, measures)
        RULES[name] = Rule(name, summary, checked, needs_workload, probes, *kind)
        return checked

    return register


def check_free(what: str, name: str, owner: object, newcomer: object) -> None:
    """ConfigError where a name belongs to another; only a notebook may define its own function again."""
    again = owner is not None and owner.__module__ == newcomer.__module__ == "__main__"
    if (owner is not None and not again) or name in RESERVED:
        raise ConfigError(f"{what}: the name {name!r} is taken; choose another")


def _valid(name: str, distribution: object, groups: int) -> Floats:
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
