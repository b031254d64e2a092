"""What ties a latency table to whole models: models of many widths, timed, and the fit of the table to them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
from torch import nn

from ..pruning.plan import Plan
from ..pruning.space import PruningSpace
from ..pruning.surgery import prune
from ..utils.arrays import Floats, Ints
from ..utils.pytrees import Inputs, batch_size, device_of
from ..utils.timing import measure, quiet_clock
from .cost import table_cost
from .table import Calibration, LatencyTable

_MODELS, _MODELS_OF_A_LARGE_ONE, _LARGE = 24, 8, 50_000_000
_MODEL_REPEATS, _MODEL_SECONDS = 60, 14.0  # at each moment
PARTS = 3
"""Unknowns of the fit, apart from one for each size of the image: weighted layers, other layers, and the constant."""
# Weights of the layers as measured alone, and of functions between layers that take no time.
_LAYERS, _NOTHING = 0.1, 0.05


class WholeModels:
    """Whole models of many widths, timed at several moments.

    What a neighbour on the machine takes of the caches makes a wide model slower for a while, and a narrow one hardly.

    Args:
        unknowns: of the fit; there are at least twice as many models.
    """

    def __init__(self, space: PruningSpace, model: nn.Module, inputs: Inputs, unknowns: int) -> None:
        count = _MODELS if space.dense_cost("params") < _LARGE else _MODELS_OF_A_LARGE_ONE
        count = max(count, 2 * unknowns)
        self.widths = _random_widths(space, count)
        self._models = {str(i): _narrow(model, space, w) for i, w in enumerate(self.widths)}
        self._inputs = inputs
        self.milliseconds = np.full(count, np.inf)
        """Of the shortest pass so far, (N,) as ``widths`` (N, G); the dense model is the first."""

    def time(self) -> None:
        """One of the moments."""
        batch, clock = batch_size(self._inputs), quiet_clock(device_of(self._inputs))
        times = measure(
            self._models, self._inputs, (batch,), _MODEL_REPEATS, _MODEL_SECONDS, 2, clock, settle=1,
            statistic=min,
        )  # fmt: skip
        found = np.array([times[name][batch] for name in self._models])
        self.milliseconds = np.minimum(self.milliseconds, found)


def calibrated(table: LatencyTable, space: PruningSpace, widths: Ints, ms: Floats) -> LatencyTable:
    """Fit what ties the tables to whole models, by non-negative least squares of the relative error.

    measured = a * (weighted layers) + b * (other layers) + sum over r of c_r * (output elements of layers with r
    elements a channel) + d: layers in a row find other caches than alone, and functions between them (additions,
    activations, pooling) have no table.

    Args:
        widths: (N, G) of the whole models, the dense one first; ms: (N,) milliseconds of each.
    """
    from scipy.optimize import nnls

    elements = image_sizes(t.elements for t in table.tables)
    parts = [Calibration(1, 0), Calibration(0, 1), *(Calibration(0, 0, {e: 1.0}) for e in elements)]
    columns = [table_cost(replace(table, calibration=p), space)(widths) for p in parts]
    features = np.stack([*columns, np.ones(len(widths))], axis=1) / ms[:, None]
    # Each column in parts of its largest entry: for layers, about their largest share of a model's time. The dense
    # model counts as much as any other here; `TableCost` makes up for what it is off by.
    scale = np.maximum(features.max(axis=0), 1e-30)
    prior = np.diag([_LAYERS / scale[0], _LAYERS / scale[1], *[_NOTHING] * len(elements), 0.0])
    wanted = [_LAYERS, _LAYERS, *[0.0] * len(elements), 0.0]
    found, _ = nnls(np.concatenate([features / scale, prior]), np.concatenate([np.ones(len(ms)), wanted]))
    weighted, other, *each, constant = (found / scale).tolist()
    slopes = dict(zip(elements, each, strict=True))
    fitted = replace(table, calibration=Calibration(weighted, other, slopes, constant, float(ms[0])))
    values = table_cost(fitted, space)(widths)
    checks = tuple(
        {"widths": w.tolist(), "measured": float(m), "table": float(v)}
        for w, m, v in zip(widths, ms, values, strict=True)
    )
    return replace(fitted, checks=checks)


def image_sizes(elements: Iterable[float]) -> list[float]:
    """The distinct numbers of output elements a channel among weighted layers; others have 0."""
    return sorted({e for e in elements if e})


def _random_widths(space: PruningSpace, count: int) -> Ints:
    """The dense widths, the smallest ones, and random ones in between; (count, G), the same every time.

    Levels between the two are taken in turn as shares of the units and as shares of their logarithms: narrow layers
    cost other than their table says (what a call takes), and plans at low budgets are full of them. Every third
    cuts all groups alike.
    """
    generator = np.random.default_rng(0)
    levels = np.linspace(0.95, 0.05, count - 2)[:, None]
    noise = generator.normal(0.0, 0.25, (count - 2, len(space.groups)))
    noise[::3] = 0.0
    shares = np.clip(levels + noise, 0.0, 1.0)
    dense, least = space.widths.astype(np.float64), np.maximum(space.minimums, 1).astype(np.float64)
    real = least + shares * (dense - least)
    real[1::2] = (least * (dense / least) ** shares)[1::2]
    return np.concatenate([space.widths[None], space.limits.floor(np.vstack([least, real]))])


def _narrow(model: nn.Module, space: PruningSpace, widths: Ints) -> nn.Module:
    """The model with the first units of each group; which ones are kept does not change its speed."""
    kept = tuple(np.arange(width, dtype=np.int64) for width in widths)
    return prune(model, Plan(space, widths, kept), shared={})
