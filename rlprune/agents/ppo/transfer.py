"""What searches on other checkpoints have found, and how a plan for a new one is made of it without an evaluation.

The best plans of the other checkpoints, brought to the budget, are built on the new one (those of the rules, where
its architecture is another one), and so are the policy's plan and the uniform one. From their logits on unlabelled
images a process of the logits (:class:`rlprune.surrogates.logit_gp.LogitProbes`) tells what other plans would cost;
those that it expects most of, or knows least of, are built next. Every build is counted (`PROBES` a group), and the
validation split is not read. Where the plan is then refined, every plan that is evaluated is a further build, and what
is kept of them is chosen by all images, the unlabelled and those of validation.

Shape legend: N plans, P new plans, G groups.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...envs.task import Task
from ...errors import ArtifactError
from ...evaluation.candidate import Candidate, Scored
from ...pruning.budget import BudgetLike
from ...pruning.history import History, all_final_widths
from ...surrogates.logit_gp import LogitProbes
from ...surrogates.probes import find_probes, log_distance, log_ratios, probes_of
from ...surrogates.proposals import climb, fresh, neighbours
from ...utils.arrays import Floats, Ints
from ...utils.finite import all_finite

# Builds a group on a new checkpoint, the dense model's included, and the share of them that plans of others may take.
PROBES = 8
_OTHERS = 0.25
# How much of what the uncertainty adds to a plan's divergence counts against it (-1: all), in turn: most of the builds
# look around, the last ones ask for what is sure.
_LOOK, _SURE, _LAST = (-1.0, -0.5, 0.0), (-1.0, -1.0, -0.5), 0.75
_PARENTS, _WIDTH = 5, 40


@dataclass(frozen=True)
class PlanMemory:
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
    def from_state(cls, tensors: Mapping[str, Tensor], meta: object) -> PlanMemory:
        """Check what a policy's file holds; ArtifactError where it does not fit together."""
        try:
            if "ratios" in tensors:
                ratios = tensors["ratios"]
            else:  # files of the first version held further columns: 3 + G of what was expected of the plans
                inputs = tensors["inputs"]
                ratios = inputs[:, : (inputs.shape[1] - 3) // 2]
            if not isinstance(meta, Mapping):
                raise TypeError("no facts")
            targets, tasks, fingerprint = tensors["targets"], tensors["tasks"], str(meta["fingerprint"])
            fits = ratios.ndim == 2 and min(ratios.shape) > 0 and len(ratios) == len(targets)
            fits = fits and targets.ndim == 1 and tasks.shape == targets.shape
        except (KeyError, TypeError, IndexError) as error:
            raise ArtifactError(f"policy: its experience is damaged ({error})") from None
        if not fits or not all(all_finite(t) for t in (ratios, targets)):
            raise ArtifactError("policy: its experience is damaged (the tensors' sizes do not fit)")
        return cls(ratios.double(), targets.double(), tasks.long(), fingerprint)

    def starts(self, task: Task, budget: BudgetLike, most: int | None = None) -> Ints:
        """Plans (N, G) at a budget that are worth a build on a task's checkpoint.

        The other checkpoints' best ones, or, where those were of another architecture, what the rules that need no
        probes give; of ``most`` builds they take a quarter.
        """
        room = max(1, int(_OTHERS * (PROBES * len(task.space.groups) if most is None else most)))
        same = self.fingerprint == task.space.fingerprint and self.ratios.shape[1] == len(task.space.groups)
        return self._plans(task, budget, room) if same else task.rule_plans(budget)[:room]

    def _plans(self, task: Task, budget: BudgetLike, room: int) -> Ints:
        """The best plan of every checkpoint, brought to a budget."""
        space, limit = task.space, task.space.target(budget, task.metric) * (1 + 1e-9)
        widths = np.rint(np.exp(self.ratios.numpy()) * space.widths).astype(np.int64)
        costs = np.array([space.cost(w, task.metric) for w in widths])
        # The best one that the budget allows; where none is, the cheapest.
        order = np.lexsort((-self.targets.numpy(), np.maximum(costs - limit, 0.0)))
        first = {int(self.tasks[i]): i for i in order[::-1]}
        rows = [first[task] for task in sorted(first)][:room]
        return space.project(np.maximum(1.0 - widths[rows] / space.widths, 1e-4), budget, task.metric)


def collect(tasks: Sequence[Task], scored: Sequence[Mapping[History, Scored]]) -> PlanMemory | None:
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
        found = log_distance(task, [candidate.score for candidate in plans.values()])
        costs = np.array([task.space.cost(w, task.metric) for w in widths])
        best = -np.inf
        for row in np.lexsort((-found, costs)):
            if found[row] > best:
                best = found[row]
                ratios.append(log_ratios(task, widths[row]))
                targets.append(best)
                owners.append(index)
    tensors = torch.from_numpy(np.array(ratios)), torch.from_numpy(np.array(targets)), torch.tensor(owners)
    return PlanMemory(*tensors, tasks[0].space.fingerprint)


def can_build(task: Task) -> bool:
    """Whether builds can tell of a task's checkpoint: one budget, and logits of unlabelled images can be had."""
    return not task.is_range and find_probes(task) is not None


def planned(task: Task, budget: BudgetLike, starts: Ints, most: int | None = None) -> Ints:
    """The widths (G,) of the smallest divergence that builds from ``starts`` on find at a budget; no evaluation.

    Args:
        most: builds in all, the dense model's included; by default ``PROBES`` a group at the first call for a
            checkpoint and budget, and none at later ones. More than there are already go on where those ended.
    """
    model = probes_of(task, budget)
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


def _look_around(model: LogitProbes, task: Task, budget: BudgetLike, most: int) -> None:
    """Build what the process hopes most of, round after round, until there are ``most`` builds."""
    generator = np.random.default_rng(0)
    while model.builds < most:
        before = model.builds
        for hope in _LOOK if before < _LAST * most else _SURE:
            if model.builds < most:
                _measure_new(model, task, budget, hope, generator)
        if model.builds == before:
            break  # the neighbourhood of the best plans is exhausted
        model.fit()


def _measure_new(
    model: LogitProbes,
    task: Task,
    budget: BudgetLike,
    hope: float,
    generator: np.random.Generator,
) -> None:
    """Build the new plan of the highest promise, or one next to the best ones where the highest are all known.

    Args:
        hope: how much of what the uncertainty adds to a divergence is counted, against it where negative.
    """
    best, known = model.best(_PARENTS), [(plan,) for plan in model.known]

    def promise(plans: Ints) -> tuple[Floats, Floats]:
        centre, spread = model.expected(plans)
        return -centre, spread

    found = fresh(climb(task, best, budget, promise, (hope,), generator, width=_WIDTH), known)
    if not len(found):
        found = fresh(neighbours(task, best, budget, _WIDTH, generator), known)
    if len(found):
        model.measure(found[0])


def agreed(task: Task, scored: Mapping[History, Candidate]) -> History:
    """The plan of the smallest mean divergence over the validation and the unlabelled images together.

    A few hundred validation images and as many plans to choose from flatter the plan that suits their peculiarities.
    Training images that the score reads as well (``score.unlabelled``) count in both.

    Args:
        scored: the plans (one stage) to choose from, scored by `kl`; those that have not been built are built.
    """
    model = probes_of(task)

    def divergence(history: History) -> float:
        candidate = scored[history]
        on_validation = task.evaluator.dense.score - candidate.score
        total = candidate.samples * on_validation + model.images * model.measure(history[-1])
        return float(total / (candidate.samples + model.images))

    return min(scored, key=divergence)


def builds(task: Task) -> tuple[int, int]:
    """Models that have been built for the task's budget, and the unlabelled images that each has read."""
    model = probes_of(task)
    return model.builds, model.images
