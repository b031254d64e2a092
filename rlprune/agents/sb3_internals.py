"""Everything that rlprune takes from the inside of stable-baselines3; nothing else in the package does.

Relied on, the same in 2.4 and in 2.9:

- ``BaseAlgorithm._last_obs`` and ``._last_episode_starts``: where the next rollout goes on; without the first one
  ``learn`` resets the environments.
- ``BaseAlgorithm._n_updates``: updates so far, which are logged.
- ``BaseAlgorithm._update_learning_rate(optimizers)``: called by ``train`` before its gradient steps, by DDPG with
  the optimizers of actor and critic.
- ``OffPolicyAlgorithm._sample_action(learning_starts, action_noise, n_envs)``: gives the actions of a step for the
  environments and for the buffer.
- ``ActorCriticPolicy._build(lr_schedule)``: called by ``__init__`` to make networks and optimizer.
- ``VecEnv._get_indices(indices)``: the environments that an argument names.

``tests/test_internals.py`` fails where one of them is gone. The hooks of a callback (``_on_step`` and its like) are
documented for users and not counted here.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from typing import Any

import numpy as np
from stable_baselines3 import DDPG
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices
from torch.optim import Optimizer

from ..utils.arrays import Bools, Floats32


def rollout_position(algorithm: OnPolicyAlgorithm) -> tuple[Any, Any]:
    """Where the next rollout goes on: observations (B, ...), and which environments (B,) begin an episode."""
    return algorithm._last_obs, algorithm._last_episode_starts


def set_rollout_position(algorithm: OnPolicyAlgorithm, observations: Floats32, episode_starts: Bools) -> None:
    """Let the next rollout go on from a :func:`rollout_position`."""
    algorithm._last_obs = observations
    algorithm._last_episode_starts = episode_starts


def reset_before_rollout(algorithm: OnPolicyAlgorithm) -> None:
    """Let the next ``learn`` begin with a reset of the environments."""
    algorithm._last_obs = None


def updates(algorithm: OnPolicyAlgorithm) -> int:
    """Updates so far."""
    return algorithm._n_updates


def set_updates(algorithm: OnPolicyAlgorithm, count: int) -> None:
    algorithm._n_updates = count


def environment_indices(environments: VecEnv, indices: VecEnvIndices) -> Iterable[int]:
    """The environments that the argument ``indices`` of a vector environment's method names."""
    return environments._get_indices(indices)


class CustomDDPG(DDPG):
    """DDPG whose actions in training and whose learning rates a subclass decides."""

    @abstractmethod
    def explore_action(self, observations: Floats32, warm_up: bool, count: int) -> Floats32:
        """Actions (count, ...) in [-1, 1] for observations (count, ...); random ones in the ``warm_up``."""

    @abstractmethod
    def learning_rates(self) -> tuple[float, float]:
        """Those of actor and critic."""

    def _sample_action(
        self, learning_starts: int, action_noise: ActionNoise | None = None, n_envs: int = 1
    ) -> tuple[Floats32, Floats32]:
        assert isinstance(self._last_obs, np.ndarray)
        action = self.explore_action(self._last_obs, self.num_timesteps < learning_starts, n_envs)
        return action, action  # they are in [-1, 1], as the buffer wants them

    def _update_learning_rate(self, optimizers: list[Optimizer] | Optimizer) -> None:
        assert isinstance(optimizers, list)
        for optimizer, rate in zip(optimizers, self.learning_rates(), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate


class CustomPolicy(ActorCriticPolicy):
    """An actor-critic policy whose subclass makes its networks and its optimizer itself."""

    @abstractmethod
    def build(self, learning_rate: float) -> None:
        """Make the networks, ``action_dist``, ``log_std`` and ``optimizer``."""

    def _build(self, lr_schedule: Schedule) -> None:
        self.build(lr_schedule(1))
