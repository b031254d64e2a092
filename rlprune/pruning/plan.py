"""A plan: the widths of all groups, the units that are kept, and where the widths came from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ..errors import ArtifactError, BudgetError
from ..utils.arrays import Ints
from .budget import BudgetLike
from .space import Group, PruningSpace


@dataclass(frozen=True, eq=False)
class Plan:
    """Widths (G,) in units and, for each group, the sorted indices of the units that are kept.

    Of a group with lanes these are ``width`` units in each lane that stays (`Group.lanes`, `PruningSpace.lanes_left`).
    ``origin`` says where the widths came from (method, budget, metric): plain JSON values.
    """

    space: PruningSpace = field(repr=False)
    widths: Ints
    kept: tuple[Ints, ...] = field(repr=False)
    origin: Mapping[str, object] = field(default_factory=lambda: MappingProxyType({}))

    def to_dict(self) -> dict[str, Any]:
        """JSON-able content: groups with kept indices, widths, achieved costs and the origin."""
        shape = list(self.space.input_shape) if self.space.input_shape else None
        return {
            "fingerprint": self.space.fingerprint,
            "input": shape if self.space.inputs is None else self.space.inputs,
            "groups": [
                {"name": g.name, "kind": g.kind, "width": g.width, **_lane_facts(g), "kept": k.tolist()}
                for g, k in zip(self.space.groups, self.kept, strict=True)
            ],
            "widths": self.widths.tolist(),
            "cost": {metric: self.space.cost(self.widths, metric) for metric in self.space.costs},
            "dense_cost": {metric: self.space.dense_cost(metric) for metric in self.space.costs},
            "origin": dict(self.origin),
            **({"inexact": dict(self.space.inexact)} if self.space.inexact else {}),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], space: PruningSpace) -> Plan:
        """The plan in ``data`` for ``space``; ArtifactError when it was made for another model."""
        try:
            if data["fingerprint"] != space.fingerprint:
                raise ArtifactError("plan: made for another architecture (its fingerprint differs)")
            kept = tuple(np.array(g["kept"], dtype=np.int64) for g in data["groups"])
            widths = np.array(data["widths"], dtype=np.int64)
            plan = cls(space, widths, kept, dict(data.get("origin", {})))
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"plan: damaged ({type(error).__name__}: {error})") from None
        _check(plan)
        return plan


def _lane_facts(group: Group) -> dict[str, Any]:
    """What a file says of a group with lanes, and of no other."""
    if group.lanes == 1 and not group.lane_group:
        return {}
    return {"lanes": group.lanes, **({"lane_group": group.lane_group} if group.lane_group else {})}


def _check(plan: Plan) -> None:
    groups = plan.space.groups
    if plan.widths.shape != (len(groups),) or len(plan.kept) != len(groups):
        raise ArtifactError(f"plan: holds {len(plan.kept)} groups, the model has {len(groups)}")
    lanes = plan.space.lanes_left(plan.kept)
    for group, width, kept, left in zip(groups, plan.widths, plan.kept, lanes, strict=True):
        fits = len(kept) == width * len(left) and width >= group.lowest and kept.ndim == 1
        if not fits or ((kept < 0) | (kept >= group.units)).any() or (np.diff(kept) <= 0).any():
            raise ArtifactError(
                f"plan: group {group.name!r}: the kept units do not fit its {group.width} units"
            )
        if not np.array_equal(kept // max(1, group.width), np.repeat(left, width)):
            raise ArtifactError(
                f"plan: group {group.name!r}: must keep {width} units in each of the {len(left)} lanes that stay"
            )


def make_plan(
    space: PruningSpace,
    *,
    importance: Sequence[ArrayLike],
    distribution: ArrayLike | None = None,
    widths: ArrayLike | None = None,
    budget: BudgetLike | None = None,
    metric: str = "macs",
    origin: Mapping[str, object] | None = None,
) -> Plan:
    """Choose the units to keep: the most important ones of each group, ties by index.

    Args:
        importance: G arrays, one score a unit (higher is kept).
        distribution: shape (G,), projected onto ``budget``; or give ``widths`` (G,) themselves.

    Raises:
        BudgetError: neither or both of ``distribution`` and ``widths``, or values that do not fit.
    """
    if (distribution is None) == (widths is None):
        raise BudgetError("make_plan: give either distribution (with a budget) or widths")
    facts = dict(origin or {})
    if distribution is not None:
        if budget is None:
            raise BudgetError("make_plan: a distribution needs a budget")
        widths = space.project(distribution, budget, metric)
        if widths.ndim != 1:
            raise BudgetError("make_plan: one distribution of shape (G,) makes one plan")
        facts = {"budget": str(budget), "metric": metric} | facts
    chosen = np.asarray(widths)
    if chosen.shape != (len(space.groups),):
        raise BudgetError(f"make_plan: widths of shape {chosen.shape}; allowed: ({len(space.groups)},)")
    if not np.array_equal(chosen, chosen.astype(np.int64)):
        raise BudgetError("make_plan: widths must be whole numbers")
    chosen = chosen.astype(np.int64)
    for group, width in zip(space.groups, chosen, strict=True):
        lowest = group.lowest
        if not lowest <= width <= group.width:
            raise BudgetError(
                f"make_plan: width {width} of group {group.name!r}; allowed: {lowest} to {group.width}"
            )
    return Plan(space, chosen, best_units(space, importance, chosen), facts)


def best_units(space: PruningSpace, importance: Sequence[ArrayLike], widths: Ints) -> tuple[Ints, ...]:
    """Sorted indices of the ``widths[g]`` highest scores of each group; stable, so ties keep the lower index.

    A group with lanes has as many scores as units, lane after lane, and is ranked lane by lane.
    """
    if len(importance) != len(space.groups):
        raise BudgetError(f"importance: {len(importance)} arrays for {len(space.groups)} groups")
    ranked = []
    for group, scores, width in zip(space.groups, importance, widths, strict=True):
        values = np.asarray(scores, dtype=np.float64)
        if values.shape != (group.units,) or np.isnan(values).any():
            raise BudgetError(f"importance: group {group.name!r} needs {group.units} numbers without NaN")
        rows = np.argsort(-values.reshape(group.lanes, -1), axis=1, kind="stable")[:, :width]
        ranked.append(np.sort(rows, axis=1) + group.width * np.arange(group.lanes)[:, None])
    whole = {g.name: rows.reshape(-1) for g, rows in zip(space.groups, ranked, strict=True)}
    return tuple(
        (rows[whole[g.lane_group]] if g.lane_group else rows).reshape(-1)
        for g, rows in zip(space.groups, ranked, strict=True)
    )
