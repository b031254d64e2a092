"""The group policy: shared over groups, blind to padding, portable without a pickle."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
import torch
from gymnasium import spaces

from helpers.synthetic import FakeEvaluator, make_synthetic_task
from rlprune.agents.ppo.policy import (
    GroupPolicy,
    PolicyTransferWarning,
    PortablePolicy,
    load_policy,
    portable_state,
    provenance,
    save_policy,
)
from rlprune.envs.distribution import DistributionEnv
from rlprune.envs.observation import BOUND, FEATURE_VERSIONS
from rlprune.errors import ArtifactError

F = len(FEATURE_VERSIONS[1])


def make_policy(groups: int = 6, **kwargs) -> GroupPolicy:
    torch.manual_seed(0)
    observation = spaces.Box(-BOUND, BOUND, (groups * F,), np.float32)
    action = spaces.Box(-1.0, 1.0, (groups,), np.float32)
    return GroupPolicy(observation, action, lambda _: 1e-3, hidden=16, **kwargs)


def trained(policy: GroupPolicy) -> GroupPolicy:
    """Weights as if something had been learned."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in policy.network.parameters():
            p.add_(0.3 * torch.randn_like(p))
    policy.provenance = provenance([make_synthetic_task(6)])
    return policy


def table(groups: int, seed: int = 0) -> torch.Tensor:
    values = torch.from_numpy(np.random.default_rng(seed).normal(size=(groups, F)).astype(np.float32))
    values[:, 0] = 1.0
    return values


def test_the_first_policy_is_the_base_rule():
    env = DistributionEnv(tasks=[make_synthetic_task(6)])
    obs, _ = env.reset(seed=0)
    action, _ = make_policy().predict(obs, deterministic=True)
    assert not action.any()
    assert (env.step(action)[4]["widths"] == env.task.uniform_widths(0.5)).all()


def test_padding_changes_nothing():
    small, large = make_policy(6), make_policy(9)
    large.network.load_state_dict(trained(small).network.state_dict())
    rows = table(6)
    padded = torch.cat([rows, torch.zeros(3, F)])
    a, b = rows.reshape(1, -1), padded.reshape(1, -1)
    assert torch.allclose(small.predict_values(a), large.predict_values(b), atol=1e-6)
    mean_small, mean_large = small.get_distribution(a).mode(), large.get_distribution(b).mode()
    assert torch.allclose(mean_small, mean_large[:, :6], atol=1e-6)
    assert not mean_large[:, 6:].any()
    action = torch.randn(1, 6)
    _, log_small, entropy_small = small.evaluate_actions(a, action)
    _, log_large, entropy_large = large.evaluate_actions(b, torch.cat([action, torch.randn(1, 3)], dim=1))
    assert torch.allclose(log_small, log_large, atol=1e-5)
    assert torch.allclose(entropy_small, entropy_large, atol=1e-5)
    assert not large.get_distribution(b).sample()[:, 6:].any()


def test_log_probability_is_that_of_independent_normals():
    policy = trained(make_policy(4))
    obs = table(4).reshape(1, -1)
    actions, _, log_prob = policy(obs)
    normal = torch.distributions.Normal(policy.get_distribution(obs).mode(), policy.log_std.exp())
    assert torch.allclose(log_prob, normal.log_prob(actions).sum(dim=1), atol=1e-5)


def test_groups_are_interchangeable():
    policy = trained(make_policy(6, group_bias=False))
    rows, order = table(6), torch.randperm(6)
    first = policy.get_distribution(rows.reshape(1, -1)).mode()[0]
    second = policy.get_distribution(rows[order].reshape(1, -1)).mode()[0]
    assert torch.allclose(first[order], second, atol=1e-5)
    assert first.std() > 1e-3


def test_one_log_std_for_all_groups_and_none_of_the_bias_in_the_file():
    policy = trained(make_policy(6))
    assert policy.log_std.shape == ()
    assert policy.bias is not None
    with torch.no_grad():
        policy.bias += 1.0
    tensors, _ = portable_state(policy)
    assert set(tensors) == set(policy.network.state_dict())
    assert all(6 not in t.shape for t in tensors.values()), (
        "nothing in the file depends on the number of groups"
    )


def test_the_file_gives_the_same_plan_back(tmp_path):
    policy = trained(make_policy(6, group_bias=False))
    save_policy(policy, tmp_path / "policy")
    json.dumps(portable_state(policy)[1])
    loaded = load_policy(tmp_path / "policy")
    task = make_synthetic_task(6)
    env = DistributionEnv(tasks=[task])
    obs, _ = env.reset(seed=0)
    action, _ = policy.predict(obs, deterministic=True)
    widths = task.space.project(loaded.distribution(task, 0.5), 0.5)
    assert (widths == task.widths(action, 0.5)).all()
    assert (widths != task.uniform_widths(0.5)).any()
    assert not list(tmp_path.rglob("*.p*k*l")) and not list(tmp_path.rglob("*.zip"))


def test_other_depths_are_warned_about_and_foreign_kinds_refused():
    policy = PortablePolicy.from_state(*portable_state(trained(make_policy(6))))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same = policy.distribution(make_synthetic_task(6, 3), 0.4)
    assert same.shape == (6,)
    with pytest.warns(PolicyTransferWarning, match="another architecture"):
        assert policy.distribution(make_synthetic_task(9), 0.5).shape == (9,)
    policy.meta["kinds"] = ["attention"]
    with pytest.raises(ArtifactError, match="attention"):
        policy.distribution(make_synthetic_task(6), 0.5)


def test_an_evaluator_is_enough_and_the_plan_comes_from_it():
    class Planner(FakeEvaluator):
        def plan(self, widths, origin):
            return tuple(widths), origin

    policy = PortablePolicy.from_state(*portable_state(trained(make_policy(6))))
    evaluator = Planner(6)
    widths, origin = policy.plan(evaluator, budget=0.3)
    assert evaluator.space.cost(np.array(widths)) <= 0.3 * evaluator.space.dense_cost()
    assert origin["agent"] == "policy"
    assert evaluator.calls == 0, "applying a policy is no search"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t, m: m.update(format="zip"), "format"),
        (lambda t, m: m.update(format_version=99), "format_version 99"),
        (lambda t, m: m.update(feature_version=0), "features"),
        (lambda t, m: m.update(features=m["features"][:-1]), "features"),
        (lambda t, m: m.update(hidden="64"), "hidden"),
        (lambda t, m: m.update(hidden=32), "shape"),
        (lambda t, m: m.update(action_scale=3.0), "action_scale"),
        (lambda t, m: m.pop("base_rule"), "base_rule"),
        (lambda t, m: t.pop("log_std"), "'log_std' is missing"),
        (lambda t, m: t.update(extra=torch.zeros(1)), "'extra' is unknown"),
        (lambda t, m: t["log_std"].fill_(float("nan")), "NaN"),
    ],
)
def test_what_does_not_fit_is_refused(change, words):
    tensors, meta = portable_state(trained(make_policy(6)))
    PortablePolicy.from_state(tensors, meta)
    change(tensors, meta)
    with pytest.raises(ArtifactError, match=words):
        PortablePolicy.from_state(tensors, meta)
