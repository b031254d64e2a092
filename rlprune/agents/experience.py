"""What searches on other checkpoints have scored, as the prior of the score on a new one.

A Gaussian process over the plans of all checkpoints at once. What they share: the same plan tends to be as good
on each, and the divergence that is expected from each checkpoint's own statistics
(:class:`rlprune.expectation.LogitChanges`) tends to be off in the same way. What belongs to each: a level, a
smooth deviation and factors of its own, which a few evaluations on a new checkpoint begin to tell. (Multi-task
Bayesian optimisation, Swersky et al. 2013; a sum of a shared and an own kernel, Bonilla et al. 2007.)

Shape legend: N scored plans, P new plans, G groups, T = `expectation.TOTALS`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..envs.task import Floats, Ints, Task
from ..errors import ArtifactError
from ..expectation import TOTALS
from .proposals import climb

# Plans that are kept: of each checkpoint, and in all.
_EACH, _ALL = 150, 1200
# Plans that the hyperparameters are fitted to, and Adam's steps.
_FIT_PLANS, _FIT_STEPS = 450, 50
_CLIMB_ROUNDS = 20
_NAMES = ("shared", "own", "level", "totals", "own_totals", "shares", "own_shares", "noise")
_START = (0.0, -1.0, 0.0, -1.0, -4.0, -2.0, -2.0, -3.0)


@dataclass(frozen=True)
class Experience:
    """Scored plans of several checkpoints of one architecture, and the fitted hyperparameters (logarithms).

    ``inputs`` (N, G + T + G): logarithms of the keep ratios and the columns of `LogitChanges.features`;
    ``targets`` (N,): minus the logarithm of the distance to the dense score, which is clipped to ``bounds``;
    ``tasks`` (N,): which checkpoint. ``scales``: one number for each of _NAMES, then G shared and G own length scales.
    """

    inputs: Tensor
    targets: Tensor
    tasks: Tensor
    scales: Tensor
    bounds: tuple[float, float]
    fingerprint: str

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON-able facts, for the policy's file."""
        tensors = {
            name: getattr(self, name).contiguous() for name in ("inputs", "targets", "tasks", "scales")
        }
        return tensors, {"bounds": list(self.bounds), "fingerprint": self.fingerprint}

    @classmethod
    def from_state(cls, tensors: Mapping[str, Tensor], meta: Any) -> Experience:
        """Check what a policy's file holds; ArtifactError where it does not fit together."""
        try:
            x, y, tasks, scales = (tensors[name] for name in ("inputs", "targets", "tasks", "scales"))
            low, high = (float(b) for b in meta["bounds"])
            groups = (x.shape[1] - TOTALS) // 2
            fits = x.shape == (len(y), 2 * groups + TOTALS) and tasks.shape == y.shape and len(y) > 0
            fits = fits and scales.shape == (len(_NAMES) + 2 * groups,) and 0 < low < high
            fingerprint = str(meta["fingerprint"])
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise ArtifactError(f"policy: its experience is damaged ({error})") from None
        if not fits or not all(bool(torch.isfinite(t).all()) for t in (x, y, scales)):
            raise ArtifactError("policy: its experience is damaged (the tensors' sizes do not fit)")
        return cls(x.double(), y.double(), tasks.long(), scales.double(), (low, high), fingerprint)

    def knows(self, task: Task) -> bool:
        """Whether it speaks of this architecture, and the checkpoint's statistics can be had."""
        return task.space.fingerprint == self.fingerprint and _changes(task) is not None


