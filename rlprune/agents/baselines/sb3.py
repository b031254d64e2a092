"""Any algorithm of stable-baselines3 or sb3-contrib for numbers as actions, on the whole distribution at once.

``rlprune/Distribution-v0`` with one stage: an episode is one step and one evaluation. The defaults of the
libraries are made for a million steps; those here are for hundreds.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import types
import typing
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import gymnasium
import numpy as np
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.vec_env import DummyVecEnv

from ...config.schema import show
from ...config.search import SB3_ALGORITHMS, SearchConfig
from ...envs.distribution import DistributionEnv
from ...envs.task import Task
from ...errors import ConfigError, near_miss, one_line
from .episodes import Episodes, EpisodicAgent

_NETWORK = {"net_arch": [64, 64]}
# After the first 20 random actions a minibatch is about as large as what is known, and is used several times.
_OFF_POLICY = {
    "learning_rate": 1e-3,
    "buffer_size": 10_000,
    "learning_starts": 20,
    "batch_size": 64,
    "gradient_steps": 4,
    "policy_kwargs": _NETWORK,
}
_SOFT = {**_OFF_POLICY, "tau": 0.02}
# Rewards lie in [-1, 1]: an entropy bonus that starts at the usual 1 drowns them for hundreds of steps.
_ENTROPY = {"ent_coef": "auto_0.01"}
# Policies with a free deviation start with one that stays near the base rule.
_GAUSSIAN = {**_NETWORK, "log_std_init": -1.5}
DEFAULTS: dict[str, dict[str, Any]] = {
    "A2C": {
        "learning_rate": 3e-3,
        "n_steps": 16,
        "use_rms_prop": False,
        "normalize_advantage": True,
        "policy_kwargs": _GAUSSIAN,
    },
    "ARS": {"policy_kwargs": _NETWORK},
    "CrossQ": {**_OFF_POLICY, **_ENTROPY},
    "DDPG": _SOFT,
    "PPO": {
        "learning_rate": 3e-3,
        "n_steps": 32,
        "batch_size": 16,
        "n_epochs": 8,
        "policy_kwargs": _GAUSSIAN,
    },
    "RecurrentPPO": {"learning_rate": 3e-3, "n_steps": 32, "batch_size": 16, "policy_kwargs": _GAUSSIAN},
    "SAC": {**_SOFT, **_ENTROPY},
    "TD3": _SOFT,
    "TQC": {**_SOFT, **_ENTROPY},
    "TRPO": {"n_steps": 32, "batch_size": 16, "policy_kwargs": _GAUSSIAN},
}
# What this agent decides itself.
_OURS = ("self", "policy", "env", "seed", "device", "verbose", "tensorboard_log", "_init_setup_model")
# Whole numbers must be at least 1 and other numbers at least 0, but for these.
_LOWEST = {
    "gradient_steps": -1,
    "sde_sample_freq": -1,
    "learning_starts": 0,
    "top_quantiles_to_drop_per_net": 0,
}


class SB3Agent(EpisodicAgent):
    """The algorithm of ``search.sb3``; wrong arguments are refused when the agent is made."""

    def __init__(self, settings: SearchConfig | None = None) -> None:
        super().__init__(settings)
        chosen = self.settings.sb3
        self._class = find_algorithm(chosen.algorithm)
        self._arguments = {
            **DEFAULTS[chosen.algorithm],
            **check_arguments(self._class, chosen.arguments),
        }
        self._check_environments()
        self._make(DummyVecEnv([_Trial]), 0)

    def _check_environments(self) -> None:
        name = self._class.__name__
        if self.settings.environments > 1 and name == "ARS":
            raise ConfigError(
                "search.environments: must be 1 for ARS, which runs each of its policies through whole episodes"
            )

    def environment(self, tasks: tuple[Task, ...]) -> DistributionEnv:
        return DistributionEnv(tasks=tasks)

    def algorithm(self, env: DummyVecEnv, episodes: Episodes, seed: int) -> BaseAlgorithm:
        return self._make(env, seed)

    def _make(self, env: DummyVecEnv, seed: int) -> BaseAlgorithm:
        arguments = copy.deepcopy(self._arguments)  # the libraries write into policy_kwargs
        if env.num_envs > 1:
            arguments |= _for_several(arguments, self.settings.sb3.arguments, env.num_envs)
        if self._class.__name__ in ("DDPG", "TD3"):
            actions = np.zeros(env.action_space.shape or ())
            arguments["action_noise"] = NormalActionNoise(actions, actions + self.settings.sb3.noise)
        policy = "MlpLstmPolicy" if self._class.__name__ == "RecurrentPPO" else "MlpPolicy"
        try:
            return self._class(policy, env, seed=seed, device="cpu", **arguments)
        except (TypeError, ValueError, AssertionError, AttributeError, KeyError, RuntimeError) as error:
            raise ConfigError(
                f"search.sb3.arguments: {self._class.__name__} does not take them ({one_line(error)})"
            ) from error


def _for_several(
    arguments: Mapping[str, Any], given: Mapping[str, object], environments: int
) -> dict[str, Any]:
    """What keeps updates as frequent as with one environment, of what the settings leave open."""
    found = {}
    if "n_steps" in arguments and "n_steps" not in given:
        found["n_steps"] = max(2, arguments["n_steps"] // environments)
        rollout = found["n_steps"] * environments
        if "batch_size" in arguments and "batch_size" not in given:
            most = min(arguments["batch_size"], rollout)
            found["batch_size"] = max(d for d in range(2, most + 1) if rollout % d == 0)
    if arguments.get("gradient_steps", -1) > 0 and "gradient_steps" not in given:
        found["gradient_steps"] = arguments["gradient_steps"] * environments
    return found


class _Named(SB3Agent):
    """An algorithm under its own name, with the defaults of this file: ``search.sb3`` is not read."""

    name = ""

    def __init__(self, settings: SearchConfig | None = None) -> None:
        settings = settings or SearchConfig()
        defaults = type(settings.sb3)(algorithm=self.name)
        super().__init__(replace(settings, sb3=defaults))


class SAC(_Named):
    """Soft actor-critic (Haarnoja et al., arXiv 1801.01290)."""

    name = "SAC"


class TD3(_Named):
    """Twin delayed DDPG (Fujimoto et al., arXiv 1802.09477)."""

    name = "TD3"


class A2C(_Named):
    """Synchronous advantage actor-critic (Mnih et al., arXiv 1602.01783)."""

    name = "A2C"


class _Trial(gymnasium.Env[Any, Any]):
    """Two numbers seen, two numbers chosen: an algorithm is built on it to see whether it takes its arguments."""

    observation_space = gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32)
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32)


def find_algorithm(name: str) -> type[BaseAlgorithm]:
    """The class of that name; ConfigError where sb3-contrib is needed and missing."""
    package = "stable_baselines3" if name in SB3_ALGORITHMS else "sb3_contrib"
    try:
        found: type[BaseAlgorithm] = getattr(importlib.import_module(package), name)
    except ImportError:
        raise ConfigError(
            f"search.sb3.algorithm: {name} needs sb3-contrib; pip install 'rlprune[contrib]'"
        ) from None
    except AttributeError:
        raise ConfigError(f"search.sb3.algorithm: this version of {package} has no {name}") from None
    return found


def check_arguments(algorithm: type[BaseAlgorithm], arguments: Mapping[str, object]) -> dict[str, Any]:
    """The arguments as the class takes them (tuples for lists); ConfigError names the first that it does not."""
    kinds = plain_arguments(algorithm)
    checked = {}
    for name, value in arguments.items():
        path = f"search.sb3.arguments.{name}"
        if name not in kinds:
            hint = near_miss(name, kinds) or f"; known: {', '.join(kinds)}"
            raise ConfigError(f"{path}: {algorithm.__name__} has no such argument{hint}")
        if not any(_is_a(value, kind) for kind in kinds[name]):
            expected = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds[name])
            raise ConfigError(f"{path}: expected {expected}, got {show(value)}")
        low = _LOWEST.get(name, 1 if isinstance(value, int) and float not in kinds[name] else 0)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value < low:
            raise ConfigError(f"{path}: must be at least {low}, got {value}")
        checked[name] = tuple(value) if isinstance(value, list) else value
    return checked


def plain_arguments(algorithm: type[BaseAlgorithm]) -> dict[str, tuple[type, ...]]:
    """The arguments that a config can give, each with the plain types that its annotation names."""
    found = {}
    for name, parameter in inspect.signature(algorithm.__init__).parameters.items():
        kinds = tuple(dict.fromkeys(_plain_types(parameter.annotation)))
        if name not in _OURS and set(kinds) - {type(None)}:
            found[name] = kinds
    return found


def _plain_types(hint: object) -> list[type]:
    origin = typing.get_origin(hint) or hint
    if origin in (typing.Union, types.UnionType):
        return [kind for option in typing.get_args(hint) for kind in _plain_types(option)]
    if origin is tuple:
        return [list]
    return [origin] if origin in (bool, int, float, str, dict, list, type(None)) else []


def _is_a(value: object, kind: type) -> bool:
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)
