"""The environments: Gymnasium's and stable-baselines3's contracts, exact budgets, a fixed reward scale."""

from __future__ import annotations

import warnings

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.env_checker import check_env as sb3_check_env
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv

import rlprune  # noqa: F401 - registers the environments
from helpers.synthetic import FakeAccount, FakeEvaluator, make_synthetic_task
from rlprune.envs.observation import BOUND, FEATURE_VERSIONS
from rlprune.envs.reward import CLIP, RewardScaleWarning, reward_scale
from rlprune.envs.task import Task, deviate
from rlprune.errors import BudgetError, ConfigError

FEATURES = FEATURE_VERSIONS[1]
DISTRIBUTION, SEQUENTIAL = "rlprune/Distribution-v0", "rlprune/Sequential-v0"
CASES = [
    (DISTRIBUTION, {}),
    (DISTRIBUTION, {"stages": 3}),
    (DISTRIBUTION, {"max_groups": 9}),
    (SEQUENTIAL, {}),
]


def two_tasks() -> list[Task]:
    return [make_synthetic_task(6), make_synthetic_task(5, 1, (0.3, 0.7))]


@pytest.mark.parametrize(("name", "kwargs"), CASES)
def test_both_checkers_pass_without_a_warning(name, kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = gymnasium.make(name, tasks=two_tasks(), render_mode="rgb_array", **kwargs)
        check_env(env.unwrapped)
        sb3_check_env(env.unwrapped)


@pytest.mark.parametrize(("name", "kwargs"), CASES)
def test_the_seed_decides_tasks_budgets_and_outcomes(name, kwargs):
    def play(seed):
        env = gymnasium.make(name, tasks=two_tasks(), **kwargs).unwrapped
        env.action_space.seed(seed)
        seen = []
        obs, info = env.reset(seed=seed)
        for _ in range(30):
            seen.append((obs.tobytes(), info["task"], info["budget"]))
            obs, reward, done, _, info = env.step(env.action_space.sample())
            seen.append((reward, tuple(info["widths"])))
            if done:
                obs, info = env.reset()
        return seen

    assert play(3) == play(3)
    assert play(3) != play(4)
    budgets = {b for _, task, b in (s for s in play(3) if len(s) == 3) if task == 1}
    assert len(budgets) > 1, "the budget of a range is drawn anew at every reset"


@pytest.mark.parametrize("name", [DISTRIBUTION, SEQUENTIAL])
def test_every_plan_meets_its_budget_and_no_step_more_fits(name):
    env = gymnasium.make(name, tasks=two_tasks()).unwrapped
    env.action_space.seed(0)
    env.reset(seed=0)
    for _ in range(40):
        done, info = False, {}
        while not done:
            _, _, done, _, info = env.step(env.action_space.sample())
        space = env.task.space
        assert info["cost"] == space.cost(info["widths"]) <= info["budget"]
        for g in range(len(space.groups)):
            wider = info["widths"].copy()
            wider[g] += 1
            assert wider[g] > space.widths[g] or space.cost(wider) > info["budget"]
        env.reset()


@pytest.mark.parametrize("action", [-1.0, 1.0])
def test_sequential_stays_within_reach_of_the_budget_at_both_extremes(action):
    env = gymnasium.make(SEQUENTIAL, tasks=[make_synthetic_task(6, budget=0.4)]).unwrapped
    env.reset(seed=0)
    done, info = False, {}
    while not done:
        _, _, done, _, info = env.step(np.array([action], dtype=np.float32))
    assert 0.97 * info["budget"] < info["cost"] <= info["budget"]


def test_action_zero_is_the_base_rule_and_a_shift_changes_nothing():
    env = gymnasium.make(DISTRIBUTION, tasks=[make_synthetic_task(6)]).unwrapped
    env.reset(seed=0)
    _, reward, done, _, info = env.step(np.zeros(6, dtype=np.float32))
    assert done
    assert reward == 0.0, "uniform pruning is the zero of the scale"
    assert (info["widths"] == env.task.uniform_widths(0.5)).all()
    env.reset()
    shifted = env.step(np.full(6, 0.7, dtype=np.float32))[4]
    assert (shifted["widths"] == info["widths"]).all()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-1, 1), min_size=4, max_size=4), st.floats(-1, 1))
