"""Two cuts in a row as one plan against the first dense model: of a pruned model that was traced and pruned again."""

from __future__ import annotations

import numpy as np

from ..errors import ArtifactError
from ..utils.arrays import Ints
from .plan import Plan
from .space import Cut, PruningSpace
from .surgery import axis_indices


def compose(first: Plan, second: Plan) -> Plan:
    """The plan in the space of ``first`` that cuts at once what ``first`` and then ``second`` cut.

    ``prune(model, compose(first, second))`` is ``prune(prune(model, first), second)``, and a model that was trained
    between the cuts is saved by the composed plan.

    Args:
        second: made in the space of the model that ``first`` left (``rlprune.trace(slim, ...)``).

    Raises:
        ArtifactError: the second plan belongs to another model, or cuts what the first space holds together or
            protects.
    """
    kept = axis_indices(first.space, first.kept)
    left = _left(second)
    gone = np.zeros(int(first.space.unit_counts.sum()), dtype=bool)
    stays: list[tuple[Cut, Ints]] = []
    for cut in first.space.cuts:
        slots = first.space.axes[cut.axis].slots
        index = kept[cut.axis]
        before = np.arange(len(slots)) if index is None else index
        size, after = left.pop((cut.tensor, cut.dim), (len(before), None))
        if size != len(before):
            raise ArtifactError(
                f"compose: {cut.tensor!r} has {len(before)} entries in dimension {cut.dim} after the first plan, but "
                f"the second was made for {size}: it belongs to another model"
            )
        stay = before if after is None else before[after]
        lost = slots[np.setdiff1d(before, stay)]
        if (lost < 0).any():
            raise _foreign(cut.tensor)
        gone[lost] = True
        stays.append((cut, stay))
    for (tensor, _), (_, after) in left.items():
        if after is not None:
            raise _foreign(tensor)
    composed = tuple(
        units[~gone[offset + units]] for offset, units in zip(first.space.offsets, first.kept, strict=True)
    )
    _check(first.space, composed, stays)
    return Plan(
        first.space, first.space.widths_of(composed), composed, {**second.origin, "after": dict(first.origin)}
    )


def _left(plan: Plan) -> dict[tuple[str, int], tuple[int, Ints | None]]:
    """(tensor, dimension) -> its size before the plan, and what the plan keeps of it (None: all)."""
    kept = axis_indices(plan.space, plan.kept)
    return {
        (cut.tensor, cut.dim): (len(plan.space.axes[cut.axis].slots), kept[cut.axis])
        for cut in plan.space.cuts
    }


def _check(space: PruningSpace, kept: tuple[Ints, ...], stays: list[tuple[Cut, Ints]]) -> None:
    """What is cut together in the first space is cut together by both plans."""
    indices = axis_indices(space, kept)
    for cut, stay in stays:
        index = indices[cut.axis]
        wanted = np.arange(len(space.axes[cut.axis].slots)) if index is None else index
        if not np.array_equal(wanted, stay):
            raise _foreign(cut.tensor)


def _foreign(tensor: str) -> ArtifactError:
    return ArtifactError(
        f"compose: the second plan cuts {tensor!r} where the first space keeps it whole or in one with others; trace "
        "both with the same settings"
    )
