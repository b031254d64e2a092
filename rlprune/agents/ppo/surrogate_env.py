"""An environment whose score is the surrogate's: PPO steps that cost no evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvStepReturn

from ...envs.distribution import DistributionEnv
from ...envs.observation import pad
from ...envs.task import Task
from ...pruning.budget import BudgetLike
from ...surrogates.score_gp import Predictor
from ...utils.arrays import Floats, Floats32, Ints
from ..sb3_internals import environment_indices

# Environments of one task that share a drawn budget: projecting is vectorised over one budget.
_CHUNK = 16


class SurrogateVecEnv(VecEnv):
    """B copies of Distribution-v0 (one stage) that pay what the score models predict; no plan is built.

    Reward: predicted score of the plan plus ``kappa`` standard deviations, minus the prediction for the
    base plan of that budget, so that rewards of easy and hard budgets compare. The environments are
    spread evenly over the tasks; each chunk of them draws its own budget at every step.
    """

    def __init__(
        self, env: DistributionEnv, models: Sequence[Predictor], count: int, kappa: float, seed: int
    ) -> None:
        super().__init__(count, env.observation_space, env.action_space)
        self._env, self._models, self._kappa = env, models, kappa
        self._random = np.random.default_rng(seed)
        self.render_mode = None
        self._chunks = _chunks(count, env.tasks)
        self._budgets: list[BudgetLike] = []
        self._actions: Floats | Floats32 = np.zeros((count, env.max_groups))
        self._draw()

    def reseed(self, seed: int) -> None:
        """Random numbers from here on follow from this seed alone."""
        self._random = np.random.default_rng(seed)
        self._draw()

    def reset(self) -> Floats32:
        return self._observations()

    def step_async(self, actions: Floats32) -> None:
        self._actions = actions

    def step_wait(self) -> VecEnvStepReturn:
        rewards = np.zeros(self.num_envs, dtype=np.float32)
        for (task_index, rows), budget in zip(self._chunks, self._budgets, strict=True):
            task, model = self._env.tasks[task_index], self._models[task_index]
            groups = len(task.space.groups)
            plans = task.widths(np.vstack([np.zeros(groups), self._actions[rows, :groups]]), budget)
            mean, std = model.predict(plans)
            rewards[rows] = (mean[1:] + self._kappa * std[1:]) - mean[0]
        self._draw()
        done = np.ones(self.num_envs, dtype=bool)
        return self._observations(), rewards, done, [{} for _ in range(self.num_envs)]

    def _draw(self) -> None:
        self._budgets = [self._env.tasks[i].draw_budget(self._random) for i, _ in self._chunks]

    def _observations(self) -> Floats32:
        rows = np.zeros((self.num_envs, *(self.observation_space.shape or ())), dtype=np.float32)
        for (task_index, where), budget in zip(self._chunks, self._budgets, strict=True):
            rows[where] = pad(self._env.tasks[task_index].observe(budget), self._env.max_groups).ravel()
        return rows

    def close(self) -> None:
        """Nothing to close."""

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        return [getattr(self, attr_name, None) for _ in environment_indices(self, indices)]

    def set_attr(self, attr_name: str, value: object, indices: VecEnvIndices = None) -> None:
        raise AttributeError("the surrogate environments have no attributes of their own")

    def env_method(
        self, method_name: str, *args: object, indices: VecEnvIndices = None, **kwargs: object
    ) -> list[Any]:
        raise AttributeError("the surrogate environments have no methods of their own")

    def env_is_wrapped(self, wrapper_class: type, indices: VecEnvIndices = None) -> list[bool]:
        return [False for _ in environment_indices(self, indices)]


def _chunks(count: int, tasks: Sequence[Task]) -> list[tuple[int, Ints]]:
    """Environments of each task in chunks that share a budget: (task, rows)."""
    chunks = []
    for index, rows in enumerate(np.array_split(np.arange(count), len(tasks))):
        pieces = -(-len(rows) // _CHUNK) if tasks[index].is_range else 1
        chunks += [(index, piece) for piece in np.array_split(rows, pieces)]
    return chunks
