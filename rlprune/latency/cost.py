"""The latency of a space's models as a cost of their widths: closed, monotone, and exact to project onto."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike

from ..errors import ArtifactError
from ..pruning.cost import AxisSize
from ..pruning.space import PruningSpace
from ..utils.arrays import Floats, Ints
from .table import LatencyTable, LayerTable, empty

# Values are whole multiples of 2**-30 ms: sums of them are exact in float64, in any order.
_GRAIN = 2.0**30
# Up to this share of the dense model's time a model takes what its layers do; beyond, see `TableCost`.
_BEND = 0.97
_BISECTIONS = 48
_NO_AXIS = -1


class TableCost:
    """Milliseconds of a model as a sum over its layers, interpolated bilinearly; a ``pruning.cost.Cost``.

    The dense model is an exception to its layers: its widths are mostly multiples of what kernels compute at once, so
    it is some percent faster than wide models with other widths say, and ratios to it would all be off by that.
    Where its measured time is known, sums in the last part below it (``_BEND``) are stretched or squeezed on a
    straight line so that the dense model takes what was measured.

    Args:
        terms: for each layer its table, factor, milliseconds for each of its output channels, and the sizes of
            its out and in axes (None where nothing cuts them).
        constant: milliseconds of a forward pass that no width changes.
        groups: number of groups, G.
        dense: the dense model's widths (G,) and measured milliseconds.
        table: where the terms came from, for callers that keep it.
    """

    def __init__(
        self,
        terms: Sequence[tuple[LayerTable, float, float, AxisSize | None, AxisSize | None]],
        constant: float,
        groups: int,
        table: LatencyTable | None = None,
        dense: tuple[Ints, float] | None = None,
    ) -> None:
        self.table = table
        self.constant = float(np.rint(constant * _GRAIN) / _GRAIN)
        layers = len(terms)
        self._base = np.zeros((2, layers))
        self._slope = np.zeros((2, groups, layers))
        cells = [_Cells(), _Cells()]
        values: list[Floats] = []
        starts = np.zeros(layers, dtype=np.int64)
        for i, (layer, factor, slope, *axes) in enumerate(terms):
            starts[i] = sum(v.size for v in values)
            values.append(_scaled(layer, factor, slope).ravel())
            for side, (axis, sizes) in enumerate(zip(axes, (layer.outs, layer.ins), strict=True)):
                self._base[side, i] = float(sizes[-1]) if axis is None else axis.constant
                if axis is not None:
                    self._slope[side, :, i] = axis.slope
                cells[side].add(sizes, len(layer.ins) if side == 0 else 1)
        self._values = np.concatenate([*values, np.zeros(1)])
        self._starts = starts
        self._cells = [c.build() for c in cells]
        touched = (self._slope[0] != 0) | (self._slope[1] != 0)
        self._pair_groups, self._pair_layers = np.nonzero(touched)
        self._owner = np.zeros((len(self._pair_groups), groups))
        self._owner[np.arange(len(self._pair_groups)), self._pair_groups] = 1.0
        self._bend: tuple[float, float] | None = None
        if dense is not None:
            sums, ms = float(self(dense[0])), dense[1]
            start = float(np.rint(_BEND * min(sums, ms) * _GRAIN) / _GRAIN)
            if start < sums:
                self._bend = start, (ms - start) / (sums - start)

    def __call__(self, widths: ArrayLike) -> Floats:
        return self._bent(self.by_layer(widths).sum(axis=-1) + self.constant)

    def _bent(self, sums: Floats) -> Floats:
        if self._bend is None:
            return sums
        start, slope = self._bend
        end = np.rint((start + slope * (sums - start)) * _GRAIN) / _GRAIN
        return np.where(sums <= start, sums, end)

    def by_layer(self, widths: ArrayLike) -> Floats:
        """Milliseconds of each layer in the sum, all its calls together; (..., G) -> (..., L)."""
        sizes = self.sizes(np.asarray(widths, dtype=np.float64))
        return self._lookup(sizes[0], sizes[1], slice(None))

    def increase(self, widths: Floats, steps: Floats) -> Floats:
        """Cost added by widening one group at a time; shapes (..., G), (..., G) -> (..., G)."""
        sums, change = self._changes(widths, steps)
        return self._bent(sums + change) - self._bent(sums)

    def unit_costs(self, widths: Floats) -> Floats:
        """What the layers of one unit less of each group save, without the exception for the dense model.

        Its line next to the dense model may be steep or flat; a unit's price there would not hold any further.
        """
        return -self._changes(widths, -np.ones_like(widths))[1]

    def _changes(self, widths: Floats, steps: Floats) -> tuple[Floats, Floats]:
        """The sum (..., 1) at these widths and what each step adds to it (..., G)."""
        sizes, layers, groups = self.sizes(widths), self._pair_layers, self._pair_groups
        now = self._lookup(sizes[0], sizes[1], slice(None))
        wider = [
            sizes[side][..., layers] + steps[..., groups] * self._slope[side][groups, layers]
            for side in (0, 1)
        ]
        change = (self._lookup(wider[0], wider[1], layers) - now[..., layers]) @ self._owner
        return (now.sum(axis=-1) + self.constant)[..., None], change

    def root(self, start: Floats, end: Floats, target: float) -> Floats:
        """The smallest t in [0, 1], (N,), with ``cost(start + t (end - start)) <= target``, by bisection."""
        low, high = np.zeros(len(start)), np.ones(len(start))
        met = self(start) <= target
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2.0
            above = self(start + middle[:, None] * (end - start)) > target
            low, high = np.where(above, middle, low), np.where(above, high, middle)
        return np.where(met, 0.0, high)

    def sizes(self, widths: Floats) -> tuple[Floats, Floats]:
        """Sizes of the out and in axes of each layer, in slots; (..., G) -> two of (..., L)."""
        return widths @ self._slope[0] + self._base[0], widths @ self._slope[1] + self._base[1]

    def _lookup(self, outs: Floats, ins: Floats, layers: Ints | slice) -> Floats:
        o, rise_o, to = self._cells[0](outs, layers)
        i, rise_i, ti = self._cells[1](ins, layers)
        corner = self._starts[layers] + o + i
        v = self._values
        low = v[corner] + ti * (v[corner + rise_i] - v[corner])
        high = v[corner + rise_o] + ti * (v[corner + rise_o + rise_i] - v[corner + rise_o])
        return np.rint((low + to * (high - low)) * _GRAIN) / _GRAIN


def _scaled(table: LayerTable, factor: float, slope: float) -> Floats:
    """The table's values in a model: scaled, with the elementwise work on its outputs; (P, Q)."""
    ms = factor * table.milliseconds + slope * table.outs[:, None]
    return np.where(empty(table.outs, table.ins), 0.0, ms)


