"""EvoPress for depth: which attentions and which feed-forward parts go (Sieberling et al., arXiv 2410.14649)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...envs.task import Task
from ...errors import ConfigError
from ...pruning.history import final_widths
from ...surrogates.proposals import fresh
from ...utils.arrays import Bools, Ints
from ..base import TrialRecorder
from .gradient_free import PATIENCE, GradientFree

KINDS = ("attention", "ffn")


class EvoPressDrop(GradientFree):
    """One parent; offspring in which dropped parts come back and as many others of the same kind go.

    As in the authors' evo_drop_search.py: as many attentions as feed-forward parts are dropped, independently of each
    other; the first parent is the best of ``initial`` random states; an offspring has the lower of two draws from 1 to
    ``mutations`` exchanges; the parent competes with its offspring. Derived: the number of parts is the smallest whose
    removal meets the budget; all are scored on the validation samples (by successive halving with ``score.rungs``),
    where the authors draw tokens anew for each selection, 2,048 and then 32,768.

    Raises:
        ConfigError: parts may not be dropped (``prune.drop``), or not enough of them.
    """

    name = "evopress_drop"

    def spend(self, task: Task, recorder: TrialRecorder, seed: Sequence[int]) -> None:
        """See :class:`GradientFree`."""
        settings, generator = self.settings.evopress_drop, np.random.default_rng(seed)
        parts = _Parts(task)
        first = [parts.random(generator) for _ in range(min(settings.initial, recorder.account.left))]
        recorder.evaluate_batch(fresh(np.array([parts.widths(s) for s in first]), recorder.known))
        idle = 0
        while recorder.account.left > 0 and idle < PATIENCE:
            parent = parts.state(final_widths(recorder.within(task, task.highest_budget)[0]))
            count = min(settings.offspring, recorder.account.left)
            children = [parts.exchanged(parent, settings.mutations, generator) for _ in range(count)]
            offspring = fresh(np.array([parts.widths(child) for child in children]), recorder.known)
            idle = 0 if len(offspring) else idle + 1
            recorder.evaluate_batch(offspring)


class _Parts:
    """The parts of a model that can be dropped; a state (2, B) says what is gone of each kind."""

    def __init__(self, task: Task) -> None:
        self._space = task.space
        groups = task.space.groups
        blocks = sorted({g.block for g in groups if g.kind in KINDS})
        shape = len(KINDS), len(blocks), len(groups)
        self._holds = np.array(
            [[[g.kind == kind and g.block == b for g in groups] for b in blocks] for kind in KINDS],
            dtype=bool,
        ).reshape(shape)
        held = self._holds.any(axis=(0, 1))
        if not self._holds.size or task.space.minimums[held].any() or not self._holds.any(axis=2).all():
            raise ConfigError(
                "search.agent: 'evopress_drop' drops the attention and the feed-forward part of any block; "
                "give prune.drop=true, and a model whose blocks all have both"
            )
        self.count = next((k for k in range(len(blocks) + 1) if self._fits(task, k)), len(blocks) + 1)
        if self.count > len(blocks):
            raise ConfigError("search.agent: 'evopress_drop' cannot meet the budget by whole parts alone")

    def _fits(self, task: Task, count: int) -> bool:
        """Whether the budget is met without ``count`` parts of each kind, the cheapest ones."""
        space, target = task.space, task.space.target(task.highest_budget, task.metric)
        state = np.zeros(self._holds.shape[:2], dtype=bool)
        for kind, of_kind in enumerate(self._holds):
            dense = space.cost(space.widths, task.metric)
            saved = [dense - space.cost(np.where(part, 0, space.widths), task.metric) for part in of_kind]
            state[kind, np.argsort(saved, kind="stable")[:count]] = True
        return bool(space.cost(self.widths(state), task.metric) <= target)

    def widths(self, state: Bools) -> Ints:
        """Widths (G,) of a state."""
        return np.where(self._holds[state].any(axis=0), 0, self._space.widths)

    def state(self, widths: Ints) -> Bools:
        """The state that widths (G,) are of."""
        return np.asarray(~(self._holds & (widths > 0)).any(axis=2), dtype=bool)

    def random(self, generator: np.random.Generator) -> Bools:
        """A state with ``count`` parts of each kind gone."""
        state = np.zeros(self._holds.shape[:2], dtype=bool)
        for of_kind in state:
            of_kind[generator.choice(len(of_kind), self.count, replace=False)] = True
        return state

    def exchanged(self, parent: Bools, most: int, generator: np.random.Generator) -> Bools:
        """A child in which dropped parts have come back and others of their kind are gone."""
        child = parent.copy()
        for _ in range(generator.integers(1, most + 1, size=2).min()):
            of_kind = child[generator.integers(len(KINDS))]
            if of_kind.any() and not of_kind.all():
                goes, comes = (generator.choice(np.flatnonzero(part)) for part in (~of_kind, of_kind))
                of_kind[goes], of_kind[comes] = True, False
        return child
