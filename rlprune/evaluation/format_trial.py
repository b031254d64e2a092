"""Whether a faster format may score candidates: whether it is faster, and ranks plans as the surest one does."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from ..errors import ArtifactError
from ..importance.unit_scores import Scores
from ..pruning.budget import BudgetLike
from ..pruning.space import PruningSpace
from ..utils.arrays import Floats, Ints
from ..utils.cache import cache_folder
from ..utils.checkpoints import settings_key
from ..utils.digest import hash_tensors
from ..utils.files import read_json, write_json_atomic
from ..utils.pytrees import tensors
from ..utils.rank import spearman
from ..workloads.base import Workload
from ..workloads.scoring_format import ScoringFormat

FASTER = 1.3
"""How much faster than the surest format another one has to be."""
AGREEMENT = 0.99
"""The rank correlation that it needs: of `PLANS` plans, at most one pair of neighbours changes places."""
PLANS = 12
SAMPLES = 112
"""Samples that the trial's candidates are recovered and judged on: differences between formats do not need more..."""
MACS = 3e10
"""...unless these multiply-accumulates allow it: what a candidate costs but for its passes should be little."""
_LEAST = 16  # samples for the recovery, and for the judge
_GLANCE = 8  # samples of each for a first look

Trial = Callable[[Ints, ScoringFormat, int, int], tuple[float, float]]
"""``trial(widths, format, calibration, validation)``: score and seconds of a candidate."""


@dataclass(frozen=True)
class FormatTrial:
    """What a trial found: ``format`` was tried ``against`` another one.

    ``speed`` is the time of the candidates there over that in ``format``; ``spearman`` the correlation of their ranks
    over ``plans`` random plans, and ``difference`` the largest change of a score (its mean change apart) over the
    scores' standard deviation: None where it was not fast enough to look. ``taken``: whether candidates are scored
    in it, or why not.
    """

    format: str
    against: str
    speed: float
    spearman: float | None
    difference: float | None
    plans: int
    taken: bool
    reason: str

    def __str__(self) -> str:
        told = [f"{self.speed:.1f} times as fast as {self.against}"]
        if self.spearman is not None:
            told.append(f"Spearman {self.spearman:.3f} over {self.plans} plans")
        chosen = self.format if self.taken else self.against
        why = "" if self.taken else f": {self.reason}"
        return f"scoring in {chosen} ({self.format}: {', '.join(told)}{why})"

    def facts(self) -> dict[str, Any]:
        """Everything as plain values."""
        return asdict(self)


def try_format(
    trial: Trial,
    space: PruningSpace,
    budget: BudgetLike,
    metric: str,
    formats: Sequence[ScoringFormat],
    names: Sequence[str],
    samples: tuple[int, int],
) -> FormatTrial:
    """Score random plans of a budget in two formats, in turns, and decide by speed and ranks for the first of them.

    The plans are drawn by a fixed seed; ``samples`` are those of the recovery and of the judge (`trial_samples`).
    Where a candidate fails in the first format, that decides for the second.
    """
    ours, sure = formats
    rng = np.random.default_rng(0)
    drawn = space.project(rng.random((PLANS, len(space.groups))), budget, metric)
    plans = list({tuple(plan): plan for plan in drawn}.values())

    def found(speed: float, reason: str, rank: float | None = None, gap: float | None = None) -> FormatTrial:
        return FormatTrial(names[0], names[1], round(speed, 2), rank, gap, len(plans), not reason, reason)

    try:
        for _ in range(2):  # the first round allocates, and makes the factors that all plans share
            glance = [trial(plans[0], chosen, _GLANCE, _GLANCE)[1] for chosen in (ours, sure)]
        if glance[0] > glance[1]:
            return found(glance[1] / glance[0], "slower on a few samples")
        rows = [
            [trial(plan, chosen, *samples) for chosen in (ours, sure)[:: 1 if i % 2 else -1]]
            for i, plan in enumerate(plans)
        ]
    except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
        return found(0.0, f"the model does not run in it ({type(error).__name__})")
    rows = [row if i % 2 else row[::-1] for i, row in enumerate(rows)]
    scores, seconds = np.moveaxis(np.array(rows), 2, 0)  # (plans, 2) each
    return _judged(found, scores, float(np.median(seconds[:, 1] / seconds[:, 0])))


def trial_samples(space: PruningSpace, recovery: int, judge: int) -> tuple[int, int]:
    """Samples of a trial for recovery and judge, in the proportion of a whole candidate's."""
    whole = recovery + judge
    cheap = MACS / space.dense_cost("macs") if "macs" in space.costs else 0
    count = min(whole, max(SAMPLES, round(cheap)))
    first = min(max(round(count * recovery / whole), _LEAST), max(count - _LEAST, 1))
    return first, max(count - first, 1)


def _judged(found: Callable[..., FormatTrial], scores: Floats, speed: float) -> FormatTrial:
    if len(scores) < 4 or not np.isfinite(scores).all():
        return found(speed, "too few plans with a finite score to compare ranks")
    rank = round(spearman(scores[:, 0], scores[:, 1]), 4)
    change = scores[:, 0] - scores[:, 1]
    spread = float(scores[:, 1].std())
    gap = round(float(np.abs(change - change.mean()).max()) / spread, 4) if spread > 0 else None
    reason = ""
    if speed < FASTER:
        reason = f"less than {FASTER} times as fast"
    elif rank < AGREEMENT:
        reason = f"it ranks plans otherwise, Spearman below {AGREEMENT}"
    return found(speed, reason, rank, gap)


def trial_key(
    workload: Workload,
    space: PruningSpace,
    importance: Scores,
    formats: Sequence[ScoringFormat],
    settings: Sequence[object],
) -> str:
    """Hash of what a trial depends on: weights, ranking, data, settings, machine.

    The number of threads is left out, so that a worker with another one decides alike.
    """
    digest = hashlib.sha256()
    hash_tensors(digest.update, workload.model.state_dict())
    inputs = next(iter(workload.batches("validation", 1)))[0]
    hash_tensors(digest.update, {str(i): tensor for i, tensor in enumerate(tensors(inputs))})
    for scores in importance:
        digest.update(np.asarray(scores, dtype=np.float64).tobytes())
    about = [
        digest.hexdigest(),
        *(space.fingerprint, [group.name for group in space.groups]),
        *([repr(each) for each in formats], [repr(each) for each in settings]),
        *(torch.__version__, workload.device.type, torch.backends.cpu.get_cpu_capability()),
        *(FASTER, AGREEMENT, PLANS, SAMPLES, MACS),
    ]
    return settings_key(about)[:24]


def kept_trial(key: str, make: Callable[[], FormatTrial]) -> FormatTrial:
    """A trial that was made before, so that a resumed run decides as the first did; else one that is made now."""
    path = cache_folder() / "scoring" / f"{key}.json"
    with contextlib.suppress(ArtifactError, TypeError):
        return FormatTrial(**read_json(path))
    trial = make()
    with contextlib.suppress(ArtifactError, TypeError):  # the first process decides for all
        return FormatTrial(**read_json(path))
    with contextlib.suppress(ArtifactError):  # the cache is a convenience
        write_json_atomic(path, trial.facts())
    return trial
