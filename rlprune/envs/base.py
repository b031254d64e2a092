"""What both environments share: tasks and budgets drawn at reset, the info dictionary, rendering."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NotRequired, TypedDict

import gymnasium
import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError
from ..evaluation.candidate import Scored
from ..pruning.budget import BudgetLike
from ..pruning.history import History
from ..utils.arrays import Floats, Floats32, Ints
from .render import draw
from .task import Source, Task, TaskBudget, make_task

Sources = Source | list[Source] | tuple[Source, ...]
"""One source of a task, or several."""
ResetOptions = Mapping[str, Any]
"""Gymnasium's options of a reset; ours are "task" (an index) and "budget"."""


class Snapshot(TypedDict):
    """The state of an environment in plain types; the last two are one environment's each."""

    index: int
    budget: BudgetLike
    history: list[list[int]]
    random: Mapping[str, Any]  # numpy's own
    reward: NotRequired[float]
    last: NotRequired[float]


def resolve_tasks(
    tasks: Sequence[Task] | Task | None,
    workload: Sources | None,
    budget: TaskBudget,
    metric: str,
    base_rule: str,
) -> tuple[Task, ...]:
    """Tasks from what the user gave: ready ones, or a workload or several with one budget.

    All of them show the same columns: those of the latest version among them, which names the kinds of the others.
    """
    if (tasks is None) == (workload is None):
        raise ConfigError("environment: give either workload=... (one or a sequence) or tasks=[...]")
    if workload is not None:
        workloads = workload if isinstance(workload, (list, tuple)) else [workload]
        tasks = [make_task(w, budget, metric=metric, base_rule=base_rule) for w in workloads]
    elif isinstance(tasks, Task):
        tasks = [tasks]
    if not tasks:
        raise ConfigError("environment: tasks must name at least one task")
    version = max(task.feature_version for task in tasks)
    return tuple(task.showing(version) for task in tasks)


class PruningEnv(gymnasium.Env[Floats32, Floats32]):
    """Base class: at every reset one of the tasks and a budget from its range are drawn by the env's seed."""

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 4}

    def __init__(self, tasks: tuple[Task, ...], render_mode: str | None) -> None:
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise ConfigError(f"render_mode: unknown mode {render_mode!r}; allowed: rgb_array, or none")
        self.tasks = tasks
        self.features = tasks[0].features
        self.render_mode = render_mode
        self._index = 0
        self._budget: BudgetLike = ""  # none before the first reset
        self._history: list[Ints] = []
        self._distribution: Floats | None = None

    @property
    def task(self) -> Task:
        """The task of the running episode."""
        return self.tasks[self._index]

    def _draw(self, seed: int | None, options: ResetOptions | None) -> None:
        """Start an episode; ``options`` may name the "task" (an index) and the "budget"."""
        super().reset(seed=seed)
        options = options or {}
        self._index = int(options.get("task", self.np_random.integers(len(self.tasks))))
        if not 0 <= self._index < len(self.tasks):
            raise ConfigError(f"options.task: {self._index} is no task; allowed: 0 to {len(self.tasks) - 1}")
        self._budget = options.get("budget", self.task.draw_budget(self.np_random))
        self._history = []
        self._distribution = None

    def plan(self, action: Floats32) -> History | None:
        """The plan that a step with this action would score; None where it would score none. Nothing is changed."""
        raise NotImplementedError

    def _info(self, widths: Ints, candidate: Scored | None) -> dict[str, Any]:
        """``metric`` and ``score`` are None where nothing was scored in this step."""
        task = self.task
        return {
            "task": self._index,
            "budget": task.space.target(self._budget, task.metric),
            "widths": np.array(widths, dtype=np.int64),
            "cost": float(task.space.cost(widths, task.metric)),
            "metric": None if candidate is None else float(candidate.metric),
            "score": None if candidate is None else float(candidate.score),
            "seconds": 0.0 if candidate is None else float(candidate.seconds),
        }

    def _now(self) -> Ints:
        """Widths kept at this moment."""
        return self._history[-1] if self._history else self.task.space.widths

    def render(self) -> NDArray[np.uint8] | None:
        """An RGB image of the widths and the distribution, or None without a render mode."""
        if self.render_mode is None:
            return None
        task = self.task
        now = self._now()
        share = task.space.cost(now, task.metric) / task.space.dense_cost(task.metric)
        title = f"{task.name or 'task'}: {share:.1%} of the dense {task.metric}, budget {self._budget}"
        names = [g.name for g in task.space.groups]
        return draw(names, now / task.space.widths, self._distribution, title)

    def snapshot(self) -> Snapshot:
        """The environment's own state in plain types, for :meth:`restore`."""
        return {
            "index": self._index,
            "budget": self._budget,
            "history": [[int(w) for w in widths] for widths in self._history],
            "random": self.np_random.bit_generator.state,
        }

    def restore(self, state: Snapshot) -> None:
        """Go back to a :meth:`snapshot`: the same episode, at the same stage, with the same random numbers."""
        self._index = int(state["index"])
        self._budget = state["budget"]
        self._history = [np.array(widths, dtype=np.int64) for widths in state["history"]]
        self.np_random.bit_generator.state = state["random"]
