"""The pruning space of one model: its groups, their limits and their costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import nn

from ..errors import BudgetError
from ..utils.arrays import Floats, Ints
from .attributes import set_size
from .budget import BudgetLike, Limits, parse_budget, project
from .cost import AxisSize, Cost, Term, amount, formula
from .cost_terms import ProtectedShare, protected_shares
from .fingerprint import fingerprint as fingerprint
from .ties import Ties, classes


@dataclass(frozen=True)
class Member:
    """A layer that a group touches: ``count`` slots of the layer's ``role`` belong to each unit.

    ``role`` is "out" (produces the channels), "in" (consumes them), or the kind of a layer that they
    pass through: "depthwise", "norm", "activation", "parameter", "pad".
    """

    module: str
    role: str
    count: int


@dataclass(frozen=True)
class Group:
    """Tensor slices that must be cut together; ``width``, ``minimum`` and ``step`` are counted in units.

    ``unit`` is the number of channels of the first producing layer in a unit, ``depth`` that layer's
    relative position in the forward pass (0 first, 1 last), ``kernel`` and ``stride`` its geometry.
    ``block`` is the transformer block that the group lies in, -1 where there are none. ``exact`` is False where no
    cut equals the masked dense model (norms cross the group): such groups are cut on request, and rules leave them.

    ``lanes`` counts equal parts that lie in one tensor and are cut to one width, each at its own units (the experts of
    a layer, whose neurons are ranked expert by expert). Units are numbered lane after lane, and a group has ``lanes *
    width`` of them; the width is that of one lane. ``lane_group`` names the group whose units are the lanes, where
    whole lanes can go as well: then units are kept in the lanes that stay.

    ``fewest`` units are needed for the model to run (a router's choices); ``minimum`` is what a search keeps to.
    """

    name: str
    kind: str
    width: int
    unit: int
    minimum: int
    step: int
    members: tuple[Member, ...]
    depth: float
    kernel: int
    stride: int
    block: int = -1
    exact: bool = True
    lanes: int = 1
    lane_group: str = ""
    fewest: int = 1

    @property
    def lowest(self) -> int:
        """The smallest width that a plan may have, whatever ``minimum`` asks for: what the model needs to run."""
        return min(self.fewest, self.minimum)

    @property
    def units(self) -> int:
        """All units of the group, in all of its lanes."""
        return self.lanes * self.width


@dataclass(frozen=True)
class Axis:
    """One tensor dimension with cut slots: ``slots[i]`` is the unit (numbered over all groups) or -1 (always kept).

    With ``lanes`` above 1 the dimension is cut at other places in each entry of the tensor's first dimension, which
    are the lanes: ``slots`` holds those of one lane after the other. ``lane_axis`` is the number of the axis that rules
    the first dimension, -1 where all lanes stay.
    """

    slots: Ints
    lanes: int = 1
    lane_axis: int = -1

    @property
    def length(self) -> int:
        """Slots of the dimension: of one lane where there are several."""
        return len(self.slots) // self.lanes


@dataclass(frozen=True)
class Cut:
    """A tensor dimension of the model and the axis that rules it; ``consumer`` marks input columns of weights."""

    tensor: str
    dim: int
    axis: int
    consumer: bool


@dataclass(frozen=True)
class AttributeRule:
    """A size that a module stores and that follows the widths: ``factor * size of the axis``.

    ``attribute`` is a path (see `pruning.attributes`). ``assign(module, attribute, value)`` sets it.
    """

    module: str
    attribute: str
    axis: int
    factor: int
    assign: Callable[[nn.Module, str, int], None] = set_size


@dataclass(frozen=True)
class MaskRule:
    """What masking needs apart from zeroed columns: ``mask(module, slots)`` makes a module of the dense model never use
    some slots of an axis (a router its removed experts), and returns the way back.
    """

    module: str
    axis: int
    mask: Callable[[nn.Module, Ints], Callable[[], None]]


@dataclass(frozen=True)
class DropRule:
    """A module of which nothing may be left on the axis: ``stub(model, module)`` then puts a stub in its place."""

    module: str
    axis: int
    stub: Callable[[nn.Module, str], None]


@dataclass(frozen=True)
class PruningSpace:
    """The ordered groups of one model with everything that cutting and costing need; made by ``rlprune.trace``.

    ``inexact`` names the groups whose cut is not exact (`Group.exact`), with the reason. ``input_shape`` is that of
    the example input, where this was a single tensor, ``inputs`` the record of any nest of them
    (``inputs.describe_inputs``). ``wing`` names the adapter that traced it (``ModelAdapter.wing``). ``terms`` are the
    parts of the costs by layer, where tracing knows them. ``ties`` are sets of groups that have one width, which a
    projection gives them; each keeps its own units.
    """

    groups: tuple[Group, ...]
    protected: Mapping[str, str]
    fingerprint: str
    axes: tuple[Axis, ...] = field(repr=False)
    cuts: tuple[Cut, ...] = field(repr=False)
    attribute_rules: tuple[AttributeRule, ...] = field(repr=False)
    costs: Mapping[str, Cost] = field(repr=False)
    unused: tuple[str, ...] = ()
    input_shape: tuple[int, ...] | None = None
    drops: tuple[DropRule, ...] = ()
    masks: tuple[MaskRule, ...] = ()
    wing: str = "vision"
    terms: tuple[Term, ...] = field(default=(), repr=False)
    inexact: Mapping[str, str] = field(default_factory=dict)
    inputs: Any = field(default=None, repr=False)
    ties: Ties = ()

    def __post_init__(self) -> None:
        for tie in self.ties:
            if len({(self.groups[g].width, self.groups[g].minimum, self.groups[g].step) for g in tie}) != 1:
                names = ", ".join(self.groups[g].name for g in tie[:2])
                raise BudgetError(
                    f"ties: {names} and others cannot have one width: they differ in size or step"
                )

    @cached_property
    def widths(self) -> Ints:
        """Dense widths in units, shape (G,)."""
        return np.array([g.width for g in self.groups], dtype=np.int64)

    @cached_property
    def minimums(self) -> Ints:
        """Smallest allowed widths in units, shape (G,)."""
        return np.array([g.minimum for g in self.groups], dtype=np.int64)

    @cached_property
    def steps(self) -> Ints:
        """What is cut at once from each group, in units, shape (G,)."""
        return np.array([g.step for g in self.groups], dtype=np.int64)

    @cached_property
    def offsets(self) -> Ints:
        """Number of the first unit of each group when all units are numbered in a row, shape (G,)."""
        return np.concatenate([[0], np.cumsum(self.unit_counts)[:-1]]).astype(np.int64)

    @cached_property
    def lanes(self) -> Ints:
        """Lanes of each group (`Group.lanes`), shape (G,); 1 for most."""
        return np.array([g.lanes for g in self.groups], dtype=np.int64)

    @cached_property
    def unit_counts(self) -> Ints:
        """Units of each group in all of its lanes, shape (G,)."""
        return self.widths * self.lanes

    def lanes_left(self, kept: Sequence[Ints]) -> list[Ints]:
        """The lanes of each group that stay (G index arrays), when the units in ``kept`` do."""
        units = {g.name: k for g, k in zip(self.groups, kept, strict=True)}
        return [units[g.lane_group] if g.lane_group else np.arange(g.lanes) for g in self.groups]

    @cached_property
    def limits(self) -> Limits:
        return Limits(self.widths, self.minimums, self.steps)

    @cached_property
    def leaders(self) -> Ints:
        """The first group that has the same width as each group, (G,): itself where nothing ties it."""
        of_group = classes(self.ties, len(self.groups))
        firsts: Ints = np.unique(of_group, return_index=True)[1][of_group].astype(np.int64)
        return firsts

    def led(self, values: Floats) -> Floats:
        """Values (..., G) in which every group has that of its leader.

        What is drawn for each group by itself means one number a tie: a mean of many draws would hardly vary.
        """
        return values[..., self.leaders] if self.ties else values

    def widths_of(self, kept: Sequence[Ints]) -> Ints:
        """The widths (G,) that the units in ``kept`` (G index arrays) make: those of one lane of each group."""
        lanes = [max(1, len(left)) for left in self.lanes_left(kept)]
        return np.array([len(k) // n for k, n in zip(kept, lanes, strict=True)], dtype=np.int64)

    def cost(self, widths: ArrayLike, metric: str = "macs") -> Any:
        """Cost of the whole model at these widths: a float for shape (G,), an array (N,) for (N, G).

        ``macs`` are half of the FLOPs that torch's counter finds for one sample, ``params`` counts
        every parameter once; both include what is protected. Language models also have ``block_params``
        (inside the blocks only) and ``kv_cache`` (bytes for each token of context, in bfloat16); a space with
        a latency table (``rlprune.latency.profile``) has ``latency``, in milliseconds.
        """
        w = self._checked(widths)
        value = formula(self.costs, metric)(w)
        return float(value) if w.ndim == 1 else value

    def dense_cost(self, metric: str = "macs") -> float:
        return float(self.cost(self.widths, metric))

    def feasible(self, metric: str = "macs") -> tuple[float, float]:
        """Lowest and highest absolute cost that widths of this space can have."""
        return self.cost(self.minimums, metric), self.dense_cost(metric)

    def lowest(self, metric: str = "macs") -> float:
        """Lowest feasible budget as a ratio of the dense cost."""
        low, dense = self.feasible(metric)
        return low / dense

    def protected_shares(self, metric: str = "macs") -> tuple[ProtectedShare, ...]:
        """Protected layers by the share of the dense cost that they keep at the smallest widths, largest first."""
        return protected_shares(self, metric)

    def target(self, budget: BudgetLike, metric: str = "macs") -> float:
        """Absolute cost that a budget (0.5, "50%", "150M") allows; BudgetError where it is not feasible."""
        dense = self.dense_cost(metric)
        target = parse_budget(budget, metric).target(dense)
        lowest = self.feasible(metric)[0]
        if not lowest <= target <= dense:
            side = "below the feasible minimum" if target < lowest else "above the dense model"
            kept = self.protected_shares(metric)[:1] if target < lowest else ()
            why = "".join(f"; {part.name} alone keeps {part.share:.1%}: {part.reason}" for part in kept)
            raise BudgetError(
                f"budget: {budget!r} ({amount(target, metric)}) is {side}; "
                f"feasible: {lowest:.6g} to {amount(dense, metric)} (ratio {lowest / dense:.4f} to 1){why}"
            )
        return target

    def project(self, distribution: ArrayLike, budget: BudgetLike, metric: str = "macs") -> Ints:
        """Widths for a distribution of shape (G,) or (N, G) under a budget (see ``budget.project``)."""
        target = self.target(budget, metric)
        return self.project_cost(distribution, target, metric)

    def project_cost(
        self, distribution: ArrayLike, target: float, metric: str = "macs", limits: Limits | None = None
    ) -> Ints:
        """As `project`, for an absolute cost, and within other limits than the dense model's."""
        cost, limits = formula(self.costs, metric), limits or self.limits
        return project(distribution, target, cost, limits, metric=metric, ties=self.ties)

    def unit_costs(self, widths: ArrayLike, metric: str = "macs") -> Floats:
        """Cost saved by taking one unit from each group at these widths; shape (G,) -> (G,).

        For latency, what the layers take less: the exception for the dense model (``TableCost``) is left out.
        """
        return formula(self.costs, metric).unit_costs(self._checked(widths).astype(np.float64))

    def axis_sizes(self) -> list[AxisSize]:
        """How many slots of each axis are left, as a function of the widths."""
        return axis_sizes(self.axes, self.widths, self.lanes)

    def with_rounding(self, round_to: int = 1, minimum: int = 1) -> PruningSpace:
        """The same space whose kept channels are multiples of ``round_to`` and at least ``minimum``."""
        return replace(self, groups=tuple(rounded(g, round_to, minimum) for g in self.groups))

    def after(self, kept: tuple[Ints, ...]) -> PruningSpace:
        """The space of the model that is left when only the units in ``kept`` (G index arrays) stay.

        Its costs are the same formulas, because these count kept units; its units are numbered anew.
        """
        offsets = np.concatenate([[0], np.cumsum([len(k) for k in kept])]).astype(np.int64)
        renumbered = np.full(int(self.unit_counts.sum()) + 1, -2, dtype=np.int64)
        renumbered[-1] = -1  # never cut
        for g, units in enumerate(kept):
            renumbered[self.offsets[g] + units] = offsets[g] + np.arange(len(units))
        slots = [renumbered[axis.slots] for axis in self.axes]
        lanes = [len(left) for left in self.lanes_left(kept)]
        widths = self.widths_of(kept).tolist()
        groups = [
            replace(g, width=w, minimum=min(g.minimum, w), lanes=n)
            for g, w, n in zip(self.groups, widths, lanes, strict=True)
        ]
        left = [s[s > -2] for s in slots]
        axes = [
            replace(a, slots=s, lanes=len(left[a.lane_axis]) if a.lane_axis >= 0 else a.lanes)
            for a, s in zip(self.axes, left, strict=True)
        ]
        return replace(self, groups=tuple(groups), axes=tuple(axes))

    def _checked(self, widths: ArrayLike) -> NDArray[np.generic]:
        w = np.asarray(widths)
        if w.ndim not in (1, 2) or w.shape[-1] != len(self.groups):
            raise BudgetError(
                f"widths: shape {w.shape} does not fit; allowed: ({len(self.groups)},) or (N, {len(self.groups)})"
            )
        return w


def axis_sizes(
    axes: Sequence[Axis], widths: Sequence[int] | Ints, lanes: Sequence[int] | Ints | None = None
) -> list[AxisSize]:
    """How many slots of each axis are left (in one lane), as a function of the widths.

    Args:
        widths: the dense ones, (G,).
        lanes: those of each group, (G,); None for 1.
    """
    sizes = []
    counted = np.asarray(widths, dtype=np.int64) * (1 if lanes is None else np.asarray(lanes, dtype=np.int64))
    owner = np.repeat(np.arange(len(widths)), counted)
    for axis in axes:
        slope = np.zeros(len(widths))
        groups, counts = np.unique(owner[axis.slots[axis.slots >= 0]], return_counts=True)
        # A slot belongs to one unit: slots of a group are its width times the slots of a unit.
        slope[groups] = counts / np.asarray(widths)[groups] / axis.lanes
        sizes.append(AxisSize(float((axis.slots < 0).sum()) / axis.lanes, slope))
    return sizes


def rounded(group: Group, round_to: int, minimum: int) -> Group:
    """The group with the step and minimum width for a rounding multiple, both given in channels.

    Attention heads and whole experts are not rounded; a group that may be dropped whole keeps its minimum of 0.
    """
    if round_to < 1 or minimum < 1:
        name = "round_to" if round_to < 1 else "minimum"
        raise BudgetError(f"prune.{name}: must be a whole number of 1 and more")
    if group.kind == "experts":
        return group
    if group.kind == "attention":
        return replace(group, step=1, minimum=min(1, group.minimum))
    # A unit of several channels is cut whole: the step is the fewest units that make a multiple.
    step = math.lcm(round_to, group.unit) // group.unit
    lowest = max(1, math.ceil(minimum / group.unit))
    lowest = min(math.ceil(lowest / step) * step, group.width) if group.minimum else 0
    return replace(group, step=step, minimum=lowest)
