"""PPO (Schulman et al., arXiv 1707.06347) that decides one group after the other, as AMC's agent does."""

from __future__ import annotations

from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import DummyVecEnv

from ..envs.sequential import SequentialEnv
from ..envs.task import Task
from .episodes import Episodes, EpisodicAgent


class SequentialPPO(EpisodicAgent):
    """stable-baselines3's PPO and its own network on ``rlprune/Sequential-v0``."""

    def environment(self, tasks: tuple[Task, ...]) -> SequentialEnv:
        return SequentialEnv(tasks=tasks)

    def algorithm(self, env: DummyVecEnv, episodes: Episodes, seed: int) -> PPO:
        settings = self.settings.ppo_sequential
        # Whole episodes where all tasks have as many groups; else an update may cut one in two, as PPO can.
        n_steps = max(2, settings.episodes * max(len(task.space.groups) for task in episodes.tasks))
        divisors = (d for d in range(2, settings.batch_size + 1) if n_steps % d == 0)
        return PPO(
            "MlpPolicy",
            env,
            learning_rate=settings.learning_rate,
            n_steps=n_steps,
            batch_size=max(divisors, default=n_steps),
            n_epochs=settings.n_epochs,
            gamma=settings.gamma,
            gae_lambda=settings.gae_lambda,
            clip_range=settings.clip_range,
            ent_coef=settings.ent_coef,
            policy_kwargs={
                "net_arch": [settings.hidden, settings.hidden],
                "log_std_init": settings.log_std_init,
            },
            seed=seed,
            device="cpu",
        )
