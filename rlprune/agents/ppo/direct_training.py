"""Direct training: every step of PPO is a real evaluation."""

from __future__ import annotations

from typing import TypedDict, cast

import numpy as np
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import DummyVecEnv

from ...envs.base import Snapshot
from ...evaluation.ledger import BudgetExhausted
from ..base import SearchResult
from ..sb3_internals import rollout_position, set_rollout_position
from .policy import GroupPolicy
from .trainer import (
    Search,
    TrainingState,
    derived_seed,
    make_ppo,
    restore_training,
    seed_everything,
    training_state,
)

MODE = "direct"
# More than any account allows: the account ends the training, not PPO.
_ENDLESS = 10**9
# Logarithm of the first deviation. Hundreds of steps hardly shrink it, and with -1 the last plans score far below the
# base rule that the policy starts from (docs/negative-results.md).
_LOG_STD = -2.0


class _State(TypedDict):
    """What a killed training goes on from."""

    rollout: int
    training: TrainingState
    env: Snapshot
    last_obs: torch.Tensor
    episode_starts: list[bool]


class RolloutStart(BaseCallback):
    """Saves the trainer at the start of each rollout, then seeds the rollout from its number."""

    def __init__(self, search: Search, rollout: int) -> None:
        super().__init__()
        self._search, self.rollout = search, rollout

    def _on_step(self) -> bool:
        # What is kept back pays for the policy's own mode at the end.
        return all(recorder.account.left > self._search.env.stages for recorder in self._search.recorders)

    def _on_rollout_start(self) -> None:
        ppo = self.model
        assert isinstance(ppo, PPO)
        last_obs, starts = rollout_position(ppo)
        state: _State = {
            "rollout": self.rollout,
            "training": training_state(ppo),
            "env": self._search.env.snapshot(),
            "last_obs": torch.from_numpy(np.array(last_obs)),
            "episode_starts": [bool(s) for s in np.asarray(starts)],
        }
        self._search.save(MODE, state)
        seed_everything(self._search.seed, 1, self.rollout)
        self.rollout += 1


def direct_search(search: Search) -> SearchResult:
    """Train until an account is all but spent; then score the policy's mode, and samples with what is left."""
    settings = search.settings.ppo
    batch = max(
        d for d in range(1, settings.n_steps + 1) if settings.n_steps % d == 0 and d <= settings.batch_size
    )
    env = DummyVecEnv([lambda: search.env])
    saved = search.load(MODE)
    ppo = make_ppo(
        search,
        env,
        n_steps=settings.n_steps,
        batch_size=batch,
        n_epochs=settings.n_epochs,
        log_std_init=_LOG_STD,
    )
    rollout = 0
    try:
        if saved is None:
            search.score_starts()
        else:
            with search.restoring():
                rollout = _restore(search, ppo, cast("_State", saved))
        ppo.learn(_ENDLESS, callback=RolloutStart(search, rollout), reset_num_timesteps=False)
    except BudgetExhausted:
        pass
    policy = ppo.policy
    assert isinstance(policy, GroupPolicy)
    generator = torch.Generator().manual_seed(derived_seed(search.seed, 2))
    for index in range(len(search.tasks)):
        _spend_rest(search, policy, index, generator)
    return search.result(policy)


def _restore(search: Search, ppo: PPO, saved: _State) -> int:
    search.env.reset(seed=derived_seed(search.seed))  # makes the generator whose state is put back
    search.env.restore(saved["env"])
    restore_training(ppo, saved["training"])
    set_rollout_position(ppo, saved["last_obs"].numpy(), np.array(saved["episode_starts"], dtype=bool))
    return int(saved["rollout"])


def _spend_rest(search: Search, policy: GroupPolicy, index: int, generator: torch.Generator) -> None:
    """One episode of the mode, then episodes of samples: of several tasks, one empties its account first."""
    task, account = search.tasks[index], search.recorders[index].account
    budget = task.highest_budget
    std = float(policy.log_std.detach().exp())
    for episode in range(1 + 2 * account.left):
        obs, _ = search.env.reset(options={"task": index, "budget": budget})
        done = False
        try:
            while not done and account.left > 0:
                action, _ = policy.predict(obs, deterministic=True)
                noise = torch.randn(len(action), generator=generator).numpy() if episode else 0.0
                obs, _, done, _, _ = search.env.step(np.clip(action + std * noise, -1.0, 1.0))
        except BudgetExhausted:
            return
