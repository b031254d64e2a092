"""The insides of libraries that rlprune relies on are there, and do what the files that hold them say."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from torch import nn


def inside(package: str, holder: str, module: str, *path: str) -> Any:
    """What lies at a path in a library; the test fails with its version and the file that relies on it."""
    names = [module, *path]
    try:
        found = importlib.import_module(module)
        for name in path:
            found = getattr(found, name)
    except (ImportError, AttributeError):
        version = importlib.metadata.version(package)
        pytest.fail(
            f"{package} {version} has no {'.'.join(names)} any more, which rlprune/{holder} relies on"
        )
    return found


def takes(function: Any, *names: str) -> None:
    """The function's parameters begin with these."""
    found = list(inspect.signature(function).parameters)[: len(names)]
    assert found == list(names), f"{function.__qualname__} takes {found} and not {list(names)} any more"


def test_a_missing_inside_is_named() -> None:
    with pytest.raises(
        pytest.fail.Exception, match=r"^torch .* has no torch\.nn\._Nothing any more, which rlprune/x"
    ):
        inside("torch", "x.py", "torch.nn", "_Nothing")


def test_lokys_limit_on_the_memory_of_a_worker_can_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    from rlprune.execution.loky_internals import keep_this_worker

    module = "joblib.externals.loky.process_executor"
    limit = inside("joblib", "execution/loky_internals.py", module, "_MAX_MEMORY_LEAK_SIZE")
    process_executor = importlib.import_module(module)
    assert "_MAX_MEMORY_LEAK_SIZE" in inspect.getsource(process_executor._process_worker)
    monkeypatch.setattr(process_executor, "_MAX_MEMORY_LEAK_SIZE", limit)
    keep_this_worker()
    assert limit < process_executor._MAX_MEMORY_LEAK_SIZE


class TestStableBaselines3:
    holder = "agents/sb3_internals.py"

    @pytest.mark.parametrize(
        ("path", "names"),
        [
            ("off_policy_algorithm.OffPolicyAlgorithm._sample_action",
             ("self", "learning_starts", "action_noise", "n_envs")),
            ("base_class.BaseAlgorithm._update_learning_rate", ("self", "optimizers")),
            ("policies.ActorCriticPolicy._build", ("self", "lr_schedule")),
            ("vec_env.VecEnv._get_indices", ("self", "indices")),
        ],
    )  # fmt: skip
    def test_methods(self, path: str, names: tuple[str, ...]) -> None:
        module, *rest = path.split(".")
        found = inside("stable-baselines3", self.holder, f"stable_baselines3.common.{module}", *rest)
        takes(found, *names)

    @pytest.mark.parametrize("name", ["_last_obs", "_last_episode_starts", "_n_updates"])
    def test_attributes(self, name: str) -> None:
        source = inside(
            "stable-baselines3", self.holder, "stable_baselines3.common.base_class", "BaseAlgorithm"
        )
        version = importlib.metadata.version("stable-baselines3")
        assert f"self.{name} =" in inspect.getsource(source.__init__), (
            f"stable-baselines3 {version} has no {name} any more, which rlprune/{self.holder} relies on"
        )

    def test_a_rollout_goes_on_or_begins_with_a_reset(self) -> None:
        from stable_baselines3 import PPO

        from rlprune.agents import sb3_internals as sb3

        env = Counted()
        ppo = PPO("MlpPolicy", env, n_steps=2, batch_size=2, n_epochs=1, device="cpu")
        ppo.learn(2)
        seen = sb3.rollout_position(ppo)
        assert env.resets == 1 and seen[0].tolist() == [[2.0]] and seen[1].tolist() == [False]
        assert sb3.updates(ppo) == 1
        ppo.learn(2, reset_num_timesteps=False)
        assert env.resets == 1 and sb3.rollout_position(ppo)[0].tolist() == [[4.0]]
        sb3.reset_before_rollout(ppo)
        ppo.learn(2, reset_num_timesteps=False)
        assert env.resets == 2 and sb3.updates(ppo) == 3
        sb3.set_rollout_position(ppo, *seen)
        sb3.set_updates(ppo, 1)
        assert sb3.rollout_position(ppo) is not None and sb3.updates(ppo) == 1
        ppo.learn(2, reset_num_timesteps=False)
        assert env.resets == 2, "it goes on"
        assert ppo.env is not None and list(sb3.environment_indices(ppo.env, None)) == [0]

    def test_ddpg_asks_for_actions_and_learning_rates(self) -> None:
        from rlprune.agents.sb3_internals import CustomDDPG

        class Fixed(CustomDDPG):
            def explore_action(self, observations: Any, warm_up: bool, count: int) -> Any:
                asked.append((np.asarray(observations).tolist(), warm_up))
                return np.full((count, 1), 0.5, dtype=np.float32)

            def learning_rates(self) -> tuple[float, float]:
                return 0.25, 0.125

        asked: list[Any] = []
        env = Counted()
        model = Fixed("MlpPolicy", env, learning_starts=2, train_freq=1, batch_size=2, device="cpu")
        model.learn(4)
        assert asked == [([[0.0]], True), ([[1.0]], True), ([[2.0]], False), ([[3.0]], False)]
        assert env.actions == [0.5] * 4
        policy: Any = model.policy
        rates = [part.optimizer.param_groups[0]["lr"] for part in (policy.actor, policy.critic)]
        assert rates == [0.25, 0.125]


