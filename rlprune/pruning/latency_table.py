"""Latency as a table over each layer's in and out widths: monotone, closed, and exact to project onto.

A table holds milliseconds of each distinct layer on a grid of (out, in) sizes, measured once on one machine, and a
calibration that ties their sum to whole models (`rlprune.profiling` measures both). This file is the arithmetic:
smoothing, interpolation, and the cost that budgets are met against.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ArtifactError
from .cost import AxisSize, Floats
from .space import PruningSpace

Ints = NDArray[np.int64]

FORMAT, VERSION = "rlprune latency table", 1
# Values are whole multiples of 2**-30 ms: sums of them are exact in float64, in any order.
_GRAIN = 2.0**30
# What a table rises by at least from end to end of each axis, as a share of its largest value: a layer that takes
# as long with one channel fewer would make that channel free, and rules divide by what a unit costs.
_TILT = 0.002
_BISECTIONS = 48
_NO_AXIS = -1


@dataclass(frozen=True)
class LayerTable:
    """Milliseconds of one kind of layer, (P, Q), at ``outs`` (P,) times ``ins`` (Q,) sizes, all ascending.

    A dimension that nothing cuts has one size. ``elements`` is the number of output elements for each output
    channel, at the table's batch size; 0 for layers that only pass their input on.
    """

    kind: str
    outs: Ints
    ins: Ints
    milliseconds: Floats
    elements: float


@dataclass(frozen=True)
class LayerUse:
    """A layer of the model: its name, the number of its table, and how often a forward pass calls it."""

    module: str
    table: int
    calls: int


@dataclass(frozen=True)
class Calibration:
    """Factors from the tables to a model: on weighted layers, on others, ms an output element, ms a forward pass."""

    weighted: float = 1.0
    other: float = 1.0
    element: float = 0.0
    constant: float = 0.0


@dataclass(frozen=True)
class LatencyTable:
    """Everything measured: of which architecture, how, where, and the numbers.

    ``checks`` are the whole models of the calibration: {"widths", "measured", "table"} in milliseconds.
    """

    fingerprint: str
    batch_size: int
    machine: Mapping[str, Any]
    tables: tuple[LayerTable, ...]
    layers: tuple[LayerUse, ...]
    calibration: Calibration = field(default_factory=Calibration)
    checks: tuple[Mapping[str, Any], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        tables = [
            asdict(t) | {name: getattr(t, name).tolist() for name in ("outs", "ins", "milliseconds")}
            for t in self.tables
        ]
        return {
            "format": FORMAT,
            "version": VERSION,
            "fingerprint": self.fingerprint,
            "batch_size": self.batch_size,
            "machine": dict(self.machine),
            "calibration": asdict(self.calibration),
            "tables": tables,
            "layers": [asdict(use) for use in self.layers],
            "checks": [dict(check) for check in self.checks],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LatencyTable:
        """The table in ``data``; ArtifactError for what is damaged."""
        try:
            tables = tuple(
                LayerTable(
                    str(t["kind"]),
                    np.array(t["outs"], dtype=np.int64),
                    np.array(t["ins"], dtype=np.int64),
                    np.array(t["milliseconds"], dtype=np.float64),
                    float(t["elements"]),
                )
                for t in data["tables"]
            )
            layers = tuple(
                LayerUse(str(u["module"]), int(u["table"]), int(u["calls"])) for u in data["layers"]
            )
            calibration = Calibration(**{k: float(v) for k, v in data["calibration"].items()})
            found = cls(
                str(data["fingerprint"]),
                int(data["batch_size"]),
                dict(data["machine"]),
                tables,
                layers,
                calibration,
                tuple(data["checks"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ArtifactError(f"latency table: damaged ({type(error).__name__}: {error})") from None
        _check(found)
        return found


def _check(table: LatencyTable) -> None:
    for t in table.tables:
        ascending = all((np.diff(sizes) > 0).all() and len(sizes) for sizes in (t.outs, t.ins))
        if t.milliseconds.shape != (len(t.outs), len(t.ins)) or not ascending:
            raise ArtifactError(f"latency table: {t.kind}: the grid does not fit its values")
        ms = t.milliseconds
        falls = any((np.diff(ms, axis=a) < 0).any() for a in (0, 1))
        if not np.isfinite(ms).all() or (ms < 0).any() or falls:
            raise ArtifactError(f"latency table: {t.kind}: values must be finite, 0 and more, and never fall")
    if any(not 0 <= use.table < len(table.tables) or use.calls < 1 for use in table.layers):
        raise ArtifactError("latency table: damaged (a layer without a table)")
    if min(asdict(table.calibration).values()) < 0:
        raise ArtifactError("latency table: a calibration factor is negative")


def monotone(values: Floats, rounds: int = 100) -> Floats:
    """The nearest table, in least squares, that falls along neither axis; (P, Q) -> (P, Q).

    Isotonic regression along the rows and along the columns in turn, each with the correction of the other
    (Dykstra and Robertson 1982, Annals of Statistics 10(3), 708-716), then a running maximum for what the
    finite number of rounds leaves.
    """
    from sklearn.isotonic import isotonic_regression

    found = np.array(values, dtype=np.float64)
    corrections = [np.zeros_like(found), np.zeros_like(found)]
    for _ in range(rounds):
        before = found.copy()
        for axis in (0, 1):
            free = found + corrections[axis]
            found = np.apply_along_axis(isotonic_regression, axis, free)
            corrections[axis] = free - found
        if np.abs(found - before).max() <= 1e-9 * max(float(np.abs(found).max()), 1e-12):
            break
    return np.maximum.accumulate(np.maximum.accumulate(found, axis=0), axis=1)


def rising(values: Floats, outs: Ints, ins: Ints) -> Floats:
    """`monotone`, with a slight slope where it is flat, and 0 where the layer has no channels left."""
    found = monotone(np.maximum(values, 0.0))
    top = found[-1, -1]
    if len(outs) > 1:
        found = found + (_TILT * top * outs / outs[-1])[:, None]
    if len(ins) > 1:
        found = found + (_TILT * top * ins / ins[-1])[None, :]
    return np.where(empty(outs, ins), 0.0, found)


def empty(outs: Ints, ins: Ints) -> NDArray[np.bool_]:
    """The points (P, Q) at which a layer has no channels: a part that is dropped is not run."""
    gone: NDArray[np.bool_] = (outs == 0)[:, None] | (ins == 0)[None, :]
    return gone


class TableCost:
    """Milliseconds of a model as a sum over its layers, interpolated bilinearly; a ``pruning.cost.Cost``.

    Args:
        terms: for each layer its table, factor, milliseconds for each of its output channels, and the sizes of
            its out and in axes (None where nothing cuts them).
        constant: milliseconds of a forward pass that no width changes.
        groups: number of groups, G.
        table: where the terms came from, for whoever wants to keep it.
    """

    def __init__(
        self,
        terms: Sequence[tuple[LayerTable, float, float, AxisSize | None, AxisSize | None]],
        constant: float,
        groups: int,
        table: LatencyTable | None = None,
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

    def __call__(self, widths: Any) -> Floats:
        return self.by_layer(widths).sum(axis=-1) + self.constant

    def by_layer(self, widths: Any) -> Floats:
        """Milliseconds of each layer, all its calls together; (..., G) -> (..., L)."""
        sizes = self.sizes(np.asarray(widths, dtype=np.float64))
        return self._lookup(sizes[0], sizes[1], slice(None))

    def increase(self, widths: Floats, steps: Floats) -> Floats:
        """Cost added by widening one group at a time; shapes (..., G), (..., G) -> (..., G)."""
        sizes, layers, groups = self.sizes(widths), self._pair_layers, self._pair_groups
        now = self._lookup(sizes[0], sizes[1], slice(None))[..., layers]
        wider = [
            sizes[side][..., layers] + steps[..., groups] * self._slope[side][groups, layers]
            for side in (0, 1)
        ]
        change: Floats = (self._lookup(wider[0], wider[1], layers) - now) @ self._owner
        return change

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

    def _lookup(self, outs: Floats, ins: Floats, layers: Any) -> Floats:
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

    def __call__(self, sizes: Floats, layers: Any) -> tuple[Ints, Ints, Floats]:
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
        owner = np.repeat(np.arange(len(self.space.groups)), self.space.widths)
        found = []
        for axis in self.space.axes:
            cut = axis.slots[axis.slots >= 0]
            counts = np.bincount(owner[cut], minlength=len(self.space.groups))
            found.append(AxisSize(float((axis.slots < 0).sum()), counts / np.maximum(self.space.widths, 1)))
        return tuple(found)

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
        slope = calibration.element * layer.elements
        terms.append((layer, factor * use.calls, slope * use.calls, out, into))
    return TableCost(terms, calibration.constant, len(space.groups), table)