def collect(tasks: Sequence[Task], scored: Sequence[Mapping[Any, Any]], seed: int) -> Experience | None:
    """The experience of a search over several checkpoints of one architecture; None where there is none.

    Args:
        scored: for each task its plans (a history of widths each) and candidates.
    """
    same = len({task.space.fingerprint for task in tasks}) == 1
    if len(tasks) < 2 or not same or any(_changes(task) is None for task in tasks):
        return None
    each = min(_EACH, _ALL // len(tasks))
    generator = np.random.default_rng([seed, 8])
    inputs, distances, owners = [], [], []
    for index, (task, plans) in enumerate(zip(tasks, scored, strict=True)):
        rows = generator.permutation(len(plans))[:each]
        histories, candidates = list(plans), list(plans.values())
        inputs.append(_inputs(task, np.array([histories[r][-1] for r in rows])))
        distances.append(task.evaluator.dense.score - np.array([candidates[r].score for r in rows]))
        owners.append(np.full(len(rows), index))
    distance = np.concatenate(distances)
    middle = max(float(np.median(distance)), 1e-4)
    bounds = 0.02 * middle, 20.0 * middle
    x, y = torch.from_numpy(np.vstack(inputs)), torch.from_numpy(_target(distance, bounds))
    tasks_of = torch.from_numpy(np.concatenate(owners))
    scales = _fit(x, y, tasks_of, generator)
    return Experience(x, y, tasks_of, scales, bounds, tasks[0].space.fingerprint)


class ExperiencedModel:
    """A model of the score on a new checkpoint; the interface is that of :class:`.surrogate.ScoreModel`."""

    theta: list[float] | None = None

    def __init__(self, experience: Experience, task: Task) -> None:
        self._experience, self._task = experience, task
        self._groups = len(task.space.groups)
        self._condition(experience.inputs, experience.targets, experience.tasks)

    def fit(self, widths: Ints, scores: Floats) -> None:
        """Take in N plans of this checkpoint: widths (N, G), scores (N,)."""
        known = self._experience
        distance = self._task.evaluator.dense.score - np.nan_to_num(scores, nan=-1e9, neginf=-1e9)
        x = torch.from_numpy(_inputs(self._task, widths))
        y = torch.from_numpy(_target(distance, known.bounds))
        tasks = torch.full((len(y),), -1)
        self._condition(
            torch.cat([known.inputs, x]), torch.cat([known.targets, y]), torch.cat([known.tasks, tasks])
        )

    def predict(self, widths: Ints) -> tuple[Floats, Floats]:
        """Mean (P,) and standard deviation (P,) of the target."""
        x, cross = self._cross(widths)
        solved = torch.linalg.solve_triangular(self._lower, cross, upper=False)
        own = _variances(self._experience.scales, self._groups, x)
        variance = (own - (solved**2).sum(dim=0)).clamp_min(1e-12)
        return (self._mean + cross.T @ self._weights).numpy(), variance.sqrt().numpy()

    def mean(self, widths: Ints) -> Floats:
        """Mean (P,) alone, which is much cheaper."""
        _, cross = self._cross(widths)
        return (self._mean + cross.T @ self._weights).numpy()  # type: ignore[no-any-return]

    def covariance(self, widths: Ints) -> tuple[Floats, Floats]:
        """Mean (P,) and joint covariance (P, P)."""
        x, cross = self._cross(widths)
        solved = torch.linalg.solve_triangular(self._lower, cross, upper=False)
        new = torch.full((len(x),), -1)
        joint = _kernel(self._experience.scales, self._groups, x, new, x, new) - solved.T @ solved
        return (self._mean + cross.T @ self._weights).numpy(), joint.numpy()

    def informed(self, widths: Ints) -> bool:
        return True

    @property
    def noise(self) -> float:
        return float(self._experience.scales[_NAMES.index("noise")].exp())

    def _cross(self, widths: Ints) -> tuple[Tensor, Tensor]:
        x = torch.from_numpy(_inputs(self._task, widths))
        new = torch.full((len(x),), -1)
        return x, _kernel(self._experience.scales, self._groups, self._x, self._tasks, x, new)

    def _condition(self, x: Tensor, y: Tensor, tasks: Tensor) -> None:
        self._x, self._tasks, self._mean = x, tasks, y.mean()
        gram = _kernel(self._experience.scales, self._groups, x, tasks, x, tasks)
        gram = gram + (self.noise + 1e-6) * torch.eye(len(x), dtype=gram.dtype)
        self._lower = torch.linalg.cholesky(gram)
        self._weights = torch.cholesky_solve((y - self._mean)[:, None], self._lower)[:, 0]


def planned(experience: Experience, task: Task, budget: Any, starts: Ints) -> Ints:
    """The widths (G,) that experience expects most of at a budget, by local search from ``starts``; no evaluation."""
    model = ExperiencedModel(experience, task)
    best: Ints = climb(
        task, starts, budget, model.mean, np.random.default_rng(0), rounds=_CLIMB_ROUNDS, width=48
    )[0]
    return best


def _changes(task: Task) -> Any:
    found = getattr(task.evaluator, "logit_changes", None)
    return found() if found is not None else None


def _inputs(task: Task, widths: Any) -> NDArray[np.float64]:
    plans = np.asarray(widths, dtype=np.int64)
    ratios = np.log(np.maximum(plans, 0.5) / task.space.widths)
    return np.hstack([ratios, _changes(task).features(plans)])


def _target(distance: Floats, bounds: tuple[float, float]) -> Floats:
    found: Floats = -np.log(np.clip(distance, *bounds))
    return found


def _kernel(scales: Tensor, groups: int, x: Tensor, a: Tensor, z: Tensor, b: Tensor) -> Tensor:
    """Covariance (N, P) of plans x of checkpoints a with plans z of checkpoints b."""
    s = dict(zip(_NAMES, scales[: len(_NAMES)].exp(), strict=True))
    lengths = scales[len(_NAMES) :].exp().reshape(2, groups)
    same = (a[:, None] == b[None]).to(x.dtype)
    totals = x[:, groups : groups + TOTALS] @ z[:, groups : groups + TOTALS].T
    shares = x[:, groups + TOTALS :] @ z[:, groups + TOTALS :].T
    shared, own = (_matern(x[:, :groups] / length, z[:, :groups] / length) for length in lengths)
    smooth = s["shared"] * shared + s["own"] * own * same
    linear = (s["totals"] + s["own_totals"] * same) * totals + (s["shares"] + s["own_shares"] * same) * shares
    return smooth + linear + s["level"] * (same + 0.5)


def _variances(scales: Tensor, groups: int, x: Tensor) -> Tensor:
    """Covariance (P,) of each plan with itself."""
    s = dict(zip(_NAMES, scales[: len(_NAMES)].exp(), strict=True))
    totals = (x[:, groups : groups + TOTALS] ** 2).sum(dim=1)
    shares = (x[:, groups + TOTALS :] ** 2).sum(dim=1)
    linear = (s["totals"] + s["own_totals"]) * totals + (s["shares"] + s["own_shares"]) * shares
    return linear + s["shared"] + s["own"] + 1.5 * s["level"]


def _matern(x: Tensor, z: Tensor) -> Tensor:
    """Matern 2.5; the small offset keeps the gradient of a distance of zero finite."""
    square = (
        (x[:, None] - z[None]).square().sum(dim=-1) if len(x) * len(z) < 300_000 else torch.cdist(x, z) ** 2
    )
    d = (5.0 * square + 1e-12).sqrt()
    return (1.0 + d + d**2 / 3.0) * torch.exp(-d)


def _fit(x: Tensor, y: Tensor, tasks: Tensor, generator: np.random.Generator) -> Tensor:
    """Hyperparameters of the highest marginal likelihood, with a log-normal prior on the length scales."""
    groups = (x.shape[1] - TOTALS) // 2
    rows = torch.from_numpy(np.sort(generator.permutation(len(x))[:_FIT_PLANS]))
    x, y, tasks = x[rows], y[rows] - y[rows].mean(), tasks[rows]
    centre = float(np.log(2.0))
    scales = torch.cat([torch.tensor(_START), torch.full((2 * groups,), centre)]).double().requires_grad_()
    optimizer = torch.optim.Adam([scales], lr=0.1)
    noise, eye = _NAMES.index("noise"), torch.eye(len(x), dtype=x.dtype)
    for _ in range(_FIT_STEPS):
        gram = _kernel(scales, groups, x, tasks, x, tasks) + (scales[noise].exp() + 1e-6) * eye
        lower = torch.linalg.cholesky(gram)
        weights = torch.cholesky_solve(y[:, None], lower)[:, 0]
        loss = 0.5 * y @ weights + lower.diagonal().log().sum()
        loss = loss + 0.5 * ((scales[len(_NAMES) :] - centre) ** 2 / 0.8**2).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return scales.detach()
