"""What searches on other checkpoints have found, and how a plan for a new one is made of it without an evaluation.

The best plans of the other checkpoints, brought to the budget, are built on the new one (those of the rules, where
its architecture is another one), and so are the policy's plan and the uniform one. From their logits on unlabelled
images a process of the logits (:class:`rlprune.expectation.LogitProbes`) tells what other plans would cost; those that
it expects most of, or knows least of, are built next. Every build is counted (`PROBES` a group), and the validation
split is not read. Where the plan is then refined, every plan that is evaluated is a further build, and what is kept
of them is chosen by all images, the unlabelled and those of validation.

Shape legend: N plans, P new plans, G groups.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..arrays import Floats, Ints
from ..candidate import Candidate
from ..envs.task import Task
from ..errors import ArtifactError
from ..expectation import LogitProbes
from ..history import History, all_final_widths
from .proposals import climb, fresh, neighbours

# Builds a group on a new checkpoint, the dense model's included, and the share of them that plans of others may take.
PROBES = 8
_OTHERS = 0.25
# How much of what the uncertainty adds to a plan's divergence counts against it (-1: all), in turn: most of the builds
# look around, the last ones ask for what is sure.
_LOOK, _SURE, _LAST = (-1.0, -0.5, 0.0), (-1.0, -1.0, -0.5), 0.75
_PARENTS, _WIDTH = 5, 40
# Distances to the dense score are told apart between these (nats, or losses).
_BOUNDS = 1e-4, 20.0
# Of the logarithm of the ratio between the distance on validation and the one on the unlabelled images: variance of
# its level and of its deviation between plans, the latter's length (logarithms of keep ratios) and the noise.
_LEVEL, _OWN, _LENGTH, _NOISE = 1.0, 0.03, 0.7, 0.003


@dataclass(frozen=True)
class Experience:
    """The plans of several checkpoints of one architecture that no cheaper plan of the same checkpoint beats.

    ``ratios`` (N, G): logarithms of the keep ratios; ``targets`` (N,): minus the logarithm of the distance to the
    dense score; ``tasks`` (N,): which checkpoint.
    """

    ratios: Tensor
    targets: Tensor
    tasks: Tensor
    fingerprint: str

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON-able facts, for the policy's file."""
        tensors = {name: getattr(self, name).contiguous() for name in ("ratios", "targets", "tasks")}
        return tensors, {"fingerprint": self.fingerprint}

    @classmethod
    def from_state(cls, tensors: Mapping[str, Tensor], meta: Any) -> Experience:
        """Check what a policy's file holds; ArtifactError where it does not fit together."""
        try:
            if "ratios" in tensors:
                ratios = tensors["ratios"]
            else:  # files of the first version held further columns: 3 + G of what was expected of the plans
                inputs = tensors["inputs"]
                ratios = inputs[:, : (inputs.shape[1] - 3) // 2]
            targets, tasks, fingerprint = tensors["targets"], tensors["tasks"], str(meta["fingerprint"])
            fits = ratios.ndim == 2 and min(ratios.shape) > 0 and len(ratios) == len(targets)
            fits = fits and targets.ndim == 1 and tasks.shape == targets.shape
        except (KeyError, TypeError, IndexError) as error:
            raise ArtifactError(f"policy: its experience is damaged ({error})") from None
        if not fits or not all(bool(torch.isfinite(t).all()) for t in (ratios, targets)):
            raise ArtifactError("policy: its experience is damaged (the tensors' sizes do not fit)")
        return cls(ratios.double(), targets.double(), tasks.long(), fingerprint)

    def starts(self, task: Task, budget: Any, most: int | None = None) -> Ints:
        """Plans (N, G) at a budget that are worth a build on a task's checkpoint.

        The other checkpoints' best ones, or, where those were of another architecture, what the rules that need no
        probes give; of ``most`` builds they take a quarter.
        """
        room = max(1, int(_OTHERS * (PROBES * len(task.space.groups) if most is None else most)))
        same = self.fingerprint == task.space.fingerprint and self.ratios.shape[1] == len(task.space.groups)
        return self._plans(task, budget, room) if same else task.rule_plans(budget)[:room]

    def _plans(self, task: Task, budget: Any, room: int) -> Ints:
        """The best plan of every checkpoint, brought to a budget."""
        space, limit = task.space, task.space.target(budget, task.metric) * (1 + 1e-9)
        widths = np.rint(np.exp(self.ratios.numpy()) * space.widths).astype(np.int64)
        costs = np.array([space.cost(w, task.metric) for w in widths])
        # The best one that the budget allows; where none is, the cheapest.
        order = np.lexsort((-self.targets.numpy(), np.maximum(costs - limit, 0.0)))
        first = {int(self.tasks[i]): i for i in order[::-1]}
        rows = [first[task] for task in sorted(first)][:room]
        return space.project(np.maximum(1.0 - widths[rows] / space.widths, 1e-4), budget, task.metric)


def collect(tasks: Sequence[Task], scored: Sequence[Mapping[Any, Any]]) -> Experience | None:
    """The experience of a search over several checkpoints of one architecture; None where there is none.

    Args:
        scored: for each task its plans (a history of widths each) and candidates.
    """
    same = len({task.space.fingerprint for task in tasks}) == 1
    if len(tasks) < 2 or not same:
        return None
    ratios, targets, owners = [], [], []
    for index, (task, plans) in enumerate(zip(tasks, scored, strict=True)):
        widths = all_final_widths(plans)
        found = _target(task, [candidate.score for candidate in plans.values()])
        costs = np.array([task.space.cost(w, task.metric) for w in widths])
        best = -np.inf
        for row in np.lexsort((-found, costs)):
            if found[row] > best:
                best = found[row]
                ratios.append(_ratios(task, widths[row]))
                targets.append(best)
                owners.append(index)
    tensors = torch.from_numpy(np.array(ratios)), torch.from_numpy(np.array(targets)), torch.tensor(owners)
    return Experience(*tensors, tasks[0].space.fingerprint)


def can_build(task: Task) -> bool:
    """Whether builds can tell of a task's checkpoint: one budget, and logits of unlabelled images can be had."""
    return not task.is_range and hasattr(task.evaluator, "logit_probes") and _logits(task) is not None


def planned(task: Task, budget: Any, starts: Ints, most: int | None = None) -> Ints:
    """The widths (G,) of the smallest divergence that builds from ``starts`` on find at a budget; no evaluation.

    Args:
        most: builds in all, the dense model's included; by default ``PROBES`` a group at the first call for a
            checkpoint and budget, and none at later ones. More than there are already go on where those ended.
    """
    model = _logits(task, budget)
    known = model.chosen is not None
    if most is None:
        most = 0 if known else PROBES * len(task.space.groups)
    if not known or model.builds < most:
        for widths in starts[: most - 1]:
            model.measure(widths)
        model.fit()
        _look_around(model, task, budget, most)
        model.chosen = model.best()[0]
    return np.array(model.chosen)


def _look_around(model: LogitProbes, task: Task, budget: Any, most: int) -> None:
    """Build what the process hopes most of, round after round, until there are ``most`` builds."""
    generator = np.random.default_rng(0)
    while model.builds < most:
        before = model.builds
        for hope in _LOOK if before < _LAST * most else _SURE:

            def promise(plans: Ints, hope: float = hope) -> Floats:
                centre, spread = model.expected(plans)
                return hope * spread - centre

            if model.builds < most:
                _measure_new(model, task, budget, promise, generator)
        if model.builds == before:
            break  # the neighbourhood of the best plans is exhausted
        model.fit()


def _measure_new(
    model: LogitProbes,
    task: Task,
    budget: Any,
    promise: Callable[[Ints], Floats],
    generator: np.random.Generator,
) -> None:
    """Build the new plan of the highest promise, or one beside the best ones where the highest are all known."""
    best, known = model.best(_PARENTS), [(plan,) for plan in model.known]
    found = fresh(climb(task, best, budget, promise, generator, width=_WIDTH), known)
    if not len(found):
        found = fresh(neighbours(task, best, budget, _WIDTH, generator), known)
    if len(found):
        model.measure(found[0])


def agreed(task: Task, scored: Mapping[History, Candidate]) -> History:
    """The plan of the smallest mean divergence over the validation and the unlabelled images together.

    A few hundred validation images and as many plans to choose from flatter the plan that suits their peculiarities.

    Args:
        scored: the plans (one stage) to choose from, scored by `kl`; those that have not been built are built.
    """
    model = _logits(task)

    def divergence(history: History) -> float:
        candidate = scored[history]
        on_validation = task.evaluator.dense.score - candidate.score
        total = candidate.samples * on_validation + model.images * model.measure(history[-1])
        return float(total / (candidate.samples + model.images))

    return min(scored, key=divergence)


class ProbedModel:
    """A model of the score on a probed checkpoint; the interface is that of :class:`.surrogate.ScoreModel`.

    Its prior mean is what the process of the logits expects; what evaluations add is a level (validation images
    are not the unlabelled ones) and a smooth deviation between plans.
    """

    theta: list[float] | None = None
    noise = _NOISE
    batch = None
    # A few evaluations on top of experience have to be spent on what it is sure of, too.
    climbs = (0.0, 0.5)

    def __init__(self, task: Task) -> None:
        self._task, self._logits = task, _logits(task)
        self.fit(np.zeros((0, len(task.space.groups)), dtype=np.int64), np.zeros(0))

    def fit(self, widths: Ints, scores: Floats) -> None:
        """Take in N plans of this checkpoint: widths (N, G), scores (N,)."""
        # What has been evaluated has been built: its logits on the unlabelled images tell of its neighbours, too.
        # The kernel stays as it is, so that a resumed search, which takes all in at once, expects the same.
        for plan in widths:
            self._logits.measure(plan)
        self._logits.fit(adapt=False)
        self._x = _ratios(self._task, widths)
        prior, unsure = self._prior(widths)
        gram = self._kernel(self._x, self._x) + np.diag(unsure + _NOISE)
        self._inverse = np.linalg.inv(gram)
        self._weights = self._inverse @ (_target(self._task, scores) - prior)

    def predict(self, widths: Ints) -> tuple[Floats, Floats]:
        """Mean (P,) and standard deviation (P,) of the target."""
        mean, unsure, cross = self._cross(widths)
        variance = _LEVEL + _OWN + unsure - np.einsum("np,nm,mp->p", cross, self._inverse, cross)
        return mean, np.sqrt(np.maximum(variance, 1e-12))

    def covariance(self, widths: Ints) -> tuple[Floats, Floats]:
        """Mean (P,) and joint covariance (P, P)."""
        mean, unsure, cross = self._cross(widths)
        x = _ratios(self._task, widths)
        return mean, self._kernel(x, x) + np.diag(unsure) - cross.T @ self._inverse @ cross

    def ready(self, known: int) -> bool:
        return True

    def informed(self, widths: Ints) -> bool:
        return True

    def promising(self, count: int) -> Ints:
        """The best of the plans that have been built."""
        return self._logits.best(count)

    def _cross(self, widths: Ints) -> tuple[Floats, Floats, Floats]:
        prior, unsure = self._prior(widths)
        cross = self._kernel(self._x, _ratios(self._task, widths))
        return prior + cross.T @ self._weights, unsure, cross

    def _prior(self, widths: Ints) -> tuple[Floats, Floats]:
        """Expected target (P,), and its variance (P,) because the logits are not known for certain."""
        if not len(widths):
            return np.zeros(0), np.zeros(0)
        centre, spread = self._logits.expected(widths)
        total = np.maximum(centre + spread, _BOUNDS[0])
        return -np.log(total), (spread / total) ** 2

    def _kernel(self, a: Floats, b: Floats) -> Floats:
        distance = np.sqrt(5.0 * ((a[:, None] - b[None]) ** 2).sum(axis=-1)) / _LENGTH
        return _LEVEL + _OWN * (1.0 + distance + distance**2 / 3.0) * np.exp(-distance)


def builds(task: Task) -> tuple[int, int]:
    """Models that have been built for the task's budget, and the unlabelled images that each has read."""
    model = _logits(task)
    return model.builds, model.images


def _logits(task: Task, budget: Any = None) -> Any:
    target = task.space.target(task.budget if budget is None else budget, task.metric)
    return task.evaluator.logit_probes(target)  # type: ignore[attr-defined]


def _ratios(task: Task, widths: Any) -> Floats:
    found: Floats = np.log(np.maximum(np.asarray(widths, dtype=np.float64), 0.5) / task.space.widths)
    return found


def _target(task: Task, scores: Any) -> Floats:
    distance = task.evaluator.dense.score - np.nan_to_num(np.asarray(scores), nan=-1e9, neginf=-1e9)
    found: Floats = -np.log(np.clip(distance, *_BOUNDS))
    return found