class Counted(gymnasium.Env[Any, Any]):
    """Shows how many steps there were since the last reset."""

    observation_space = gymnasium.spaces.Box(0.0, 100.0, (1,), np.float32)
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32)

    def __init__(self) -> None:
        self.resets, self.steps = 0, 0
        self.actions: list[float] = []

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        self.resets, self.steps = self.resets + 1, 0
        return np.zeros(1, dtype=np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        self.actions.append(float(action[0]))
        return np.full(1, self.steps, dtype=np.float32), 0.0, False, False, {}


class TestTorch:
    holder = "utils/torch_internals.py"

    def test_every_operation_is_seen(self) -> None:
        base = inside("torch", self.holder, "torch.utils._python_dispatch", "TorchDispatchMode")
        seen = []

        class Mode(base):  # type: ignore[misc, valid-type]
            def __torch_dispatch__(
                self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
            ) -> Any:
                seen.append(str(operation))
                return operation(*args, **(kwargs or {}))

        with Mode(), torch.no_grad():
            nn.Linear(2, 3)(torch.zeros(1, 2))
        assert "aten.addmm.default" in seen

    def test_nests(self) -> None:
        pytree = inside("torch", self.holder, "torch.utils", "_pytree")
        nest = {"a": [1, (2, 3)]}
        assert pytree.tree_leaves(nest) == [1, 2, 3]
        assert pytree.tree_map(lambda leaf: leaf + 1, nest) == {"a": [2, (3, 4)]}

    @pytest.mark.parametrize(
        ("path", "instance"),
        [
            ("modules.conv._ConvNd", nn.ConvTranspose1d(1, 1, 1)),
            ("modules.batchnorm._BatchNorm", nn.BatchNorm3d(1)),
            ("modules.batchnorm._NormBase", nn.InstanceNorm2d(1)),
        ],
    )
    def test_kinds_of_layers(self, path: str, instance: nn.Module) -> None:
        assert isinstance(instance, inside("torch", self.holder, "torch.nn", *path.split(".")))

    def test_what_a_module_holds(self) -> None:
        from rlprune.utils.torch_internals import buffer_slots, parameter_slots, twin, unsaved_buffers

        net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.BatchNorm1d(2))
        net[1].register_buffer("scratch", torch.ones(2), persistent=False)
        for name in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            assert name in net.__dict__, (
                f"torch {torch.__version__}: modules have no {name} any more ({self.holder})"
            )
        assert list(parameter_slots(net[0])) == ["weight", "bias"] and parameter_slots(net[0])["bias"] is None
        parameter_slots(net[0])["weight"] = nn.Parameter(torch.zeros(3, 2))
        buffer_slots(net[1])["scratch"] = torch.zeros(2)
        assert net[0].weight.shape == (3, 2) and not net[1].scratch.any()
        assert unsaved_buffers(net) == {"1.scratch"} == set(dict(net.named_buffers())) - set(net.state_dict())
        memo = {id(t): t.clone() for t in [*net.parameters(), *net.buffers()]}
        copied = twin(net, memo)
        assert copied is not net and copied[1] is not net[1] and copied[0].weight is memo[id(net[0].weight)]


