"""The environments on a real workload: Gymnasium's and stable-baselines3's checkers, stages, rendering."""

from __future__ import annotations

import warnings

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env as gymnasium_check
from stable_baselines3.common.env_checker import check_env as sb3_check

import rlprune
from helpers.small import SMALL_RUN


@pytest.fixture(scope="module")
def workload():
    return rlprune.build_workload(rlprune.load_config("digits", SMALL_RUN))


@pytest.mark.parametrize("name", ["rlprune/Distribution-v0", "rlprune/Sequential-v0"])
def test_both_checkers_pass_without_a_warning(workload, name):
    env = gymnasium.make(name, workload=workload, budget=0.5, render_mode="rgb_array")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gymnasium_check(env.unwrapped)
        sb3_check(env.unwrapped)


@pytest.mark.parametrize("name", ["rlprune/Distribution-v0", "rlprune/Sequential-v0"])
def test_an_episode_ends_in_a_scored_plan_within_the_budget(workload, name):
    env = gymnasium.make(name, workload=workload, budget=0.5, render_mode="rgb_array")
    scores = []
    for _ in range(2):
        env.reset(seed=1)
        env.action_space.seed(1)
        done, info, total = False, {}, 0.0
        while not done:
            _, reward, done, truncated, info = env.step(env.action_space.sample())
            total += float(reward)
            assert not truncated
        space = rlprune.trace(workload.model, workload.example_inputs)
        assert info["cost"] == space.cost(np.array(info["widths"])) <= 0.5 * space.dense_cost()
        assert info["score"] < 0 and 0 <= info["metric"] <= 1 and info["seconds"] >= 0
        scores.append((info["score"], total))
    assert scores[0] == scores[1]
    image = env.render()
    assert image.dtype == np.uint8 and image.ndim == 3 and image.std() > 0


def test_stages_prune_a_little_more_each_time(workload):
    env = gymnasium.make("rlprune/Distribution-v0", workload=workload, budget=0.4, stages=3)
    env.reset(seed=0)
    rewards, costs = [], []
    for stage in range(3):
        _, reward, done, _, info = env.step(np.zeros(env.action_space.shape, dtype=np.float32))
        rewards.append(float(reward))
        costs.append(info["cost"])
        assert done == (stage == 2)
    space = rlprune.trace(workload.model, workload.example_inputs)
    dense = space.dense_cost()
    assert costs[0] > costs[1] > costs[2] and costs[2] <= 0.4 * dense < costs[1]
    assert np.isfinite(rewards).all()
