"""AMC: DDPG that decides one group after the other (He et al., arXiv 1802.03494; code: mit-han-lab/amc).

As in the authors' code: every transition of an episode gets its final reward; a moving average of the rewards is taken
off them; one gradient step a transition, at the end of the episode; uniformly random actions in the warm-up,
then truncated normal noise around the actor's action. Other than there: observations are this package's
features, the episodes are as many as there are evaluations (warm-up and decay are scaled to them), and as a plan
that was scored before is free here and teaches nothing, the noise goes back up by one decay after each of those.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from scipy.special import ndtr, ndtri
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from ...config.search import AMCConfig
from ...envs.sequential import SequentialEnv
from ...envs.task import Task
from ...errors import ConfigError
from ...utils.arrays import Bools, Floats32
from ..sb3_internals import CustomDDPG
from .episodes import Episodes, EpisodicAgent

Infos = list[dict[str, Any]]
"""What each environment tells in addition to a step, as Gymnasium types it."""
# Episodes of the paper's searches: 100 of warm-up, then 300.
_PAPER_EPISODES, _PAPER_WARMUP = 400, 100


class FinalRewardBuffer(ReplayBuffer):
    """Holds an episode back until its end, then stores all of its transitions with the final reward.

    ``baseline`` is the weight of a minibatch's mean in the moving average that sampled rewards are reduced by.
    """

    def __init__(
        self,
        buffer_size: int,
        observation_space: spaces.Box,
        action_space: spaces.Box,
        device: torch.device | str = "auto",
        n_envs: int = 1,
        optimize_memory_usage: bool = False,
        *,
        baseline: float,
    ) -> None:
        super().__init__(buffer_size, observation_space, action_space, device, n_envs, optimize_memory_usage)
        self._episode: list[tuple[Floats32, Floats32, Floats32, Bools, Infos]] = []
        self._baseline = baseline
        self._average: torch.Tensor | None = None

    def add(
        self,
        obs: Floats32,
        next_obs: Floats32,
        action: Floats32,
        reward: Floats32,
        done: Bools,
        infos: Infos,
    ) -> None:
        self._episode.append((obs.copy(), next_obs.copy(), action.copy(), done.copy(), infos))
        if done.all():
            for before, after, taken, ended, info in self._episode:
                super().add(before, after, taken, reward, ended, info)
            self._episode.clear()

    def sample(self, batch_size: int, env: VecNormalize | None = None) -> ReplayBufferSamples:
        batch: ReplayBufferSamples = super().sample(batch_size, env)
        if self._baseline == 0.0:
            return batch
        mean = batch.rewards.mean()
        if self._average is None:
            self._average = mean
        self._average = self._average + self._baseline * (mean - self._average)
        return batch._replace(rewards=batch.rewards - self._average)


class NoisyDDPG(CustomDDPG):
    """DDPG with AMC's exploration, and learning rates of their own for actor and critic.

    ``explore`` has to be called before it learns.
    """

    def explore(self, settings: AMCConfig, episodes: Episodes, count: int) -> None:
        """Let the noise follow ``episodes``, of which ``count`` can be paid."""
        self._amc, self._episodes = settings, episodes
        self._decay = settings.noise_decay ** (_PAPER_EPISODES / count)
        self._decays = 0

    def train(self, gradient_steps: int, batch_size: int = 100) -> None:
        """Called at the end of every episode after the warm-up."""
        super().train(gradient_steps, batch_size)
        last = self._episodes.turns.fresh[-self.n_envs :]
        self._decays = max(0, self._decays + sum(1 if new else -1 for new in last))

    def explore_action(self, observations: Floats32, warm_up: bool, count: int) -> Floats32:
        if warm_up:
            return np.array([self.action_space.sample() for _ in range(count)])
        mean, _ = self.predict(observations, deterministic=True)
        # An action's range is 2 here and 1 in the paper.
        return truncated_normal(mean, 2.0 * self._amc.noise * self._decay**self._decays)

    def learning_rates(self) -> tuple[float, float]:
        return self._amc.actor_learning_rate, self._amc.critic_learning_rate


class AMC(EpisodicAgent):
    """See the top of this file."""

    def environment(self, tasks: tuple[Task, ...]) -> SequentialEnv:
        return SequentialEnv(tasks=tasks)

    def algorithm(self, env: DummyVecEnv, episodes: Episodes, seed: int) -> NoisyDDPG:
        settings = self.settings.amc
        count = max(1, sum(recorder.account.left for recorder in episodes.turns.recorders))
        warmup = settings.warmup or max(1, count * _PAPER_WARMUP // _PAPER_EPISODES)
        groups = max(len(task.space.groups) for task in episodes.tasks)
        if env.num_envs > 1 and any(len(task.space.groups) != groups for task in episodes.tasks):
            raise ConfigError(
                "search.environments: more than 1 of amc need models with as many groups each, whose episodes end "
                "together"
            )
        model = NoisyDDPG(
            "MlpPolicy",
            env,
            buffer_size=settings.buffer_episodes * groups,
            learning_starts=warmup * groups,
            batch_size=settings.batch_size,
            tau=settings.tau,
            gamma=settings.gamma,
            # Episodes of several environments end together.
            train_freq=(1, "episode") if env.num_envs == 1 else (groups, "step"),
            gradient_steps=-1,  # as many as the episode had steps
            replay_buffer_class=FinalRewardBuffer,
            replay_buffer_kwargs={"baseline": settings.baseline},
            policy_kwargs={"net_arch": [settings.hidden, settings.hidden]},
            seed=seed,
            device="cpu",
        )
        model.explore(settings, episodes, count)
        return model


def truncated_normal(mean: Floats32, std: float) -> Floats32:
    """A draw for each mean, of a normal distribution cut off at -1 and 1, by its inverse distribution function.

    Args:
        mean: any shape, each in [-1, 1].
    """
    low, high = ndtr((-1.0 - mean) / std), ndtr((1.0 - mean) / std)
    drawn = mean + std * ndtri(low + (high - low) * np.random.random(np.shape(mean)))
    clipped: Floats32 = np.clip(drawn, -1.0, 1.0).astype(np.float32)
    return clipped
