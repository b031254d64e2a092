"""What the two ways of training PPO share: the search's state, seeds, the trainer and how it is saved."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
from stable_baselines3 import PPO
from stable_baselines3.common.utils import set_random_seed
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor

from ...config.search import SearchConfig
from ...envs.distribution import DistributionEnv
from ...envs.task import Task
from ...errors import ArtifactError, described
from ...utils.checkpoints import require_same
from ..base import SearchRequest, SearchResult, TrialRecorder
from ..callbacks import SearchLogger
from ..sb3_internals import set_updates, updates
from .policy import GroupPolicy, PortablePolicy, provenance


class TrainingState(TypedDict):
    """What a PPO trainer goes on from."""

    policy: dict[str, Tensor]
    optimizer: dict[str, Any]
    timesteps: int
    updates: int


@dataclass(frozen=True)
class Search:
    """Everything that one search works with; ``tasks`` are the request's, charged through ``recorders``."""

    settings: SearchConfig
    request: SearchRequest
    tasks: tuple[Task, ...]
    recorders: tuple[TrialRecorder, ...]
    env: DistributionEnv
    watcher: SearchLogger

    @property
    def seed(self) -> int:
        return self.request.seed

    @property
    def policy(self) -> PortablePolicy | None:
        """A trained policy that the search goes on from."""
        return self.request.policy

    def score_starts(self) -> None:
        """Score the plans that the search starts from, as far as the accounts allow."""
        for index, (task, recorder) in enumerate(zip(self.tasks, self.recorders, strict=True)):
            recorder.score_starts(task, self.request.starts_of(index), self.policy)

    def load(self, mode: str) -> dict[str, Any] | None:
        """The saved state of this very search, or None; the accounts are brought to where they were."""
        state = self.request.state
        saved = None if state is None else state.load()
        if state is None or saved is None:
            return None
        calls, identity = saved.get("calls"), saved.get("identity")
        if not isinstance(identity, dict) or not isinstance(calls, list) or len(calls) != len(self.recorders):
            raise ArtifactError(f"{state.file}: damaged: not the state of this search; delete it")
        # States from before there was another version of the features say none, nor of batches ahead.
        require_same(state.file, {"feature_version": 1, "ahead": 0} | identity, self.identity(mode))
        for recorder, own in zip(self.recorders, calls, strict=True):
            recorder.repeat(own)
        self.watcher.resumed()
        return saved

    @contextlib.contextmanager
    def restoring(self) -> Iterator[None]:
        """While a saved state is put back: ArtifactError where it does not fit."""
        try:
            yield
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            place = self.request.state.file if self.request.state is not None else "state"
            raise ArtifactError(f"{place}: damaged ({described(error)}); delete it") from error

    def save(self, mode: str, contents: Mapping[str, object]) -> None:
        state = self.request.state
        if state is not None:
            calls = [recorder.calls for recorder in self.recorders]
            state.save({"identity": self.identity(mode), "calls": calls, **contents})

    def identity(self, mode: str) -> dict[str, Any]:
        """What must agree for a saved state to be continued."""
        return {
            "mode": mode,
            "surrogate": self.settings.ppo.surrogate,
            "seed": self.seed,
            "fingerprints": [task.space.fingerprint for task in self.tasks],
            "budgets": [str(task.budget) for task in self.tasks],
            "stages": self.env.stages,
            "ahead": self.settings.ahead,
            "feature_version": self.tasks[0].feature_version,
            "hidden": self.settings.ppo.hidden,
            "refines": self.policy is not None,
        }

    def result(self, policy: GroupPolicy) -> SearchResult:
        pairs = zip(self.tasks, self.recorders, strict=True)
        return SearchResult(tuple(recorder.best(task) for task, recorder in pairs), policy)


def derived_seed(*numbers: int) -> int:
    """One 32-bit seed from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def seed_everything(*numbers: int) -> None:
    """Seed torch, numpy and Python from a search's seed and its position.

    Done at the start of every rollout and batch, this is the saved random state: the position alone
    restores it, whatever ran before.
    """
    set_random_seed(derived_seed(*numbers))


def make_ppo(
    search: Search, env: VecEnv, *, n_steps: int, batch_size: int, n_epochs: int, log_std_init: float
) -> PPO:
    """stable-baselines3's PPO with the group policy; settings by its own names.

    ``log_std_init`` holds where the settings leave it open.
    """
    settings = search.settings.ppo
    log_std = log_std_init if settings.log_std_init is None else settings.log_std_init
    several = len(search.tasks) > 1
    hidden = settings.hidden if search.policy is None else int(search.policy.meta["hidden"])
    ppo = PPO(
        GroupPolicy,
        env,
        learning_rate=settings.learning_rate,
        n_steps=n_steps,
        batch_size=batch_size,
        n_epochs=n_epochs,
        gamma=settings.gamma,
        gae_lambda=settings.gae_lambda,
        clip_range=settings.clip_range,
        ent_coef=settings.ent_coef,
        vf_coef=settings.vf_coef,
        max_grad_norm=settings.max_grad_norm,
        seed=derived_seed(search.seed),
        device="cpu",
        policy_kwargs={
            "hidden": hidden,
            # A bias belongs to one checkpoint; over several it would hide what they have in common.
            "group_bias": settings.group_bias and not several,
            "log_std_init": log_std,
        },
    )
    ppo.set_logger(search.watcher.logger)
    policy = ppo.policy
    assert isinstance(policy, GroupPolicy)
    policy.provenance = provenance(search.tasks, search.env.stages)
    if search.policy is not None:
        policy.network.load_state_dict(search.policy.network.state_dict())
        policy.reach = float(search.policy.meta.get("reach", 1.0))
        # What it learned is kept, but the noise of its last days would explore nothing here.
        policy.network.log_std.data.fill_(log_std)
    return ppo


def training_state(ppo: PPO) -> TrainingState:
    """Weights, optimizer and counters of a PPO trainer, as tensors and plain types."""
    return {
        "policy": {name: t.detach().clone() for name, t in ppo.policy.state_dict().items()},
        "optimizer": ppo.policy.optimizer.state_dict(),
        "timesteps": ppo.num_timesteps,
        "updates": updates(ppo),
    }


def restore_training(ppo: PPO, saved: TrainingState) -> None:
    ppo.policy.load_state_dict(saved["policy"])
    ppo.policy.optimizer.load_state_dict(saved["optimizer"])
    ppo.num_timesteps = saved["timesteps"]
    set_updates(ppo, saved["updates"])