def test_deviation_follows_its_formula(action, shift):
    base = np.array([0.0, 1.0, 2.0, 5.0])
    a = np.array(action)
    expected = np.maximum(base, 0.05 * 2.0) * np.exp(1.5 * (a - a.mean()))
    np.testing.assert_allclose(deviate(base, a), expected)
    np.testing.assert_allclose(deviate(base, a + shift), expected, rtol=1e-9)
    np.testing.assert_allclose(deviate(base, np.stack([a, a]))[1], expected)


def test_stages_never_give_back_and_their_rewards_add_up():
    task = make_synthetic_task(6, budget=0.4)
    account = FakeAccount(task.evaluator, 100)
    env = gymnasium.make(DISTRIBUTION, tasks=[task.with_scorer(account)], stages=3).unwrapped
    env.action_space.seed(1)
    env.reset(seed=1)
    total, before, costs, done = 0.0, task.space.widths, [], False
    while not done:
        _, reward, done, _, info = env.step(env.action_space.sample())
        assert (info["widths"] <= before).all()
        before, total = info["widths"], total + reward
        costs.append(info["cost"] / task.space.dense_cost())
    assert total == pytest.approx(task.scale(0.4)(info["score"]))
    assert [c <= bound for c, bound in zip(costs, (0.8, 0.6, 0.4), strict=True)] == [True] * 3
    assert costs[0] > 0.75
    assert costs[1] > 0.55
    assert account.spent == 1 + 3, "uniform for the scale, and one evaluation for each stage"


def test_padding_is_masked_and_features_have_no_scale():
    task = make_synthetic_task(5)
    env = gymnasium.make(DISTRIBUTION, tasks=[task], max_groups=8).unwrapped
    obs, _ = env.reset(seed=0)
    table = obs.reshape(8, len(FEATURES))
    assert table[:, 0].tolist() == [1.0] * 5 + [0.0] * 3
    assert not table[5:].any()
    assert np.abs(table).max() <= BOUND
    bigger = make_synthetic_task(5)
    for scores in bigger.evaluator.importance:
        scores *= 1000.0  # importances in another unit are the same importances
    np.testing.assert_allclose(bigger.observe(0.5), task.observe(0.5), atol=1e-4)


def test_padded_actions_do_not_matter():
    env = gymnasium.make(DISTRIBUTION, tasks=[make_synthetic_task(5)], max_groups=8).unwrapped
    action = np.linspace(-1, 1, 8).astype(np.float32)
    env.reset(seed=0)
    first = env.step(action)[4]["widths"]
    action[5:] = -1.0
    env.reset(seed=0)
    assert (env.step(action)[4]["widths"] == first).all()


def test_sensitivity_features_are_charged():
    evaluator = FakeEvaluator(5)
    account = FakeAccount(evaluator, 100)
    task = Task(evaluator, 0.5, scorer=account, sensitivity=(0.25, 0.5))
    table = task.observe(0.5)
    assert account.spent == 10
    column = table[:, FEATURES.index("sensitivity_2")]
    assert column.argmax() == evaluator.weights.argmax()
    assert not make_synthetic_task(5).observe(0.5)[:, FEATURES.index("sensitivity_2")].any()


def test_reward_scale():
    scale = reward_scale(-0.5, -0.1, 0.01, lambda: pytest.fail("the rules are not needed"))
    assert scale(-0.5) == 0.0
    assert scale(-0.1) == pytest.approx(1.0)
    assert scale(-9.0) == CLIP
    with pytest.warns(RewardScaleWarning, match="spread of the rules"):
        scale = reward_scale(-0.1, -0.0999, 0.02, lambda: [-0.3, -0.2])
    assert scale.unit == pytest.approx(0.2)
    with pytest.warns(RewardScaleWarning):
        assert reward_scale(0.0, 0.0, 0.0, list).unit == pytest.approx(1e-3)


