"""Plans worth a real evaluation: random ones, small changes of good ones, and the pick of a batch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Protocol

import numpy as np

from ..envs.task import Task
from ..pruning.budget import BudgetLike
from ..pruning.history import History, as_history
from ..utils.arrays import Floats, Ints


class Model(Protocol):
    """What a batch is chosen by: a model of the score."""

    @property
    def noise(self) -> float: ...
    def covariance(self, widths: Ints) -> tuple[Floats, Floats]: ...


def random_plans(task: Task, budget: BudgetLike, count: int, generator: np.random.Generator) -> Ints:
    """Plans (count, G) of EagleEye's random search (Li et al., arXiv 2007.02491).

    Every group draws the share that it loses from a uniform distribution; where EagleEye rejects what
    misses the budget, the projection scales the draw onto it.
    """
    shares = generator.uniform(1e-3, 1.0, size=(count, len(task.space.groups)))
    return task.space.project(task.space.led(shares), budget, task.metric)


def neighbours(
    task: Task, parents: Ints, budget: BudgetLike, count: int, generator: np.random.Generator
) -> Ints:
    """Small changes (count, G) of parents (P, G), all on the budget.

    A few groups of a parent give up more or less; the projection takes from or returns to the others.
    """
    return task.space.project(_changed(task, parents, count, generator), budget, task.metric)


def _changed(task: Task, parents: Ints, count: int, generator: np.random.Generator) -> Floats:
    """Shares (count, G) that changes of parents (P, G) give up, before the projection."""
    groups = len(task.space.groups)
    chosen = parents[generator.integers(len(parents), size=count)]
    shares = 1.0 - chosen / task.space.widths
    scale = np.exp(generator.uniform(np.log(0.01), np.log(0.2), size=(count, 1)))
    touched = (
        generator.random((count, groups)) < generator.choice([1.5, 3.0, groups], size=(count, 1)) / groups
    )
    shares = shares + scale * touched * generator.normal(size=(count, groups))
    changed: Floats = np.clip(task.space.led(shares), 1e-4, None)
    return changed


def climb(
    task: Task,
    parents: Ints,
    budget: BudgetLike,
    predict: Callable[[Ints], tuple[Floats, Floats]],
    kappas: Sequence[float],
    generator: np.random.Generator,
    *,
    rounds: int = 12,
    width: int = 48,
    keep: int = 8,
) -> Ints:
    """Local searches on the surrogate, one for each weight of the deviation, in step: (at most keep x kappas, G).

    The best ``keep`` plans of each round are the next round's parents. Plans of all searches are projected and
    predicted together: many at once cost less than as many calls.

    Args:
        predict: plans (P, G) -> mean (P,) and deviation (P,), of which mean + kappa * deviation is climbed.
    """
    pools = [np.unique(parents, axis=0) for _ in kappas]
    for _ in range(rounds):
        shares = np.vstack([_changed(task, pool, width, generator) for pool in pools])
        changed = np.split(task.space.project(shares, budget, task.metric), len(pools))
        pools = [np.unique(np.vstack(pair), axis=0) for pair in zip(pools, changed, strict=True)]
        mean, deviation = predict(np.vstack(pools))
        end = 0
        for i, (pool, kappa) in enumerate(zip(pools, kappas, strict=True)):
            rows = slice(end, end + len(pool))
            end += len(pool)
            pools[i] = pool[np.argsort(-(mean[rows] + kappa * deviation[rows]), kind="stable")[:keep]]
    return np.vstack(pools)


def fresh(plans: Ints, known: Collection[History]) -> Ints:
    """Distinct plans, in order of appearance, that have not been scored yet."""
    seen: set[History] = set()
    rows = []
    for row in plans:
        key = as_history(row)
        if key not in seen and key not in known:
            seen.add(key)
            rows.append(row)
    return np.array(rows, dtype=np.int64).reshape(len(rows), plans.shape[1])


def choose_batch(
    model: Model, pool: Ints, count: int, kappas: Sequence[float], first: Sequence[int] = ()
) -> list[int]:
    """Rows of the pool (N, G) by upper confidence bound, one after the other.

    After each pick its place counts as known (its mean is believed), so that the next pick is not its
    twin (GP-BUCB, Desautels et al. 2014). The bound's weight goes through ``kappas`` in turn; the rows
    ``first`` are picked before any other. A small space may have no plan left: the pool is empty, and so is the batch.
    """
    if not len(pool):
        return []
    mean, covariance = model.covariance(pool)
    chosen: list[int] = []
    for turn in range(min(count, len(pool))):
        if turn < len(first):
            pick = first[turn]
        else:
            bound = mean + kappas[turn % len(kappas)] * np.sqrt(np.maximum(np.diagonal(covariance), 0.0))
            bound[chosen] = -np.inf
            pick = int(np.argmax(bound))
        chosen.append(pick)
        column = covariance[:, pick].copy()
        covariance = covariance - np.outer(column, column) / (column[pick] + model.noise + 1e-9)
    return chosen
