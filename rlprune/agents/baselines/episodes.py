"""What the agents share that stable-baselines3 trains on real evaluations: episodes, the account, the end.

Nothing of a trainer is saved. All that is random follows from the seed, so a resumed search runs again
from its start; the account answers from its ledger until the search is where it was.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, SupportsFloat

import gymnasium
import numpy as np
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.vec_env import DummyVecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvStepReturn

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


class Turns:
    """Which task the next episode of a search is of, and how the last ones ended; shared by its environments.

    ``repeats`` counts the episodes in a row that ended in a plan scored before, ``fresh`` says of each episode whether
    its plan was a new one.
    """

    def __init__(self, tasks: Sequence[Task], recorders: Sequence[TrialRecorder]) -> None:
        self.recorders = recorders
        self.repeats = 0
        self.fresh: list[bool] = []
        self._turn = -1
        # A range of budgets: an episode may have to pay for the scale of its budget too, and so may the last.
        self._kept = [3 if task.is_range else 1 for task in tasks]
        self._running = [0 for _ in tasks]

    def payable(self) -> int:
        """Episodes that can be paid at the same time."""
        lefts = zip(self.recorders, self._kept, strict=True)
        return sum(max(0, recorder.account.left - kept) for recorder, kept in lefts)

    def take(self) -> int:
        """The task of an episode that begins; SearchSpent where none can pay for it."""
        if self.repeats >= _PATIENCE:
            raise BudgetExhausted
        for _ in self.recorders:
            self._turn = (self._turn + 1) % len(self.recorders)
            kept = self._kept[self._turn] + self._running[self._turn]
            if self.recorders[self._turn].account.left > kept:
                self._running[self._turn] += 1
                return self._turn
        raise BudgetExhausted

    def release(self, task: int) -> None:
        """An episode is over, or was given up."""
        self._running[task] -= 1

    def ended(self, new: bool) -> None:
        self.fresh.append(new)
        self.repeats = 0 if new else self.repeats + 1

    def spent(self) -> int:
        return sum(recorder.account.spent for recorder in self.recorders)


class Episodes(gymnasium.Wrapper[Floats32, Floats32, Floats32, Floats32]):
    """Lends an environment's episodes to its tasks in turn, as long as their accounts can pay.

    The evaluations run on as many threads as the caller had set, whatever the training around them runs on.

    Raises (from ``reset``): SearchSpent when no account can pay for an episode and what has to be kept for the
    end, or after too many repeats.
    """

    def __init__(self, env: PruningEnv, turns: Turns) -> None:
        super().__init__(env)
        self.tasks = env.tasks
        self.turns = turns
        self._pruning = env
        self._threads = torch.get_num_threads()
        self._task: int | None = None

    def reset(
        self, *, seed: int | None = None, options: ResetOptions | None = None
    ) -> tuple[Floats32, dict[str, Any]]:
        self._release()
        if options is None:
            self._task = self.turns.take()
            options = {"task": self._task}
        with threads(self._threads):
            return self.env.reset(seed=seed, options=dict(options))

    def step(self, action: Floats32) -> tuple[Floats32, SupportsFloat, bool, bool, dict[str, Any]]:
        before = self.turns.spent()
        with threads(self._threads):
            obs, reward, terminated, truncated, info = self.env.step(action)
        if terminated:
            self._release()
            self.turns.ended(self.turns.spent() > before)
        return obs, reward, terminated, truncated, info

    def begin(self, action: Floats32) -> None:
        """Let workers begin with the plan that a step with this action will score."""
        plan = self._pruning.plan(action)
        if plan is not None and self._task is not None:
            self.turns.recorders[self._task].prefetch([plan])

    def _release(self) -> None:
        if self._task is not None:
            self.turns.release(self._task)
            self._task = None


class EpisodesTogether(DummyVecEnv):
    """Environments that are stepped in turn; their plans are scored at the same time where there are workers."""

    def __init__(self, episodes: Sequence[Episodes]) -> None:
        super().__init__([partial(_itself, each) for each in episodes])
        self._episodes = episodes

    def step_wait(self) -> VecEnvStepReturn:
        if len(self._episodes) > 1:
            for each, action in zip(self._episodes, self.actions, strict=True):
                each.begin(action)
        return super().step_wait()


def _itself(episodes: Episodes) -> Episodes:
    return episodes


class EpisodicAgent(ABC):
    """Trains one algorithm of stable-baselines3; a subclass says on which environment, and which algorithm."""

    def __init__(self, settings: SearchConfig | None = None) -> None:
        self.settings = settings or SearchConfig()

    @abstractmethod
    def environment(self, tasks: tuple[Task, ...]) -> PruningEnv:
        """The environment of these tasks, whose scorers charge."""

    @abstractmethod
    def algorithm(self, env: DummyVecEnv, episodes: Episodes, seed: int) -> BaseAlgorithm:
        """The untrained algorithm on ``env``, whose first environment is ``episodes``; ``seed`` decides all of it."""

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
        turns = Turns(charged, recorders)
        # No more than can be paid: an episode that does not begin would end the training for the others.
        count = max(1, min(self.settings.environments, turns.payable()))
        episodes = [Episodes(self.environment(charged), turns) for _ in range(count)]
        # One thread: these networks are tiny, and on another number of threads a sum may round otherwise, so
        # that a search resumed there would ask for other plans than its ledger holds.
        with threads(1):
            self._train(episodes, watcher, request.seed)
        return SearchResult(tuple(r.best(task) for task, r in zip(request.tasks, recorders, strict=True)))

    def _train(self, together: Sequence[Episodes], watcher: SearchLogger, seed: int) -> None:
        seed_everything(seed, 1)
        episodes = together[0]
        model = self.algorithm(EpisodesTogether(together), episodes, derived_seed(seed))
        model.set_logger(watcher.logger)
        with contextlib.suppress(BudgetExhausted):
            model.learn(_ENDLESS)
        generator = np.random.default_rng([seed, 2])
        for index in range(len(episodes.tasks)):
            with contextlib.suppress(BudgetExhausted):
                _spend_rest(model, episodes, index, generator)


def _spend_rest(model: BaseAlgorithm, episodes: Episodes, index: int, generator: np.random.Generator) -> None:
    """One episode of the policy without noise, then episodes with noise that doubles after every repeat."""
    task, turns = episodes.tasks[index], episodes.turns
    account = turns.recorders[index].account
    options = {"task": index, "budget": task.highest_budget}
    turns.repeats = 0
    std = 0.0
    while account.left > 0 and turns.repeats < _PATIENCE:
        obs, _ = episodes.reset(options=options)
        done = False
        while not done:
            action, _ = model.predict(obs, deterministic=True)
            noisy = np.clip(action + std * generator.normal(size=action.shape), -1.0, 1.0)
            obs, _, done, _, _ = episodes.step(noisy.astype(np.float32))
        std = min(1.0, _NOISE * 2.0**turns.repeats)


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
        groups = max(len(task.space.groups) for task in episodes.tasks)
        n_steps = max(2, -(-settings.episodes // env.num_envs) * groups)
        rollout = n_steps * env.num_envs
        divisors = (d for d in range(2, settings.batch_size + 1) if rollout % d == 0)
        return PPO(
            "MlpPolicy",
            env,
            learning_rate=settings.learning_rate,
            n_steps=n_steps,
            batch_size=max(divisors, default=rollout),
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