def test_render_is_an_image_that_changes_with_the_widths():
    env = gymnasium.make(DISTRIBUTION, tasks=[make_synthetic_task(6)], render_mode="rgb_array").unwrapped
    env.reset(seed=0)
    before = env.render()
    env.step(np.linspace(-1, 1, 6).astype(np.float32))
    after = env.render()
    assert before.shape == after.shape == (480, 800, 3)
    assert after.dtype == np.uint8
    assert (before != after).any()


def test_snapshot_and_restore_continue_the_same_episode():
    def play(env, actions):
        return [env.step(a)[1] for a in actions]

    rng = np.random.default_rng(0)
    actions = rng.uniform(-1, 1, size=(4, 6)).astype(np.float32)
    env = gymnasium.make(DISTRIBUTION, tasks=[make_synthetic_task(6)], stages=4).unwrapped
    env.reset(seed=5)
    head = play(env, actions[:2])
    saved = env.snapshot()
    tail = play(env, actions[2:])
    other = gymnasium.make(DISTRIBUTION, tasks=[make_synthetic_task(6)], stages=4).unwrapped
    other.reset(seed=99)
    other.restore(saved)
    assert play(other, actions[2:]) == tail
    assert other.np_random.random() == env.np_random.random()
    assert len(head) == 2


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({}, ConfigError, "workload"),
        ({"tasks": []}, ConfigError, "at least one task"),
        ({"tasks": two_tasks(), "stages": 0}, ConfigError, "stages"),
        ({"tasks": two_tasks(), "max_groups": 3}, ConfigError, "max_groups: 3 is less than the 6"),
        ({"tasks": two_tasks(), "render_mode": "ascii"}, ConfigError, "rgb_array"),
    ],
)
def test_wrong_arguments_are_named(arguments, error, words):
    from rlprune.envs.distribution import DistributionEnv

    with pytest.raises(error, match=words):
        DistributionEnv(**arguments)


def test_impossible_budgets_are_refused_at_once():
    with pytest.raises(BudgetError, match="feasible"):
        make_synthetic_task(6, budget=0.0001)
    with pytest.raises(BudgetError, match="lower one first"):
        make_synthetic_task(6, budget=(0.7, 0.3))
    with pytest.raises(BudgetError, match="pair"):
        make_synthetic_task(6, budget=(0.3, 0.5, 0.7))


def make_env():
    return gymnasium.make(DISTRIBUTION, tasks=two_tasks())


@pytest.mark.parametrize("agent", [PPO, A2C])
def test_stock_agents_learn_on_a_vectorised_environment(agent):
    env = DummyVecEnv([make_env, make_env])
    more = {"batch_size": 16} if agent is PPO else {}  # a whole rollout
    model = agent("MlpPolicy", env, n_steps=8, seed=0, device="cpu", **more)
    before = [p.detach().clone() for p in model.policy.parameters()]
    model.learn(32)
    assert any((a != b).any() for a, b in zip(before, model.policy.parameters(), strict=True))


def test_subprocess_environments_agree_with_ours():
    vec = SubprocVecEnv([make_env, make_env], start_method="fork")
    try:
        vec.seed(7)
        obs = vec.reset()
        _, rewards, dones, infos = vec.step(np.zeros((2, 6), dtype=np.float32))
    finally:
        vec.close()
    env = make_env().unwrapped
    expected, _ = env.reset(seed=7)
    np.testing.assert_array_equal(obs[0], expected)
    assert rewards[0] == pytest.approx(env.step(np.zeros(6, dtype=np.float32))[1])
    assert dones.all()
    assert {"widths", "cost", "metric", "score", "seconds"} <= set(infos[0])
