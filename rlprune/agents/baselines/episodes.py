"""What the agents share that stable-baselines3 trains on real evaluations: episodes, the account, the end.

Nothing of a trainer is saved. All that is random follows from the seed, so a resumed search runs again
from its start; the account answers from its ledger until the search is where it was.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, SupportsFloat

import gymnasium
import numpy as np
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.vec_env import DummyVecEnv

from ...config.search import SearchConfig
from ...envs.base import PruningEnv, ResetOptions
from ...envs.sequential import SequentialEnv
from ...envs.task import Task
from ...evaluation.ledger import BudgetExhausted
from ...utils.arrays import Floats32
from ..base import SearchRequest, SearchResult, TrialRecorder
from ..callbacks import SearchLogger
from ..ppo.agents import PPOAgent
from ..ppo.trainer import derived_seed, seed_everything

# More than any account allows: the account ends the training, not the algorithm.
_ENDLESS = 10**9
# After this many episodes in a row that brought no new plan the policy has settled, or the space is exhausted.
_PATIENCE = 50
# Noise (standard deviation, of actions in [-1, 1]) around the trained policy, for what the account has left.
_NOISE = 0.1


class Episodes(gymnasium.Wrapper[Floats32, Floats32, Floats32, Floats32]):
    """Lends an environment's episodes to its tasks in turn, as long as their accounts can pay.

    ``repeats`` counts the episodes in a row that ended in a plan scored before. The evaluations run on as many
    threads as the caller had set, whatever the training around them runs on.

    Raises (from ``reset``): SearchSpent when no account can pay for an episode and what has to be kept for the
    end, or after too many repeats.
    """

    def __init__(self, env: PruningEnv, recorders: Sequence[TrialRecorder]) -> None:
        super().__init__(env)
        self.tasks = env.tasks
        self.recorders = recorders
        self.repeats = 0
        self._threads = torch.get_num_threads()
        self._turn = -1
        # A range of budgets: an episode may have to pay for the scale of its budget too, and so may the last.
        self._kept = [3 if task.is_range else 1 for task in env.tasks]

    def reset(
        self, *, seed: int | None = None, options: ResetOptions | None = None
    ) -> tuple[Floats32, dict[str, Any]]:
        if options is None:
            options = {"task": self._next()}
        with threads(self._threads):
            return self.env.reset(seed=seed, options=dict(options))

    def step(self, action: Floats32) -> tuple[Floats32, SupportsFloat, bool, bool, dict[str, Any]]:
        before = self._spent()
        with threads(self._threads):
            obs, reward, terminated, truncated, info = self.env.step(action)
        if terminated:
            self.repeats = 0 if self._spent() > before else self.repeats + 1
        return obs, reward, terminated, truncated, info

    def _spent(self) -> int:
        return sum(recorder.account.spent for recorder in self.recorders)

    def _next(self) -> int:
        if self.repeats >= _PATIENCE:
            raise BudgetExhausted
        for _ in self.recorders:
            self._turn = (self._turn + 1) % len(self.recorders)
            if self.recorders[self._turn].account.left > self._kept[self._turn]:
                return self._turn
        raise BudgetExhausted


class EpisodicAgent(ABC):
    """Trains one algorithm of stable-baselines3; a subclass says on which environment, and which algorithm."""

    def __init__(self, settings: SearchConfig | None = None) -> None:
        self.settings = settings or SearchConfig()

    @abstractmethod
    def environment(self, tasks: tuple[Task, ...]) -> PruningEnv:
        """The environment of these tasks, whose scorers charge."""

    @abstractmethod
    def algorithm(self, env: DummyVecEnv, episodes: Episodes, seed: int) -> BaseAlgorithm:
        """The untrained algorithm on ``env``, which holds ``episodes`` alone; ``seed`` decides all of it."""

    def search(self, request: SearchRequest) -> SearchResult:
        """See :class:`rlprune.agents.base.Agent`; a ``policy`` only adds its plan to the starts.

        The starts, then training until the accounts are all but spent, then the trained policy's own plan,
        and plans around it with what is left. Everything follows from the seed and the ledger, so ``state``
        stays empty.
        """
        watcher = SearchLogger(request)
        recorders = [TrialRecorder(account, watcher) for account in request.accounts]
        charged = tuple(task.with_scorer(r) for task, r in zip(request.tasks, recorders, strict=True))
        for index, (task, recorder) in enumerate(zip(charged, recorders, strict=True)):
            recorder.score_starts(task, request.starts_of(index), request.policy)
        episodes = Episodes(self.environment(charged), recorders)
        # One thread: these networks are tiny, and on another number of threads a sum may round otherwise, so
        # that a search resumed there would ask for other plans than its ledger holds.
        with threads(1):
            self._train(episodes, watcher, request.seed)
        return SearchResult(tuple(r.best(task) for task, r in zip(request.tasks, recorders, strict=True)))

    def _train(self, episodes: Episodes, watcher: SearchLogger, seed: int) -> None:
        seed_everything(seed, 1)
        model = self.algorithm(DummyVecEnv([lambda: episodes]), episodes, derived_seed(seed))
        model.set_logger(watcher.logger)
        with contextlib.suppress(BudgetExhausted):
            model.learn(_ENDLESS)
        generator = np.random.default_rng([seed, 2])
        for index in range(len(episodes.recorders)):
            with contextlib.suppress(BudgetExhausted):
                _spend_rest(model, episodes, index, generator)


def _spend_rest(model: BaseAlgorithm, episodes: Episodes, index: int, generator: np.random.Generator) -> None:
    """One episode of the policy without noise, then episodes with noise that doubles after every repeat."""
    task, account = episodes.tasks[index], episodes.recorders[index].account
    options = {"task": index, "budget": task.highest_budget}
    episodes.repeats = 0
    std = 0.0
    while account.left > 0 and episodes.repeats < _PATIENCE:
        obs, _ = episodes.reset(options=options)
        done = False
        while not done:
            action, _ = model.predict(obs, deterministic=True)
            noisy = np.clip(action + std * generator.normal(size=action.shape), -1.0, 1.0)
            obs, _, done, _, _ = episodes.step(noisy.astype(np.float32))
        std = min(1.0, _NOISE * 2.0**episodes.repeats)


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch use this many threads in here."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


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


class StagedPPO(PPOAgent):
    """:class:`PPOAgent` with ``mode=direct`` and the stages of ``search.ppo_stages``; each stage is charged."""

    def __init__(self, settings: SearchConfig | None = None) -> None:
        settings = settings or SearchConfig()
        super().__init__(replace(settings, mode="direct", stages=settings.ppo_stages.stages))
