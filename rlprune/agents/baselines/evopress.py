"""EvoPress-style evolution: one parent, offspring by level swaps (Sieberling et al., arXiv 2410.14649)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...envs.task import Task
from ...pruning.history import final_widths
from ...surrogates.proposals import fresh
from ...utils.arrays import Ints
from ..base import TrialRecorder
from .gradient_free import PATIENCE, GradientFree


class EvoPress(GradientFree):
    """Elitist (1 + lambda) evolution from the best start.

    What differs from the paper: levels are amounts of cost instead of equal amounts of weights, because our
    groups' units cost differently, and a projection takes up what a swap leaves over of the budget; the
    first parent is the best start; offspring are compared on all samples, or, where ``score.rungs`` are
    set, by successive halving, which is the paper's multi-step selection with its own sample counts.
    """

    name = "evopress"

    def spend(self, task: Task, recorder: TrialRecorder, seed: Sequence[int]) -> None:
        """See :class:`GradientFree`."""
        settings = self.settings.evopress
        generator = np.random.default_rng(seed)
        if not recorder.within(task, task.highest_budget) and recorder.account.left > 0:
            recorder.evaluate(task.uniform_widths(task.highest_budget))
        idle = 0
        while recorder.account.left > 0 and idle < PATIENCE:
            parent = final_widths(recorder.within(task, task.highest_budget)[0])
            count = min(settings.offspring, recorder.account.left)
            swapped = [
                swap_levels(task, parent, settings.level, settings.swaps, generator) for _ in range(count)
            ]
            offspring = fresh(np.array(swapped), recorder.known)
            idle = 0 if len(offspring) else idle + 1
            recorder.evaluate_batch(offspring)


def swap_levels(task: Task, parent: Ints, level: float, most: int, generator: np.random.Generator) -> Ints:
    """A child (G,) of a plan (G,): in each swap one group loses a level and another gains one.

    A level is the share ``level`` of an average group's part of the dense cost, and at least one step of the
    group that loses it. The number of swaps is the lower of two draws from 1..``most``, as in the authors' code.
    """
    space = task.space
    child = parent.copy()
    first = space.leaders == np.arange(len(child))  # groups of one width swap together
    wanted = level * space.dense_cost(task.metric) / first.sum()
    for _ in range(generator.integers(1, most + 1, size=2).min()):
        each = np.bincount(space.leaders, space.unit_costs(child, task.metric), len(child))
        price = np.maximum(each, 1e-12)
        loses = np.flatnonzero(first & (child - space.steps >= space.minimums))
        gains = np.flatnonzero(first & (child < space.widths))
        if not len(loses) or not len(gains):
            break
        giver, taker = generator.choice(loses), generator.choice(gains)
        units = max(round(wanted / price[giver] / space.steps[giver]), 1) * space.steps[giver]
        units = min(units, child[giver] - space.minimums[giver])
        child[giver] -= units
        received = units * price[giver] / price[taker]
        child[taker] = min(child[taker] + round(received), space.widths[taker])
    shares = np.maximum(1.0 - child / np.maximum(space.widths, 1), 1e-9)
    return space.project(space.led(shares), task.highest_budget, task.metric)
