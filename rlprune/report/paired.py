"""How far two models are apart on the same test samples, with a 95% interval."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.stats import norm, t

from ..errors import ArtifactError
from ..utils.arrays import Floats
from ..utils.files import read_tensors

LEVEL = 0.95


@dataclass(frozen=True)
class Change:
    """A difference of two means over ``count`` samples, and the interval that holds it with 95% confidence."""

    mean: float
    low: float
    high: float
    count: int
    paired: bool = True

    @property
    def shows(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low > 0 or self.high < 0


def paired(ours: Floats, theirs: Floats) -> Change | None:
    """The difference of two models (ours - theirs), each (2, n): sums over what a sample holds, and its size.

    Where every value is 0 or 1 (right or wrong), the interval is that of Bonett and Price 2012, "Adjusted Wald
    confidence interval for a difference of binomial proportions based on paired data": it holds its level with few
    samples, and where the models never differ it is not a point. Elsewhere it is Student's for paired
    differences, with the linearised variance of a ratio where samples are of unequal size (Cochran 1977, section 2.11).
    None where the two are not of the same samples.
    """
    if ours.shape != theirs.shape or ours.shape[1] < 2 or not np.array_equal(ours[1], theirs[1]):
        return None
    if not (np.isfinite(ours).all() and np.isfinite(theirs).all() and (ours[1] > 0).all()):
        return None
    a, b, sizes = ours[0], theirs[0], ours[1]
    count = len(a)
    if (sizes == 1).all() and np.isin(a, (0, 1)).all() and np.isin(b, (0, 1)).all():
        return proportions(int(((a == 1) & (b == 0)).sum()), int(((a == 0) & (b == 1)).sum()), count)
    mean = float((a - b).sum() / sizes.sum())
    apart = (a - b) - mean * sizes
    error = math.sqrt(float((apart**2).sum()) * count / (count - 1)) / float(sizes.sum())
    half = float(t.ppf((1 + LEVEL) / 2, count - 1)) * error
    return Change(mean, mean - half, mean + half, count)


def proportions(only_ours: int, only_theirs: int, count: int) -> Change:
    """`paired` of right and wrong answers: how many samples only one of the two has right, of ``count``."""
    p, q = (only_ours + 1) / (count + 2), (only_theirs + 1) / (count + 2)
    half = float(norm.ppf((1 + LEVEL) / 2)) * math.sqrt((p + q - (p - q) ** 2) / (count + 2))
    return Change((only_ours - only_theirs) / count, max(-1.0, p - q - half), min(1.0, p - q + half), count)


def unpaired(ours: float, theirs: float, count: int) -> Change:
    """The difference of two shares of right answers where it is not known on which samples they differ.

    The interval of two independent samples (Agresti and Caffo 2000, two answers added to each), which is too wide for
    two models that mostly agree.
    """
    p, q = ((share * count + 1) / (count + 2) for share in (ours, theirs))
    half = float(norm.ppf((1 + LEVEL) / 2)) * math.sqrt((p * (1 - p) + q * (1 - q)) / (count + 2))
    return Change(ours - theirs, max(-1.0, p - q - half), min(1.0, p - q + half), count, paired=False)


def read_outcomes(path: Path) -> dict[str, Floats]:
    """{"METHOD/SEED": (2, n) values and sizes} of a run; empty where the file is missing or damaged."""
    try:
        tensors = read_tensors(path)
    except ArtifactError:
        return {}
    found = {name: np.asarray(tensor.double().numpy()) for name, tensor in tensors.items()}
    return {name: array for name, array in found.items() if array.ndim == 2 and array.shape[0] == 2}
