"""Direct training: every step of PPO is a real evaluation."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import DummyVecEnv

from ..evaluation import SearchSpent
from .base import SearchResult
from .policy import GroupPolicy
from .ppo import Search, derived_seed, make_ppo, restore_training, seed_everything, training_state

MODE = "direct"
# More than any account allows: the account ends the training, not PPO.
_ENDLESS = 10**9


class RolloutStart(BaseCallback):
    """Saves the trainer at the start of each rollout, then seeds the rollout from its number."""

    def __init__(self, search: Search, rollout: int) -> None:
        super().__init__()
        self._search, self.rollout = search, rollout

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        ppo = self.model
        assert isinstance(ppo, PPO)
        last_obs, starts = ppo._last_obs, ppo._last_episode_starts
        self._search.save(
            MODE,
            {
                "rollout": self.rollout,
                "training": training_state(ppo),
                "env": self._search.env.snapshot(),
                "last_obs": torch.from_numpy(np.array(last_obs)),
                "episode_starts": [bool(s) for s in np.asarray(starts)],
            },
        )
        seed_everything(self._search.seed, 1, self.rollout)
        self.rollout += 1


def direct_search(search: Search) -> SearchResult:
    """Train until an account is spent, then spend what the other accounts have left on policy samples."""
    settings = search.settings.ppo
    batch = max(d for d in range(1, settings.n_steps + 1) if settings.n_steps % d == 0 and d <= settings.batch_size)
    env = DummyVecEnv([lambda: search.env])
    saved = search.load(MODE)
    ppo = make_ppo(search, env, n_steps=settings.n_steps, batch_size=batch, n_epochs=settings.n_epochs)
    rollout = 0
    try:
        if saved is None:
            search.score_starts()
        else:
            rollout = _restore(search, ppo, saved)
        ppo.learn(_ENDLESS, callback=RolloutStart(search, rollout), reset_num_timesteps=False)
    except SearchSpent:
        pass
    policy = ppo.policy
    assert isinstance(policy, GroupPolicy)
    _spend_rest(search, policy)
    return search.result(policy)


def _restore(search: Search, ppo: PPO, saved: dict[str, Any]) -> int:
    search.env.reset(seed=derived_seed(search.seed))  # makes the generator whose state is put back
    search.env.restore(saved["env"])
    restore_training(ppo, saved["training"])
    ppo._last_obs = saved["last_obs"].numpy()
    ppo._last_episode_starts = np.array(saved["episode_starts"], dtype=bool)
    return int(saved["rollout"])


def _spend_rest(search: Search, policy: GroupPolicy) -> None:
    """Several tasks share the steps at random, so one account empties first: sample for the others."""
    if search.env.stages > 1:
        return
    generator = torch.Generator().manual_seed(derived_seed(search.seed, 2))
    std = float(policy.log_std.detach().exp())
    for index, (task, recorder) in enumerate(zip(search.tasks, search.recorders, strict=True)):
        budget = task.budget_range[1] if task.is_range else task.budget
        obs, _ = search.env.reset(options={"task": index, "budget": budget})
        mode, _ = policy.predict(obs, deterministic=True)
        groups = len(task.space.groups)
        for _ in range(2 * recorder.account.left):
            if recorder.account.left == 0:
                break
            noise = std * torch.randn(groups, generator=generator).numpy()
            try:
                recorder.evaluate(task.widths(np.clip(mode[:groups] + noise, -1, 1), budget))
            except SearchSpent:
                break