class _Cells:
    """From a size to the grid cell that holds it, for all layers of one side at once."""

    def __init__(self) -> None:
        self._sizes: list[Ints] = []
        self._strides: list[int] = []

    def add(self, sizes: Ints, stride: int) -> None:
        self._sizes.append(sizes)
        self._strides.append(stride if len(sizes) > 1 else 0)

    def build(self) -> _Cells:
        self.stride = np.array(self._strides, dtype=np.int64)
        self.first = np.array([s[0] for s in self._sizes], dtype=np.float64)
        self.last = np.array([s[-1] for s in self._sizes], dtype=np.float64)
        lengths = [int(s[-1] - s[0]) + 1 for s in self._sizes]
        self.offset = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64)
        # One entry for every whole size: the index of its cell, the cell's lower end and its width.
        index, lower, wide = [], [], []
        for sizes in self._sizes:
            whole = np.arange(sizes[0], sizes[-1] + 1)
            cell = np.clip(np.searchsorted(sizes, whole, side="right") - 1, 0, max(len(sizes) - 2, 0))
            index.append(cell)
            lower.append(sizes[cell])
            wide.append(np.diff(sizes)[cell] if len(sizes) > 1 else np.ones(len(cell)))
        self.index = np.concatenate([*index, [0]]).astype(np.int64)
        self.lower = np.concatenate([*lower, [0]]).astype(np.float64)
        self.wide = np.concatenate([*wide, [1]]).astype(np.float64)
        return self

    def __call__(self, sizes: Floats, layers: Ints | slice) -> tuple[Ints, Ints, Floats]:
        """(start of the cell's row or column in the flat table, step to the next, position in the cell)."""
        s = np.clip(sizes, self.first[layers], self.last[layers])
        at = self.offset[layers] + (s - self.first[layers]).astype(np.int64)
        stride = self.stride[layers]
        return self.index[at] * stride, stride, (s - self.lower[at]) / self.wide[at]


@dataclass(frozen=True)
class LayerAxes:
    """The axes that cut one layer: its outputs, and its inputs where these are cut apart from them."""

    out: int = _NO_AXIS
    into: int = _NO_AXIS


@dataclass(frozen=True)
class SpaceSizes:
    """What a space says about its layers' sizes, as linear functions of the widths."""

    space: PruningSpace

    @cached_property
    def axes(self) -> tuple[AxisSize, ...]:
        """Number of slots of each axis."""
        return tuple(self.space.axis_sizes())

    @cached_property
    def layers(self) -> Mapping[str, LayerAxes]:
        """{module: the axes that cut its tensors}."""
        found: dict[str, LayerAxes] = {}
        for cut in self.space.cuts:
            module = cut.tensor.rpartition(".")[0]
            known = found.get(module, LayerAxes())
            if cut.consumer:
                known = LayerAxes(known.out, cut.axis)
            elif known.out == _NO_AXIS:
                known = LayerAxes(cut.axis, known.into)
            found[module] = known
        return found

    def of(self, module: str) -> tuple[AxisSize | None, AxisSize | None]:
        """Sizes of the module's out and in axes; None where nothing cuts them."""
        axes = self.layers.get(module, LayerAxes())
        return (
            None if axes.out == _NO_AXIS else self.axes[axes.out],
            None if axes.into == _NO_AXIS else self.axes[axes.into],
        )


def table_cost(table: LatencyTable, space: PruningSpace) -> TableCost:
    """The latency of a space's models, in milliseconds; ArtifactError where the table is another model's."""
    if table.fingerprint != space.fingerprint:
        raise ArtifactError("latency table: was measured on another architecture (its fingerprint differs)")
    sizes, calibration = SpaceSizes(space), table.calibration
    terms = []
    for use in table.layers:
        layer = table.tables[use.table]
        out, into = sizes.of(use.module)
        for axis, nodes in ((out, layer.outs), (into, layer.ins)):
            if axis is not None and axis.constant + axis.slope @ space.widths > nodes[-1]:
                raise ArtifactError(f"latency table: {use.module!r} is wider than what was measured")
        factor = calibration.weighted if layer.elements else calibration.other
        slope = calibration.element.get(layer.elements, 0.0) * layer.elements
        terms.append((layer, factor * use.calls, slope * use.calls, out, into))
    dense = None if calibration.dense is None else (space.widths, calibration.dense)
    return TableCost(terms, calibration.constant, len(space.groups), table, dense)
