"""``rlprune/Sequential-v0``: one group a step, in forward order, as in AMC (He et al., arXiv 1802.03494)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from gymnasium import spaces

from ..pruning.history import History, as_history
from ..utils.arrays import Floats32, Ints
from .base import PruningEnv, ResetOptions, Snapshot, Sources, resolve_tasks
from .observation import BOUND
from .task import Task, TaskBudget

# Columns behind the group's features: cost already taken, cost that the rest can still give, last action.
EXTRA = ("taken", "left", "last_action")


class SequentialEnv(PruningEnv):
    """One group a step; the score is paid after the last one.

    Observation: features of the group at hand (its mask first), what is taken, what is left, the last
    action; float32. Action: ``Box(-1, 1, (1,))``, from "keep all" to "cut to the minimum", clipped so
    that the budget stays reachable and is used up. Reward: 0 until the last group, then R (0 is
    uniform pruning, 1 the dense model). One evaluation an episode. Where groups have one width
    (`PruningSpace.ties`) the first of them decides, and the actions of the others change nothing. Arguments as in
    ``DistributionEnv``.
    """

    def __init__(
        self,
        workload: Sources | None = None,
        budget: TaskBudget = 0.5,
        metric: str = "macs",
        base_rule: str = "uniform",
        *,
        tasks: Sequence[Task] | Task | None = None,
        render_mode: str | None = None,
    ) -> None:
        super().__init__(resolve_tasks(tasks, workload, budget, metric, base_rule), render_mode)
        self.observation_space = spaces.Box(-BOUND, BOUND, (len(self.features) + len(EXTRA),), np.float32)
        self.action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)
        self._last = 0.0

    def reset(
        self, *, seed: int | None = None, options: ResetOptions | None = None
    ) -> tuple[Floats32, dict[str, Any]]:
        """Draw a task and a budget (``options``: {"task": index, "budget": budget} fixes them)."""
        self._draw(seed, options)
        self._last = 0.0
        return self._observation(), self._info(self._now(), None)

    def plan(self, action: Floats32) -> History | None:
        if len(self._history) + 1 < len(self.task.space.groups):
            return None
        return as_history(self._fill(self._decided(action)))

    def step(self, action: Floats32) -> tuple[Floats32, float, bool, bool, dict[str, Any]]:
        """Decide one group; after the last one the plan is scored."""
        task, space = self.task, self.task.space
        g = len(self._history)
        widths = self._decided(action)
        most = 1.0 - space.minimums[g] / space.widths[g]
        taken = 1.0 - widths[g] / space.widths[g]
        self._last = float(2.0 * taken / most - 1.0) if most > 0 else -1.0
        self._history.append(widths)
        if len(self._history) < len(space.groups):
            return self._observation(), 0.0, False, False, self._info(widths, None)
        widths = self._fill(widths)
        self._history[-1] = widths
        self._distribution = 1.0 - widths / space.widths
        scale = task.scale(self._budget)
        candidate = task.evaluate([widths])
        return self._observation(), scale(candidate.score), True, False, self._info(widths, candidate)

    def _decided(self, action: Floats32) -> Ints:
        """Widths (G,) with what the action makes of the group at hand."""
        g = len(self._history)
        if self.task.space.leaders[g] < g:  # decided with the first group of its width
            return self._now().copy()
        share = (float(np.clip(np.asarray(action).reshape(-1)[0], -1.0, 1.0)) + 1.0) / 2.0
        widths = self._now().copy()
        widths[self.task.space.leaders == g] = self._reachable(g, widths, share)
        return widths

    def _reachable(self, group: int, widths: Ints, share: float) -> int:
        """The allowed width nearest to the one asked for, from which the budget can still be met exactly.

        Wide enough that the rest, left dense, does not undershoot the budget; narrow enough that the
        rest, cut to its minimums, meets it.
        """
        space, metric = self.task.space, self.task.metric
        target = space.target(self._budget, metric)
        low, dense, step = space.minimums[group], space.widths[group], space.steps[group]
        multiples = np.arange(step, dense + 1, step)
        allowed = np.unique(np.concatenate([[low], multiples[multiples >= low], [dense]]))
        own, later = space.leaders == group, space.leaders > group
        leanest = np.where(later, space.minimums, widths)
        rows = np.repeat(leanest[None], len(allowed), axis=0)
        rows[:, own] = allowed[:, None]
        fits = space.cost(rows, metric) <= target
        highest = allowed[fits].max() if fits.any() else low
        rows = np.repeat(np.where(later, space.widths, widths)[None], len(allowed), axis=0)
        rows[:, own] = allowed[:, None]
        ample = space.cost(rows, metric) >= target
        lowest = allowed[ample].min() if ample.any() else dense
        wanted = dense - share * (dense - low)
        within = allowed[(allowed >= min(lowest, highest)) & (allowed <= highest)]
        return int(within[np.abs(within - wanted).argmin()])

    def _fill(self, widths: Ints) -> Ints:
        """Give back the steps that still fit, last group first, so that the budget is used up."""
        space, metric = self.task.space, self.task.metric
        target = space.target(self._budget, metric)
        widths = widths.copy()
        for g in reversed(range(len(widths))):
            while widths[g] < space.widths[g]:
                wider = np.where(space.leaders == space.leaders[g], space.limits.above(widths), widths)
                if space.cost(wider, metric) > target:
                    break
                widths = wider
        return widths

    def _observation(self) -> Floats32:
        task, space = self.task, self.task.space
        g = min(len(self._history), len(space.groups) - 1)
        now = self._now()
        dense = space.dense_cost(task.metric)
        later = space.leaders >= g
        leanest = space.cost(np.where(later, space.minimums, now), task.metric)
        cost = space.cost(now, task.metric)
        extra = [(dense - cost) / dense, (cost - leanest) / dense, self._last]
        row = task.observe(self._budget, now)[g]
        return np.concatenate([row, np.clip(extra, -BOUND, BOUND)]).astype(np.float32)

    def snapshot(self) -> Snapshot:
        return {**super().snapshot(), "last": self._last}

    def restore(self, state: Snapshot) -> None:
        super().restore(state)
        self._last = float(state["last"])
