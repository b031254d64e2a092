"""What a policy sees of a group: numbers that do not depend on the size of the model.

Shape legend: G groups, F features of a version. Column 0 is the mask: 1 for a group, 0 for padding.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from ..pruning.space import PruningSpace

Floats = NDArray[np.float64]

_CHANNELS = ("conv", "linear", "depthwise", "grouped", "residual")
# The kinds of group that have a column of their own, by feature version; each version names those before it.
KINDS: dict[int, tuple[str, ...]] = {
    1: _CHANNELS,
    2: (*_CHANNELS, "attention", "ffn", "hidden"),
    3: _CHANNELS,
}
# What cuts of so large a share of a group are expected to cost has a column each, from version 3 on.
EXPECTED_SHARES = (0.25, 0.5, 0.75)
EXPECTING = 3
_EXPECTED = ("expected_quarter", "expected_half", "expected_three_quarters", "log_expected_per_cost")
# The columns of one moment of an episode stand last in every version.
_DYNAMIC = ("base", "base_kept", "budget", "spent", "kept")
# The names of the F columns, by feature version. A saved policy says which of them it saw.
FEATURE_VERSIONS: dict[int, tuple[str, ...]] = {
    version: (
        "mask",
        "depth",
        *(f"kind_{kind}" for kind in kinds),
        "kind_other",
        "log_width",
        "cost_share",
        "log_unit_cost",
        "kernel",
        "stride",
        "log_members",
        "minimum",
        "importance_q10",
        "importance_q50",
        "importance_q90",
        "importance_lowest_quarter",
        "importance_lowest_half",
        "log_importance",
        "log_importance_per_cost",
        "sensitivity_1",
        "sensitivity_2",
        *(_EXPECTED if version == EXPECTING else ()),
        *_DYNAMIC,
    )
    for version, kinds in KINDS.items()
}
# Every feature is clipped to this, which also makes the observation space finite.
BOUND = 5.0
_TINY = 1e-12


def feature_version(spaces: Iterable[PruningSpace]) -> int:
    """The first version with a column for every kind of group in these spaces that any version has one for."""
    latest = {kind for kinds in KINDS.values() for kind in kinds}
    present = {g.kind for space in spaces for g in space.groups} & latest
    return min(version for version, kinds in KINDS.items() if present <= set(kinds))


def static_features(
    space: PruningSpace,
    importance: Sequence[Floats],
    metric: str,
    sensitivity: Floats | None = None,
    version: int = 1,
    expected: Floats | None = None,
) -> NDArray[np.float32]:
    """The columns that depend neither on the budget nor on what has been cut yet.

    Args:
        importance: one array per group with the importance of each unit.
        sensitivity: (G, 2), loss of score when one group alone is cut at two ratios; None leaves zeros.
        version: one of ``FEATURE_VERSIONS``; a kind without a column there is "other".
        expected: (3, G), what a cut of each of ``EXPECTED_SHARES`` is expected to cost; None leaves zeros.

    Returns:
        float32 (G, F); the columns of :func:`fill_dynamic` are zero.
    """
    dense = space.widths
    unit_costs = np.maximum(space.unit_costs(dense, metric), _TINY)
    total = max(space.dense_cost(metric), _TINY)
    share = unit_costs * dense / total
    log_unit = np.log(unit_costs) - np.log(unit_costs).mean()
    columns: dict[str, Floats] = {
        "mask": np.ones(len(dense)),
        "depth": np.array([g.depth for g in space.groups]),
        "log_width": np.log2(dense) / 8.0,
        "cost_share": share * len(dense) / 2.0,
        "log_unit_cost": log_unit / 2.0,
        "kernel": np.array([g.kernel for g in space.groups]) / 7.0,
        "stride": np.array([g.stride for g in space.groups]) / 4.0,
        "log_members": np.log2([1 + len(g.members) for g in space.groups]) / 4.0,
        "minimum": space.minimums / dense,
        **_importance_columns(importance, share),
    }
    names, named = FEATURE_VERSIONS[version], KINDS[version]
    kinds = [g.kind if g.kind in named else "other" for g in space.groups]
    for kind in (*named, "other"):
        columns[f"kind_{kind}"] = np.array([float(k == kind) for k in kinds])
    if sensitivity is not None:
        scaled = _log_ratio(np.maximum(sensitivity, 0.0))
        columns["sensitivity_1"], columns["sensitivity_2"] = scaled[:, 0], scaled[:, 1]
    if expected is not None and version == EXPECTING:
        scaled = _log_ratio(np.maximum(expected.T, 0.0))
        columns |= dict(zip(_EXPECTED[:3], scaled.T, strict=True))
        rate = np.log(np.maximum(expected[1], _TINY) / np.maximum(share, _TINY))
        columns["log_expected_per_cost"] = (rate - rate.mean()) / 2.0
    table = np.zeros((len(dense), len(names)), dtype=np.float32)
    for name, column in columns.items():
        table[:, names.index(name)] = np.clip(column, -BOUND, BOUND)
    return table


def _importance_columns(importance: Sequence[Floats], share: Floats) -> dict[str, Floats]:
    """Shape of each group's importances, and its mean relative to the other groups'; nothing has a unit."""
    quantiles, lowest, means, sums = [], [], [], []
    for scores in importance:
        ordered = np.sort(np.abs(np.nan_to_num(np.asarray(scores, dtype=np.float64))))
        mean = max(float(ordered.mean()), _TINY)
        quantiles.append(np.quantile(ordered, (0.1, 0.5, 0.9)) / mean)
        running = np.cumsum(ordered) / max(float(ordered.sum()), _TINY)
        positions = np.linspace(1.0 / len(ordered), 1.0, len(ordered))
        lowest.append(np.interp((0.25, 0.5), positions, running))
        means.append(mean)
        sums.append(mean * len(ordered))
    q, low, mean_array, sum_array = np.array(quantiles), np.array(lowest), np.array(means), np.array(sums)
    per_cost = np.log(sum_array / sum_array.sum() + _TINY) - np.log(share + _TINY)
    return {
        "importance_q10": q[:, 0],
        "importance_q50": q[:, 1],
        "importance_q90": q[:, 2] / 2.0,
        "importance_lowest_quarter": low[:, 0] * 2.0,
        "importance_lowest_half": low[:, 1] * 2.0,
        "log_importance": (np.log(mean_array) - np.log(mean_array).mean()) / 2.0,
        "log_importance_per_cost": (per_cost - per_cost.mean()) / 2.0,
    }


def _log_ratio(values: Floats) -> Floats:
    """Logarithm relative to the column's mean: scale-free, and small values keep their order."""
    mean = np.maximum(values.mean(axis=0, keepdims=True), _TINY)
    ratio: Floats = np.log(values / mean + 0.05)
    return ratio