class TestTransformers:
    holder = "pruning/transformers_internals.py"

    @pytest.mark.parametrize(
        ("path", "names"),
        [
            ("Trainer._get_train_sampler", ("self", "train_dataset")),
            ("Trainer._save", ("self", "output_dir", "state_dict")),
            ("Trainer._load_from_checkpoint", ("self", "resume_from_checkpoint", "model")),
        ],
    )
    def test_hooks_of_the_trainer(self, path: str, names: tuple[str, ...]) -> None:
        takes(inside("transformers", self.holder, "transformers", *path.split(".")), *names)

    def test_attributes(self) -> None:
        inside("transformers", self.holder, "transformers", "PreTrainedModel", "_no_split_modules")
        arguments = inside("transformers", self.holder, "transformers", "TrainingArguments")
        assert "_n_gpu" in inspect.getsource(arguments), (
            f"TrainingArguments has no _n_gpu any more ({self.holder})"
        )

    def test_caches_that_count_tokens_without_width(self) -> None:
        holder = "language/dropped.py"
        layer = inside("transformers", holder, "transformers.cache_utils", "DynamicLayer")
        inside("transformers", holder, "transformers.cache_utils", "DynamicLayer", "_layer_type")
        empty = layer()
        assert not empty.is_initialized
        empty.update(torch.zeros(1, 1, 3, 2), torch.zeros(1, 1, 3, 2))
        assert empty.is_initialized and empty.keys.shape == (1, 1, 3, 2) and empty.get_seq_length() == 3


class TestModelOpt:
    holder = "agents/modelopt_internals.py"

    def test_a_hyperparameter_and_what_counts_costs(self) -> None:
        pytest.importorskip("modelopt")
        from rlprune.agents.modelopt_internals import ChannelSearchSpace

        package = "nvidia-modelopt"
        kind = inside(package, self.holder, "modelopt.torch.opt.hparam", "Hparam")
        for name in ("choices", "active", "min", "max", "is_configurable"):
            assert isinstance(getattr(kind, name, None), property), f"a hyperparameter has no {name} any more"
        assert "_is_configurable" in inspect.getsource(kind)
        constraints = inside(package, self.holder, "modelopt.torch.nas.algorithms", "ConstraintsFunc")
        assert isinstance(constraints.constraint_eval_funcs, property)
        mapping = inside(
            package, self.holder, "modelopt.torch.nas.algorithms", "MODULE_TYPE_TO_CONSTRAINTS_FUNC"
        )
        before = dict(mapping)
        takes(inside(package, self.holder, "modelopt.torch.nas.utils", "sample"), "model", "sample_func")
        net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Conv2d(6, 2, 3))
        found = ChannelSearchSpace(net, 4, 2)
        assert found.choices() == {"0.out_channels": [2, 4, 6, 8], "2.out_channels": [2, 4, 6]}
        found.fix("2.out_channels")
        asked = []

        def active() -> int:
            return found.channels()["0"][0]

        def score() -> float:
            asked.append(active())
            return -1.0 / active()

        found.search(score, lambda: float(active()), 5.0)
        assert asked == [8, 2, 4, 6], "the whole model, then every choice, the smallest first"
        assert found.channels() == {"0": (4, 8), "2": (6, 6), "4": (2, 2)} and net[0].out_channels == 8
        assert mapping == before
