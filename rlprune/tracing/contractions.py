"""What matrix products and convolutions do to labels: they consume those that they sum over and give others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from ..utils.arrays import Ints
from .flow import Operand, Step
from .labels import Labels, first_along, settled, vector


@dataclass(frozen=True)
class _Side:
    """One factor of a product: what it is summed over with, and what passes on to the result."""

    summed: Labels | None
    passed: list[Labels]
    flexible: bool


def product(step: Step) -> None:
    """(n, k) @ (k, m), with something added or not."""
    *added, a, b = step.args[:3] if "addmm" in step.name else step.args[:2]
    _product(step, a, b, "nk", "km", added)


def batched_product(step: Step) -> None:
    """(b, n, k) @ (b, k, m), with something added or not."""
    *added, a, b = step.args[:3] if step.name == "baddbmm" else step.args[:2]
    _product(step, a, b, "bnk", "bkm", added)


def linear(step: Step) -> None:
    """(..., k) @ (m, k)^T + (m,)."""
    x, weight, *added = step.args
    letters = "bcdefgh"[: x.ndim - 1] + "k"
    _product(step, x, weight, letters, "mk", [t for t in added if t is not None])


def _product(step: Step, a: Tensor, b: Tensor, of_a: str, of_b: str, added: Sequence[Tensor]) -> None:
    flow, out = step.flow, step.out
    letters = of_a.replace("k", "m")
    left, right = _side(step, a, of_a), _side(step, b, of_b)
    _sum_up(step, left, right)
    found: list[Labels] = []
    for labels, names in [*((p, of_a) for p in left.passed), *((p, of_b) for p in right.passed)]:
        flow.used(labels, "out")
        placed = _placed(labels, names, letters, out.shape)
        match = next((i for i, f in enumerate(found) if f.varies & placed.varies), None)
        if match is None:
            found.append(placed)
        else:
            found[match] = flow.join(found[match], placed)
    for origin, vary in ((left, of_a), (right, of_b)):
        if origin.summed is not None and origin.summed.origin is not None:
            flow.inputs.setdefault(origin.summed.origin[0], origin.summed.along(vary.index("k")))
    sizes = {**dict(zip(of_a, a.shape, strict=True)), **dict(zip(of_b, b.shape, strict=True))}
    rows = _varied(step, found, letters)
    for side in (left, right):
        if side.summed is not None:
            rows.setdefault("k", _row(side.summed))
    rest = math.prod(n for letter, n in sizes.items() if letter not in rows)
    weights = (labels.origin for tensor in (a, b) for labels in flow.of(tensor) if labels.origin)
    flow.multiply(next(weights, None), rest / flow.batch, list(rows.values()))
    if added:
        found = step.merged([Operand(found, tuple(out.shape)), *(step.operand(t, out.shape) for t in added)])
    flow.put(out, found)
    flow.note_sizes(out, found)


def _side(step: Step, tensor: Tensor, letters: str) -> _Side:
    flow = step.flow
    summed: Labels | None = None
    passed: list[Labels] = []
    flexible = False
    k = letters.index("k")
    for labels in flow.of(tensor):
        flexible |= labels.constant
        if k not in labels.varies:
            if labels.varies:
                passed.append(labels)
        elif labels.varies == {k}:
            summed = labels if summed is None else flow.join(summed, labels)
        elif all(letters[d] in "bk" for d in labels.varies):
            # A matrix for each of several heads: who goes, goes with all of its channels.
            first = first_along(labels.of, (k,)).expand(labels.of.shape)
            joined = flow.join(labels, settled(flow.sets, first))
            flow.heads.append(joined.unique())
            passed.append(joined)
        elif "b" not in letters:
            alone = step.only(labels, k)
            summed = alone if summed is None else flow.join(summed, alone)
        else:
            flow.fix(labels, f"{step.full} in {flow.place()} mixes them with others")
    return _Side(summed, passed, flexible)


def _sum_up(step: Step, left: _Side, right: _Side) -> None:
    a, b = left.summed, right.summed
    flow = step.flow
    for labels in (a, b):
        if labels is not None:
            flow.used(labels, "in")
    if a is not None and b is not None:
        flow.sets.join(_row(a), _row(b))
        return
    for labels, other in ((a, right), (b, left)):
        if labels is not None and labels.origin is None and not other.flexible:
            flow.fix(labels, f"{step.full} in {flow.place()} sums over them with something of a fixed size")


def _row(labels: Labels) -> Ints:
    (dim,) = labels.varies
    return labels.along(dim)


def _placed(labels: Labels, names: str, letters: str, shape: Sequence[int]) -> Labels:
    """Labels of a factor in the dimensions of the result."""
    of = first_along(labels.of, [d for d, name in enumerate(names) if name == "k"])
    kept = [d for d, name in enumerate(names) if name != "k"]
    of = of[tuple(0 if name == "k" else slice(None) for name in names)]
    sizes = [1] * len(letters)
    for place, d in enumerate(kept):
        sizes[letters.index(names[d])] = of.shape[place]
    varies = frozenset(letters.index(names[d]) for d in labels.varies)
    return Labels(of.reshape(sizes).expand(*shape), varies)


def _varied(step: Step, found: Sequence[Labels], letters: str) -> dict[str, Ints]:
    """The labels along those dimensions of a result that channels vary along alone."""
    rows: dict[str, Ints] = {}
    for labels in found:
        now = settled(step.flow.sets, labels.of)
        if len(now.varies) == 1:
            (dim,) = now.varies
            rows.setdefault(letters[dim], now.along(dim))
    return rows


def convolution(step: Step) -> None:
    """(N, C, ...) with weights (O, C / groups, ...), or (C, O / groups, ...) where transposed."""
    x, weight, bias = step.args[:3]
    transposed, groups = bool(step.args[6]), int(step.args[8])
    _convolution(step, x, weight, bias, transposed, groups)


def deformable(step: Step) -> None:
    """A convolution whose places come from other feature maps, which keep their channels."""
    x, weight, offset, mask, bias = step.args[:5]
    for tensor in (offset, mask):
        for labels in step.flow.of(tensor):
            step.flow.fix(labels, f"{step.full} in {step.flow.place()} reads them as places")
    _convolution(step, x, weight, bias, False, int(step.args[11]), counts=False)


def _convolution(
    step: Step,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    transposed: bool,
    groups: int,
    counts: bool = True,
) -> None:
    flow, out = step.flow, step.out
    outs, ins = (1, 0) if transposed else (0, 1)
    depthwise = groups > 1 and x.shape[1] == groups
    read = _channels(step, x)
    gives = _weight(step, weight, outs, "pass" if depthwise else "out")
    takes = _weight(step, weight, ins, "pass" if depthwise else "in")
    origin = next((labels.origin for labels in flow.of(weight) if labels.origin), None)
    if counts:
        known = {outs: gives, ins: takes}
        rest = math.prod(n for d, n in enumerate(weight.shape) if known.get(d) is None)
        # What a model makes one sample into, frames or regions, counts; x is (N, C, *places).
        places = math.prod((x if transposed else out).shape[2:]) * x.shape[0] / flow.batch
        flow.multiply(origin, float(places * rest), [row for row in (gives, takes) if row is not None])
    name = None if origin is None else origin[0]
    if name is not None and read is not None:
        flow.inputs.setdefault(name, read)
    if depthwise:
        given = _depthwise(step, read, takes if transposed else gives, out.shape[1] // groups, transposed)
    elif groups > 1:
        given = _grouped(step, read, gives, takes, groups, transposed)
    else:
        _meet(step, read, takes)
        given = gives
    if given is None:
        return
    if name is not None:
        flow.outputs.setdefault(name, given)
    found = [settled(flow.sets, vector(given, 1, out.shape))]
    if bias is not None:
        moved = [
            Labels(vector(labels.along(0), 1, out.shape), frozenset({1}), labels.origin)
            for labels in flow.of(bias)
            if labels.varies
        ]
        size = (1, len(given), *[1] * (out.ndim - 2))
        found = step.merged([Operand(found, tuple(out.shape)), Operand(moved, size)])
    flow.put(out, found)


def _channels(step: Step, x: Tensor) -> Ints | None:
    """The labels (C,) of a convolution's input; None where it has none."""
    rows = []
    for labels in step.flow.of(x):
        if 1 in labels.varies:
            rows.append(step.only(labels, 1).along(1))
        elif labels.varies:
            step.flow.fix(labels, f"{step.full} in {step.flow.place()} runs over them")
    for other in rows[1:]:
        step.flow.sets.join(rows[0], other)
    return rows[0] if rows else None


