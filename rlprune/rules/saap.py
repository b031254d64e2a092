"""SAAP-style allocation: the structures whose importance is least stable go first, whatever module they are in."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from ..importance import importance
from ..utils.arrays import Floats
from .context import Context, rule
from .threshold import threshold_distribution

SEQUENCES = 16
CHUNKS = 8


@rule(
    "SAAP-style: structures of all modules ranked by the stability of their importance",
    needs_workload=True,
    wing="language",
    costly=True,
)
def saap(context: Context) -> Floats:
    """Structures ranked over all modules by a stability indicator, in the style of SAAP (arXiv 2412.15127).

    The paper's formula of the indicator is not public. Derived: the mean of a structure's fused importance
    over parts of the calibration data divided by its standard deviation over them; it has no scale, so
    structures of all modules stand in one pool, and the least stable ones are cut until the budget is met.
    """
    return threshold_distribution(context, context.cached("saap", lambda: _stabilities(context)))


def _stabilities(context: Context) -> list[Floats]:
    workload = context.data("saap")
    scores = [
        importance.saap(context.model, context.space, [chunk], workload.loss)
        for chunk in chunks(workload.batches("calibration", SEQUENCES))
    ]
    return [stability(np.stack(of_group)) for of_group in zip(*scores, strict=True)]


def stability(scores: Floats) -> Floats:
    """Mean over standard deviation of scores (chunks, units); 0 for units without importance."""
    mean, spread = scores.mean(axis=0), scores.std(axis=0)
    # A unit that never changes is as stable as the numbers can tell.
    floor = 1e-9 * np.maximum(np.abs(mean), 1e-300)
    return np.where(mean == 0, 0.0, mean / np.maximum(spread, floor))


def chunks(batches: Iterator[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """The samples of all batches in up to CHUNKS equal parts."""
    read = list(batches)
    inputs, targets = (torch.cat([b[i] for b in read]) for i in (0, 1))
    parts = min(CHUNKS, len(inputs))
    yield from zip(inputs.tensor_split(parts), targets.tensor_split(parts), strict=True)
