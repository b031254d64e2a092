"""The fixed scale of the reward: 0 is uniform pruning at the final budget, 1 is the dense model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

# Rewards below this are cut off, so that a collapsed candidate does not drown the signal of the others.
CLIP = -1.0
# A gap between uniform and dense smaller than this cannot serve as a scale, whatever its noise.
SMALLEST_GAP = 1e-3


class RewardScaleWarning(UserWarning):
    """Uniform pruning is as good as the dense model, so the reward is scaled by the spread of the rules."""


@dataclass(frozen=True)
class RewardScale:
    """``reward = max(clip, (score - zero) / unit)``; ``zero`` and ``unit`` are in units of the score."""

    zero: float
    unit: float
    clip: float = CLIP

    def __call__(self, score: float) -> float:
        return max(self.clip, (score - self.zero) / self.unit)


def reward_scale(
    uniform: float, dense: float, standard_error: float, rules: Callable[[], Sequence[float]]
) -> RewardScale:
    """The scale for one model and budget.

    Args:
        uniform: score of uniform pruning at the final budget.
        dense: score of the dense model under the same recovery.
        standard_error: of the uniform candidate's mean score.
        rules: called only when the gap between the two is below its noise; scores of the rules' plans.
    """
    threshold = max(SMALLEST_GAP, 2.0 * standard_error)
    gap = dense - uniform
    if gap >= threshold:
        return RewardScale(uniform, gap)
    scores = [uniform, *rules()]
    spread = max(scores) - min(scores)
    warnings.warn(
        f"uniform pruning scores {uniform:.4g} and the dense model {dense:.4g}: that gap is below its noise "
        f"({threshold:.2g}), so the reward is scaled by the spread of the rules' scores, {spread:.4g}",
        RewardScaleWarning,
        stacklevel=3,
    )
    # Rules that all score alike leave no scale of their own; the noise is then the only yardstick.
    return RewardScale(uniform, max(spread, threshold))