def _weight(step: Step, weight: Tensor, dim: int, role: str) -> Ints | None:
    """The labels along one dimension of a weight."""
    for labels in step.flow.of(weight):
        if labels.varies == {dim}:
            step.flow.used(labels, role)
            return labels.along(dim)
    return None


def _meet(step: Step, read: Ints | None, takes: Ints | None) -> None:
    if read is not None and takes is not None:
        step.flow.sets.join(read, takes)
    elif read is not None:
        step.flow.fixed.append((read, f"{step.full} in {step.flow.place()} has weights of a fixed size"))


def _depthwise(step: Step, read: Ints | None, own: Ints | None, each: int, transposed: bool) -> Ints | None:
    """A channel goes with all of its filters; ``own`` are the weight's labels, one a filter (one a channel where
    transposed)."""
    if own is None:
        _meet(step, read, None)
        return None
    if transposed:
        if read is not None:
            step.flow.sets.join(read, own)
        return np.repeat(own, each)
    if read is not None:
        step.flow.sets.join(np.repeat(read, each), own)
    return own


def _grouped(
    step: Step, read: Ints | None, gives: Ints | None, takes: Ints | None, groups: int, transposed: bool
) -> Ints | None:
    """A unit is one channel of every group, so that the groups stay even."""
    flow = step.flow
    if not transposed and gives is not None and len(gives) == groups:
        for row in (read, gives, takes):
            if row is not None:
                what = "is a grouped convolution with several inputs for each of its filters"
                flow.fixed.append((row, f"{flow.place()} {what}"))
        return gives
    if read is not None:
        each = len(read) // groups
        flow.sets.join(read, np.tile(read[:each], groups))
        _meet(step, read if transposed else read[:each], takes)
    if gives is None:
        return None
    if transposed:
        return np.tile(gives, groups)
    flow.sets.join(gives, np.tile(gives[: len(gives) // groups], groups))
    return gives
