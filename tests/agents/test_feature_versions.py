"""What a policy sees of a group, by version: old policies see what they saw, and images lose nothing.

`data/policy_v1` holds two policies of the code that knew version 1 only, of a task with an image model's kinds of
groups and of one with a language model's, beside the rows that this code showed and the plans that it made of them.
"""

from __future__ import annotations

import json
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from stable_baselines3.common.env_checker import check_env as sb3_check_env

from helpers.synthetic import FakeAccount, make_language_task, make_synthetic_task
from rlprune.agents import SearchRequest, StateDir, make_agent
from rlprune.agents.ppo.policy import PolicyTransferWarning, PortablePolicy, load_policy, portable_state
from rlprune.config.search import PPOConfig, SearchConfig
from rlprune.envs.distribution import DistributionEnv
from rlprune.envs.observation import FEATURE_VERSIONS, feature_version
from rlprune.errors import ArtifactError

OLD = Path(__file__).parent.parent / "data" / "policy_v1"
TASKS = {"image": make_synthetic_task, "language": make_language_task}
SETTINGS = SearchConfig(
    ppo=PPOConfig(hidden=8, n_steps=8, batch_size=8, surrogate_steps=256, surrogate_envs=32), batch=8
)
ENVIRONMENTS = ("rlprune/Distribution-v0", "rlprune/Sequential-v0")


def known(name):
    return json.loads((OLD / "expected.json").read_text(encoding="utf-8"))[name]


def search(task, account, **kwargs):
    return make_agent("ppo", SETTINGS).search(SearchRequest([task], [account], seed=1, **kwargs))


def kind_columns(task, version):
    """{kind: the column's values (G,)} of a task's rows."""
    names = FEATURE_VERSIONS[version]
    table = task.observe(0.5)
    assert table.shape == (len(task.space.groups), len(names)) and task.features == names
    return {n.removeprefix("kind_"): table[:, i] for i, n in enumerate(names) if n.startswith("kind_")}


@pytest.mark.parametrize("name", TASKS)
def test_version_1_shows_the_rows_that_it_always_showed(name):
    task = TASKS[name](6).showing(1)
    cut = task.uniform_widths(0.6)
    np.testing.assert_allclose(task.observe(0.5, cut), np.array(known(name)["rows"]), rtol=1e-5, atol=1e-6)


def test_image_models_are_shown_version_1():
    assert make_synthetic_task(6).feature_version == 1
    kinds = kind_columns(make_synthetic_task(6), 1)
    assert set(kinds) == {"conv", "linear", "depthwise", "grouped", "residual", "other"}
    assert not kinds["other"].any() and (kinds["conv"] + kinds["residual"] == 1).all()


def test_a_language_model_shows_its_kinds():
    task = make_language_task(8)
    kinds = kind_columns(task, 2)
    for kind in ("attention", "ffn", "hidden"):
        assert kinds[kind].tolist() == [float(g.kind == kind) for g in task.space.groups]
        assert kinds[kind].any()
    assert not kinds["other"].any()
    # But for the kinds nothing differs.
    one, two = FEATURE_VERSIONS[1], FEATURE_VERSIONS[2]
    same = [n for n in one if not n.startswith("kind_")]
    before, now = task.showing(1).observe(0.5), task.observe(0.5)
    assert (before[:, [one.index(n) for n in same]] == now[:, [two.index(n) for n in same]]).all()


def test_a_kind_that_no_version_names_asks_for_no_newer_one():
    space = make_synthetic_task(4).space
    odd = [type(g)(**{**vars(g), "kind": "spline"}) for g in space.groups]
    other = type(space)(tuple(odd), {}, "odd", (), (), (), space.costs)
    assert feature_version([other]) == 1
    assert feature_version([other, make_language_task(4).space]) == 2


@pytest.mark.parametrize("id", ENVIRONMENTS)
@pytest.mark.parametrize("make", [lambda: [make_language_task(6)], lambda: [make_synthetic_task(6)]])
def test_the_environments_are_as_wide_as_their_tasks_ask(id, make):
    env = gymnasium.make(id, tasks=make()).unwrapped
    check_env(env, skip_render_check=True)
    sb3_check_env(env)
    assert env.features == env.task.features
    assert env.observation_space.contains(env.reset(seed=0)[0])


@pytest.mark.parametrize("id", ENVIRONMENTS)
def test_tasks_of_both_kinds_show_the_same_columns(id):
    tasks = [make_synthetic_task(6), make_language_task(6)]
    env = gymnasium.make(id, tasks=tasks).unwrapped
    sb3_check_env(env)
    assert [task.feature_version for task in env.tasks] == [2, 2]
    for index in range(2):
        assert env.observation_space.contains(env.reset(options={"task": index})[0])


