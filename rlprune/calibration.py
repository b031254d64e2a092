"""What ties a latency table to whole models: models of many widths, timed, and the fit of the table to them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from torch import Tensor, nn

from .latency import measure, quiet_clock
from .pruning.cost import Floats
from .pruning.latency_table import Calibration, Ints, LatencyTable, table_cost
from .pruning.plan import Plan
from .pruning.space import PruningSpace
from .pruning.surgery import prune

_MODELS, _MODELS_OF_A_LARGE_ONE, _LARGE = 24, 8, 50_000_000
_MODEL_REPEATS, _MODEL_SECONDS = 60, 20.0  # at each of three moments
# Weight of the dense model in the calibration and its turns in each round of it, because ratios are ratios to it; and
# the weight of the tables as measured.
_DENSE_WEIGHT, _DENSE_TURNS, _PRIOR = 3.0, 3, 0.1


class WholeModels:
    """Whole models of many widths, timed at several moments.

    What a neighbour on the machine takes of the caches makes a wide model slower for a while, and a narrow one hardly.
    """

    def __init__(self, space: PruningSpace, model: nn.Module, inputs: Tensor) -> None:
        count = _MODELS if space.dense_cost("params") < _LARGE else _MODELS_OF_A_LARGE_ONE
        self.widths = _random_widths(space, count)
        self._models = {str(i): _narrow(model, space, w) for i, w in enumerate(self.widths)}
        self._inputs = inputs
        self.milliseconds = np.full(count, np.inf)
        """Of the shortest pass so far, (N,) as ``widths`` (N, G); the dense model is the first."""

    def time(self) -> None:
        """One of the moments."""
        again = {f"dense {i}": self._models["0"] for i in range(_DENSE_TURNS - 1)}
        batch, clock = len(self._inputs), quiet_clock(self._inputs.device)
        times = measure(
            self._models | again, self._inputs, (batch,), _MODEL_REPEATS, _MODEL_SECONDS, 2, clock, settle=1,
            statistic=min,
        )  # fmt: skip
        found = np.array([times[name][batch] for name in self._models])
        found[0] = min(found[0], *(times[name][batch] for name in again))
        self.milliseconds = np.minimum(self.milliseconds, found)


def calibrated(table: LatencyTable, space: PruningSpace, widths: Ints, ms: Floats) -> LatencyTable:
    """Fit what ties the tables to whole models, by non-negative least squares of the relative error.

    measured = a * (weighted layers) + b * (other layers) + c * (output elements) + d: layers in a row find
    other caches than alone, and functions between them (additions, activations, pooling) have no table.

    Args:
        widths: (N, G) of the whole models, the dense one first; ms: (N,) milliseconds of each.
    """
    from scipy.optimize import nnls

    parts = [Calibration(1, 0, 0, 0), Calibration(0, 1, 0, 0), Calibration(0, 0, 1, 0)]
    columns = [table_cost(replace(table, calibration=p), space)(widths) for p in parts]
    features = np.stack([*columns, np.ones(len(widths))], axis=1) / ms[:, None]
    weight = np.ones(len(widths))
    weight[0] = _DENSE_WEIGHT
    scale = np.maximum(features.max(axis=0), 1e-30)
    prior = np.zeros((2, 4))
    prior[0, 0], prior[1, 1] = _PRIOR / scale[0], _PRIOR / scale[1]
    matrix = np.concatenate([features / scale * weight[:, None], prior])
    found, _ = nnls(matrix, np.concatenate([weight, [_PRIOR, _PRIOR]]))
    fitted = replace(table, calibration=Calibration(*(found / scale).tolist()))
    values = table_cost(fitted, space)(widths)
    checks = tuple(
        {"widths": w.tolist(), "measured": float(m), "table": float(v)}
        for w, m, v in zip(widths, ms, values, strict=True)
    )
    return replace(fitted, checks=checks)


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
