"""``rlprune/Distribution-v0``: the action is the whole per-group sparsity distribution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from gymnasium import spaces

from ..errors import ConfigError
from ..pruning.history import History, as_history
from ..utils.arrays import Floats, Floats32, Ints
from .base import PruningEnv, ResetOptions, Snapshot, Sources, resolve_tasks
from .observation import BOUND, pad
from .task import Task, TaskBudget


class DistributionEnv(PruningEnv):
    """One action a stage, one number a group, projected exactly onto the budget.

    Observation: the (G, F) feature table, flattened, float32; column 0 of each row is the mask, ``features``
    names them all.
    Action: ``Box(-1, 1, (G,))``; 0 is the base rule and a shift of all numbers means nothing.
    Reward: with one stage R in [-1, about 1], where 0 is uniform pruning and 1 the dense model; with
    T stages ``R_t - R_(t-1)`` (R_0 = 0), so that the undiscounted return is the final R. Each stage is
    one evaluation. With one stage this is a contextual bandit.

    Args:
        workload: one workload, or several, that are traced and evaluated here; or use ``tasks``.
        budget: 0.5, "50%", "150M", or (low, high) drawn at every reset.
        metric: the cost that the budget limits.
        base_rule: the rule that action 0 stands for.
        tasks: ready :class:`Task` objects, instead of ``workload``, ``budget``, ``metric``, ``base_rule``.
        stages: T, how often an episode prunes and recovers.
        max_groups: rows of the observation and length of the action; the largest task's by default.
        render_mode: "rgb_array" or None.
    """

    def __init__(
        self,
        workload: Sources | None = None,
        budget: TaskBudget = 0.5,
        metric: str = "macs",
        base_rule: str = "uniform",
        *,
        tasks: Sequence[Task] | Task | None = None,
        stages: int = 1,
        max_groups: int | None = None,
        render_mode: str | None = None,
    ) -> None:
        super().__init__(resolve_tasks(tasks, workload, budget, metric, base_rule), render_mode)
        if stages < 1:
            raise ConfigError(f"stages: {stages} must be at least 1")
        largest = max(len(task.space.groups) for task in self.tasks)
        self.max_groups = largest if max_groups is None else max_groups
        if self.max_groups < largest:
            raise ConfigError(f"max_groups: {max_groups} is less than the {largest} groups of a task")
        self.stages = stages
        self.observation_space = spaces.Box(
            -BOUND, BOUND, (self.max_groups * len(self.features),), np.float32
        )
        self.action_space = spaces.Box(-1.0, 1.0, (self.max_groups,), np.float32)
        self._reward = 0.0

    def reset(
        self, *, seed: int | None = None, options: ResetOptions | None = None
    ) -> tuple[Floats32, dict[str, Any]]:
        """Draw a task and a budget (``options``: {"task": index, "budget": budget} fixes them)."""
        self._draw(seed, options)
        self._reward = 0.0
        return self._observation(), self._info(self._now(), None)

    def plan(self, action: Floats32) -> History:
        return as_history([*self._history, self._widths(self._own(action))])

    def step(self, action: Floats32) -> tuple[Floats32, float, bool, bool, dict[str, Any]]:
        """Project, build, recover, score; ``info`` tells widths, cost, metric, score and seconds."""
        task = self.task
        scale = task.scale(self._budget)
        own = self._own(action)
        widths = self._widths(own)
        candidate = task.evaluate([*self._history, widths])
        self._distribution = task.deviated(own, self._budget)
        self._history.append(widths)
        reward, self._reward = scale(candidate.score) - self._reward, scale(candidate.score)
        done = len(self._history) >= self.stages
        info = self._info(widths, candidate)
        info["reward"] = self._reward
        return self._observation(), float(reward), done, False, info

    def _own(self, action: Floats32) -> Floats:
        """The task's part of an action."""
        own: Floats = np.clip(np.asarray(action, dtype=np.float64), -1.0, 1.0)[: len(self.task.space.groups)]
        return own

    def _widths(self, action: Floats) -> Ints:
        if self.stages == 1:
            return self.task.widths(action, self._budget)
        stage = len(self._history) + 1
        return self.task.stage_widths(action, self._budget, stage, self.stages, self._now())

    def _observation(self) -> Floats32:
        return pad(self.task.observe(self._budget, self._now()), self.max_groups).ravel()

    def snapshot(self) -> Snapshot:
        return {**super().snapshot(), "reward": self._reward}

    def restore(self, state: Snapshot) -> None:
        super().restore(state)
        self._reward = float(state["reward"])
