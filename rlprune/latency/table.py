"""A table of latency over each layer's in and out widths: its numbers, its document, and what makes it monotone.

A table holds milliseconds of each distinct layer on a grid of (out, in) sizes, measured once on one machine, and a
calibration that ties their sum to whole models (`rlprune.latency.profile` measures both). `latency_cost` makes the cost
of it that budgets are met against.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from ..errors import ArtifactError
from ..utils.arrays import Bools, Floats, Ints

FORMAT, VERSION = "rlprune latency table", 2
# What a table rises by at least from end to end of each axis, as a share of its largest value: a layer that takes
# as long with one channel fewer would make that channel free, and rules divide by what a unit costs.
_TILT = 0.002


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
    """What ties the tables to whole models.

    Args:
        weighted, other: factors on the tables of layers with weights that multiply, and of the others.
        element: {output elements of a channel: ms an element}, for the functions between layers, which have no
            table. What they do depends on where they stand, and the size of the image tells that: a pooling
            after the first layer takes longer an element than an addition further down.
        constant: ms of a forward pass that no width changes.
        dense: ms of the dense model as measured; None where it was not.
    """

    weighted: float = 1.0
    other: float = 1.0
    element: Mapping[float, float] = field(default_factory=dict)
    constant: float = 0.0
    dense: float | None = None


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
            "calibration": asdict(self.calibration)
            | {"element": {str(k): v for k, v in self.calibration.element.items()}},
            "tables": tables,
            "layers": [asdict(use) for use in self.layers],
            "checks": [dict(check) for check in self.checks],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LatencyTable:
        """The table in ``data``; ArtifactError for what is damaged."""
        with _named("tables: each has a kind, widths (outs, ins), a grid of milliseconds and elements"):
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
        with _named("layers: each has a module, the number of its table and calls"):
            layers = tuple(
                LayerUse(str(u["module"]), int(u["table"]), int(u["calls"])) for u in data["layers"]
            )
        with _named("calibration: has numbers"):
            calibration = _calibration(data["calibration"], tables)
        with _named("it has a fingerprint, a batch_size, a machine and checks"):
            found = cls(
                str(data["fingerprint"]),
                int(data["batch_size"]),
                dict(data["machine"]),
                tables,
                layers,
                calibration,
                tuple(data["checks"]),
            )
        _check(found)
        return found


@contextlib.contextmanager
def _named(what: str) -> Iterator[None]:
    """Whatever a part of a document is instead, in one line that says what it has to be."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        raise ArtifactError(f"latency table: damaged: {what}") from None


def _calibration(data: Mapping[str, Any], tables: Sequence[LayerTable]) -> Calibration:
    """Of a document; version 1 had one number for the elements of all layers."""
    plain = {k: float(v) for k, v in data.items() if k != "element" and (k, v) != ("dense", None)}
    element = data.get("element", {})
    if not isinstance(element, Mapping):
        element = {t.elements: element for t in tables if t.elements}
    return Calibration(**plain, element={float(k): float(v) for k, v in element.items()})  # type: ignore[arg-type]


def _check(table: LatencyTable) -> None:
    for t in table.tables:
        ascending = all(
            sizes.ndim == 1 and len(sizes) and (np.diff(sizes) > 0).all() for sizes in (t.outs, t.ins)
        )
        if not ascending or t.milliseconds.shape != (len(t.outs), len(t.ins)):
            raise ArtifactError(f"latency table: {t.kind}: the grid does not fit its values")
        ms = t.milliseconds
        falls = any((np.diff(ms, axis=a) < 0).any() for a in (0, 1))
        if not np.isfinite(ms).all() or (ms < 0).any() or falls:
            raise ArtifactError(f"latency table: {t.kind}: values must be finite, 0 and more, and never fall")
        if not 0 <= t.elements < np.inf:
            raise ArtifactError(
                f"latency table: {t.kind}: elements must be finite, 0 and more, not {t.elements}"
            )
    if any(not 0 <= use.table < len(table.tables) or use.calls < 1 for use in table.layers):
        raise ArtifactError("latency table: damaged (a layer without a table)")
    c = table.calibration
    numbers = [c.weighted, c.other, c.constant, *c.element.values(), 0.0 if c.dense is None else c.dense]
    if not np.isfinite(numbers).all():
        raise ArtifactError("latency table: a calibration factor is not finite")
    if min(numbers) < 0:
        raise ArtifactError("latency table: a calibration factor is negative")
    if c.dense == 0:
        raise ArtifactError("latency table: the dense model takes more than 0 ms")


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


def empty(outs: Ints, ins: Ints) -> Bools:
    """The points (P, Q) at which a layer has no channels: a part that is dropped is not run."""
    gone: Bools = (outs == 0)[:, None] | (ins == 0)[None, :]
    return gone
