"""What a plan is expected to cost, from each group cut alone: the changes of the logits are added up.

Every group alone is cut to a few widths and recovered, and the logits of the calibration images are kept. The
logits of a plan are then taken for the dense ones plus the changes of all its groups: to first order cuts do
not know of each other. Nothing of the validation split is read; the price is `PROBES` builds a group.

Shape legend: P plans, G groups, K probed widths of a group, N images, C classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .pruning.space import PruningSpace

Floats = NDArray[np.float64]
# Shares of a group's units that its probes keep; between them the change is linear in the width.
_KEPT = (0.08, 0.2, 0.32, 0.44, 0.56, 0.68, 0.8, 0.92)
PROBES = len(_KEPT)
MOST_IMAGES = 256
# Columns of `features` before the groups' shares.
TOTALS = 3


class LogitChanges:
    """Logits of the dense model, and how they change when one group alone is cut.

    Args:
        build: widths (G,) -> the cut and recovered model.
        images: inputs (N, ...); the first ``MOST_IMAGES`` are used.
    """

    def __init__(self, space: PruningSpace, build: Callable[[Any], nn.Module], images: Tensor) -> None:
        self._space = space
        images = images[:MOST_IMAGES]
        self._dense = _logits(build(space.widths), images)
        self._log_dense = _log_softmax(self._dense)
        self._widths: list[NDArray[np.int64]] = []
        self._changes: list[Floats] = []
        self._alone: list[Floats] = []
        for g, (width, least) in enumerate(zip(space.widths, space.minimums, strict=True)):
            wanted = space.limits.floor(np.outer(_KEPT, space.widths))[:, g]
            kept = np.unique(np.clip([*wanted, width], max(1, least), width).astype(np.int64))
            changes = []
            for w in kept[:-1]:
                cut = space.widths.copy()
                cut[g] = w
                changes.append(_logits(build(cut), images) - self._dense)
            self._widths.append(kept)
            self._changes.append(np.array([*changes, np.zeros_like(self._dense)]))
            every = np.arange(width + 1)
            self._alone.append(np.array([self._divergence(self._change(g, int(w))) for w in every]))
        self._memo: dict[tuple[int, ...], tuple[float, float]] = {}

    def features(self, widths: Any) -> Floats:
        """(P, G) widths -> (P, 3 + G): logarithms of three expected divergences, and each group's share of the third.

        The three: KL(dense || pruned) with all changes added, with half of their sum, and the sum of what each
        group costs alone.
        """
        plans = np.asarray(widths, dtype=np.int64)
        joint = np.array([self._joint(tuple(int(w) for w in plan)) for plan in plans]).reshape(-1, 2)
        alone = np.stack([curve[plans[:, g]] for g, curve in enumerate(self._alone)], axis=1)
        total = alone.sum(axis=1, keepdims=True)
        logs = np.log(np.maximum(np.hstack([joint, total]), 1e-4))
        return np.hstack([logs, alone / np.maximum(total, 1e-9)])

    def _joint(self, plan: tuple[int, ...]) -> tuple[float, float]:
        if plan not in self._memo:
            change = np.zeros_like(self._dense)
            for g, w in enumerate(plan):
                if w < self._space.widths[g]:
                    change += self._change(g, w)
            self._memo[plan] = self._divergence(change), self._divergence(0.5 * change)
        return self._memo[plan]

    def _change(self, group: int, width: int) -> Floats:
        """Change of the logits (N, C) at a width, linear between the probed ones."""
        known = self._widths[group]
        if len(known) == 1:
            return self._changes[group][0]
        right = int(np.clip(np.searchsorted(known, width), 1, len(known) - 1))
        t = (max(width, known[0]) - known[right - 1]) / (known[right] - known[right - 1])
        found: Floats = (1 - t) * self._changes[group][right - 1] + t * self._changes[group][right]
        return found

    def _divergence(self, change: Floats) -> float:
        """Mean KL(dense || dense + change) over the images."""
        log_other = _log_softmax(self._dense + change)
        return float((np.exp(self._log_dense) * (self._log_dense - log_other)).sum(axis=1).mean())


def _logits(model: nn.Module, images: Tensor) -> Floats:
    model.eval()
    with torch.no_grad():
        found: Floats = model(images).double().cpu().numpy()
    return found


def _log_softmax(logits: Floats) -> Floats:
    shifted = logits - logits.max(axis=1, keepdims=True)
    found: Floats = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return found
