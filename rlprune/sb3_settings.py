"""Settings of the agents that other algorithms of stable-baselines3 train (PPO's stand in `config`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from .settings import Section, setting

# Those whose actions may be a box of numbers; DQN and the like choose among a few.
SB3_ALGORITHMS = ("A2C", "DDPG", "PPO", "SAC", "TD3")
CONTRIB_ALGORITHMS = ("ARS", "CrossQ", "RecurrentPPO", "TQC", "TRPO")


@dataclass(frozen=True)
class AMCConfig(Section):
    """AMC (He et al., arXiv 1802.03494): DDPG, one group a step. Defaults are those of the authors' code."""

    prefix: ClassVar[str] = "search.amc."

    warmup: int | None = setting(
        None,
        "Episodes of uniformly random actions before DDPG learns; null for a quarter of the evaluations (the "
        "paper: 100 of 400).",
        low=1,
    )
    noise: float = setting(
        0.5,
        "Standard deviation of the truncated normal noise after the warm-up, as a share of the action's range.",
        above=0,
        high=10,
    )
    noise_decay: float = setting(
        0.95,
        "Factor of the noise after every 400th part of the evaluations (the paper has 400 episodes).",
        above=0,
        high=1,
    )
    actor_learning_rate: float = setting(1e-4, "Learning rate of the actor.", above=0, high=1)
    critic_learning_rate: float = setting(1e-3, "Learning rate of the critic.", above=0, high=1)
    batch_size: int = setting(64, "Transitions in a minibatch.", low=2)
    buffer_episodes: int = setting(100, "Episodes that the replay buffer holds.", low=1)
    tau: float = setting(0.01, "Share of the networks that the target networks take over.", above=0, high=1)
    gamma: float = setting(1.0, "Discount.", above=0, high=1)
    baseline: float = setting(
        0.5,
        "Share of a minibatch's mean reward in the moving average that rewards are reduced by; 0 for none.",
        low=0,
        high=1,
    )
    hidden: int = setting(300, "Units of the two hidden layers of actor and critic.", low=4)


@dataclass(frozen=True)
class SequentialPPOConfig(Section):
    """PPO that decides one group a step; the names are those of stable-baselines3 where it has one."""

    prefix: ClassVar[str] = "search.ppo_sequential."

    learning_rate: float = setting(1e-3, "Learning rate of Adam.", above=0, high=1)
    episodes: int = setting(8, "Episodes (one evaluation each) between two updates.", low=1)
    batch_size: int = setting(32, "Transitions in a minibatch.", low=2)
    n_epochs: int = setting(10, "Passes over a rollout.", low=1)
    gamma: float = setting(1.0, "Discount; 1, because only the last step pays.", above=0, high=1)
    gae_lambda: float = setting(0.95, "Lambda of the generalised advantage estimate.", low=0, high=1)
    clip_range: float = setting(0.2, "Clipping range of the policy ratio.", above=0, high=1)
    ent_coef: float = setting(0.0, "Weight of the entropy bonus.", low=0)
    log_std_init: float = setting(
        -0.5, "Logarithm of the initial standard deviation of an action.", low=-5, high=1
    )
    hidden: int = setting(64, "Units of the two hidden layers of actor and critic.", low=4)


@dataclass(frozen=True)
class StagedPPOConfig(Section):
    """PPO on the whole distribution, pruned in stages; all else as in search.ppo."""

    prefix: ClassVar[str] = "search.ppo_stages."

    stages: int = setting(2, "Stages of an episode; each of them is an evaluation.", low=2)


@dataclass(frozen=True)
class SB3Config(Section):
    """The agent `sb3`: any algorithm of stable-baselines3, or of sb3-contrib, for numbers as actions."""

    prefix: ClassVar[str] = "search.sb3."

    algorithm: str = setting(
        "SAC",
        "Name of the algorithm's class; the last five need sb3-contrib (extra `contrib`).",
        choices=(*SB3_ALGORITHMS, *CONTRIB_ALGORITHMS),
    )
    arguments: dict[str, Any] = setting(dict, "Keyword arguments of that class, over this agent's defaults.")
    noise: float = setting(
        0.3, "Standard deviation of the noise that DDPG and TD3 add to their actions.", low=0, high=2
    )