def fill_dynamic(
    table: NDArray[np.float32],
    space: PruningSpace,
    base: Floats,
    base_widths: NDArray[np.int64],
    widths: NDArray[np.int64],
    target: float,
    metric: str,
) -> NDArray[np.float32]:
    """A copy of the static table (G, F) with the columns of one moment of an episode.

    Args:
        base: (G,) base distribution; base_widths: (G,) its projection on the budget.
        widths: (G,) what is kept now (the dense widths at the start).
        target: absolute cost of the final budget.
    """
    dense_cost = space.dense_cost(metric)
    over = max(dense_cost - target, _TINY)
    table = table.copy()
    table[:, -len(_DYNAMIC) :] = np.stack(
        [
            np.clip(base / max(float(base.mean()), _TINY) / 2.0, 0.0, BOUND),
            base_widths / space.widths,
            np.full(len(base), target / dense_cost),
            np.full(len(base), np.clip((dense_cost - space.cost(widths, metric)) / over, 0.0, BOUND)),
            widths / space.widths,
        ],
        axis=1,
    )
    return table


def pad(table: NDArray[np.float32], groups: int) -> NDArray[np.float32]:
    """(G, F) -> (groups, F): rows of zeros, whose mask says that they are no groups."""
    return np.pad(table, ((0, groups - len(table)), (0, 0)))