@pytest.mark.parametrize("name", TASKS)
def test_an_old_policy_makes_its_old_plans(name):
    policy, expected = load_policy(OLD / name), known(name)
    assert policy.feature_version == 1
    for budget, widths in expected["widths"].items():
        assert policy.widths(TASKS[name](6), float(budget)).tolist() == widths
    with pytest.warns(PolicyTransferWarning, match="another architecture"):
        assert policy.widths(TASKS[name](9, 1), 0.5).tolist() == expected["other"]


@pytest.mark.parametrize("mode", ["surrogate", "direct"])
@pytest.mark.parametrize("name", TASKS)
def test_an_old_policy_is_trained_on_in_its_own_version(name, mode):
    old = load_policy(OLD / name)
    task = TASKS[name](6, 1)
    account = FakeAccount(task.evaluator, 12)
    settings = SearchConfig(ppo=SETTINGS.ppo, batch=8, mode=mode)
    found = make_agent("ppo", settings).search(SearchRequest([task], [account], seed=1, policy=old)).policy
    assert next(iter(account.seen)) == tuple(known(name)["first"])
    assert account.spent == 12
    before, after = old.network.state_dict(), found.network.state_dict()
    assert all(before[key].shape == after[key].shape for key in before)
    trained = [key for key in before if (before[key] != after[key]).any()]
    assert set(trained) > {"log_std"}, "the deviation is always set anew"
    again = PortablePolicy.from_state(*portable_state(found))
    assert again.feature_version == 1
    assert again.meta["features"] == list(FEATURE_VERSIONS[1])
    assert again.widths(TASKS[name](6), 0.4).shape == (6,)


def test_a_new_policy_of_a_language_model_says_and_sees_version_2():
    task = make_language_task(6)
    found = search(task, FakeAccount(task.evaluator, 24), starts=[[task.uniform_widths(0.5)]])
    tensors, meta = portable_state(found.policy)
    assert (meta["feature_version"], meta["features"]) == (2, list(FEATURE_VERSIONS[2]))
    policy = PortablePolicy.from_state(tensors, meta)
    obs, _ = DistributionEnv(tasks=[task]).reset(seed=0)
    found.policy.bias.data.zero_()
    action, _ = found.policy.predict(obs, deterministic=True)
    assert (policy.widths(task, 0.5) == task.widths(action, 0.5)).all()
    # The kinds are read: without them the answer is another one.
    table = task.observe(0.5)
    blind = table.copy()
    blind[:, [i for i, n in enumerate(FEATURE_VERSIONS[2]) if n.startswith("kind_")]] = 0.0
    assert np.abs(policy.action(table) - policy.action(blind)).max() > 1e-3


@pytest.mark.parametrize(
    ("name", "other"), [("image", make_language_task), ("language", make_synthetic_task)]
)
def test_a_policy_of_the_other_side_is_refused(name, other):
    with pytest.raises(ArtifactError, match=r"^policy: trained on groups of kind .*; this model has only"):
        load_policy(OLD / name).widths(other(6), 0.5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.update(feature_version=4), r"features of version 4; this program shows 1, 2, 3"),
        (lambda m: m.pop("feature_version"), r"features of version None"),
        (lambda m: m.update(feature_version=2), r"its features are not those of version 2"),
    ],
)
def test_features_that_cannot_be_shown_are_refused(change, words):
    policy = load_policy(OLD / "language")
    change(policy.meta)
    with pytest.raises(ArtifactError, match=words):
        PortablePolicy.from_state(policy.network.state_dict(), policy.meta)


def test_a_state_from_before_the_versions_is_continued_for_images_and_refused_for_language_models(tmp_path):
    for name, make in TASKS.items():
        state = StateDir(tmp_path, name)
        task = make(6)
        with pytest.raises(KeyboardInterrupt):
            search(task, FakeAccount(task.evaluator, 24, 20), state=state)
        saved = state.load()
        del saved["identity"]["feature_version"]
        state.save(saved)
    task = make_synthetic_task(6)
    whole, resumed = FakeAccount(task.evaluator, 24), FakeAccount(task.evaluator, 24)
    search(task, whole)
    search(task, resumed, state=StateDir(tmp_path, "image"))
    assert list(resumed.seen) == list(whole.seen)
    task = make_language_task(6)
    with pytest.raises(ArtifactError, match=r"other settings \(feature_version differ\)"):
        search(task, FakeAccount(task.evaluator, 24), state=StateDir(tmp_path, "language"))
