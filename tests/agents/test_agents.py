"""The agents: they spend exactly what they have, learn, and resume to the same result after any interruption."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from helpers.synthetic import FakeAccount, FakeEvaluator, make_synthetic_task
from rlprune.agents import AGENTS, SearchRequest, StateDir, make_agent
from rlprune.agents.ppo import surrogate_training
from rlprune.agents.ppo.policy import PortablePolicy, portable_state
from rlprune.agents.ppo.surrogate_env import SurrogateVecEnv
from rlprune.config.search import (
    AMCConfig,
    GPConfig,
    PPOConfig,
    SB3Config,
    SearchConfig,
    SequentialPPOConfig,
)
from rlprune.envs.distribution import DistributionEnv
from rlprune.envs.task import Task
from rlprune.errors import ArtifactError, ConfigError
from rlprune.evaluation.ledger import BudgetExhausted
from rlprune.surrogates.proposals import choose_batch, climb, neighbours, random_plans
from rlprune.surrogates.score_gp import ScoreGP

SMALL = PPOConfig(hidden=8, n_steps=8, batch_size=8, n_epochs=2, surrogate_steps=256, surrogate_envs=32)
# Agents without a policy that look for one best plan; a range of budgets is refused.
ONE_BUDGET = ("cma_es", "tpe", "gp", "evopress", "rl_pruner", "bypass")
CONFIGS = {
    "random": ("random", SearchConfig(ppo=SMALL)),
    "surrogate": ("ppo", SearchConfig(ppo=SMALL, batch=8)),
    "ahead": ("ppo", SearchConfig(ppo=SMALL, batch=5, ahead=2)),
    "untrained": ("ppo", SearchConfig(ppo=replace(SMALL, surrogate_steps=0), batch=8)),
    "direct": ("ppo", SearchConfig(ppo=SMALL, mode="direct")),
    "staged": ("ppo", SearchConfig(ppo=SMALL, mode="direct", stages=2)),
    "ppo_staged": ("ppo_stages", SearchConfig(ppo=SMALL)),
    "ppo_sequential": ("ppo_sequential", SearchConfig(ppo_sequential=SequentialPPOConfig(episodes=4))),
    "amc": ("amc", SearchConfig(amc=AMCConfig(hidden=16, batch_size=16))),
    **{name: (name, SearchConfig()) for name in ("sac", "td3", "a2c")},
    "sb3": ("sb3", SearchConfig(sb3=SB3Config(algorithm="PPO", arguments={"n_steps": 8, "batch_size": 8}))),
    "amc_several": ("amc", SearchConfig(amc=AMCConfig(hidden=16, batch_size=16), environments=3)),
    **{f"{name}_several": (name, SearchConfig(environments=4)) for name in ("sac", "a2c", "ppo_sequential")},
    "sb3_several": ("sb3", SearchConfig(sb3=SB3Config(algorithm="PPO"), environments=3)),
    # A fit of the process takes its time: most plans here come before the first one.
    **{name: (name, SearchConfig(gp=GPConfig(startup=18))) for name in ONE_BUDGET},
}
torch.set_num_threads(1)


def search(kind, tasks, accounts, *, starts=True, **kwargs):
    name, settings = CONFIGS[kind]
    plans = [[t.uniform_widths(t.budget if not t.is_range else t.budget[1])] for t in tasks] if starts else ()
    return make_agent(name, settings).search(SearchRequest(tasks, accounts, starts=plans, **kwargs))


def plans_of(account):
    return list(account.seen)


def test_every_registered_agent_keeps_the_contract():
    assert {name for name, _ in CONFIGS.values()} == {
        name for name, entry in AGENTS.items() if not entry.on_request
    }


@pytest.mark.parametrize("kind", CONFIGS)
def test_spends_the_account_and_returns_its_best_plan(kind):
    task = make_synthetic_task(6, budget=0.4)
    account = FakeAccount(task.evaluator, 40)
    seen = []
    result = search(kind, [task], [account], seed=1, progress=seen.append)
    assert account.spent == 40
    assert seen[-1].spent == seen[-1].limit == 40
    assert seen[-1].best_score == max(p.best_score for p in seen)
    widths = result.widths()
    assert task.space.cost(widths) <= task.space.target(0.4)
    scores = {key: c.score for key, c in account.seen.items()}
    assert result.best[0] in scores or result.best[0][0] in scores
    if "staged" not in kind:
        within = [c.score for c in account.history if c.cost <= task.space.target(0.4)]
        assert scores[result.best[0][0]] == max(within)
        assert plans_of(account)[0] == tuple(task.uniform_widths(0.4)), "the starts come first"


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_seed_decides_everything(kind):
    def history(seed):
        task = make_synthetic_task(6)
        account = FakeAccount(task.evaluator, 25)
        search(kind, [task], [account], seed=seed)
        return plans_of(account)

    assert history(1) == history(1)
    assert history(1) != history(2)


@pytest.mark.parametrize("kind", CONFIGS)
def test_interrupted_anywhere_and_resumed_is_the_same_search(kind, tmp_path):
    """Two tasks, a range of budgets; each interruption loses what was not saved, as a kill would."""
    second = 0.4 if kind in ONE_BUDGET else (0.3, 0.6)

    def make(stop=None):
        tasks = [make_synthetic_task(6), make_synthetic_task(6, 1, second)]
        return tasks, [FakeAccount(t.evaluator, 20, stop) for t in tasks]

    tasks, accounts = make()
    whole = search(kind, tasks, accounts, seed=3)
    expected = [plans_of(a) for a in accounts]

    rng = np.random.default_rng(0)
    state = StateDir(tmp_path / "state")
    for stop in sorted(rng.choice(np.arange(1, 20), size=4, replace=False)):
        tasks, accounts = make(int(stop))
        np.random.seed(int(stop))  # whatever the process did before must not matter
        torch.manual_seed(int(stop))
        with pytest.raises(KeyboardInterrupt):
            search(kind, tasks, accounts, seed=3, state=state)
    tasks, accounts = make()
    resumed = search(kind, tasks, accounts, seed=3, state=state)
    assert [plans_of(a) for a in accounts] == expected
    assert resumed.best == whole.best
    if whole.policy is not None:
        for a, b in zip(whole.policy.parameters(), resumed.policy.parameters(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("kind", ONE_BUDGET)
def test_a_range_of_budgets_is_refused_where_one_plan_is_wanted(kind):
    task = make_synthetic_task(6, budget=(0.3, 0.6))
    account = FakeAccount(task.evaluator, 10)
    with pytest.raises(ConfigError, match=rf"^search\.budget_range: the agent '{kind}' searches one budget"):
        search(kind, [task], [account])
    assert account.calls == 0


def test_a_resumed_search_goes_on_from_its_state_instead_of_starting_over(tmp_path, monkeypatch):
    from rlprune.agents.ppo.surrogate_training import SurrogateTrainer

    trained = []
    original = SurrogateTrainer.train
    monkeypatch.setattr(
        SurrogateTrainer, "train", lambda self, batch: (trained.append(batch), original(self, batch))
    )
    state = StateDir(tmp_path)
    task = make_synthetic_task(6)
    with pytest.raises(KeyboardInterrupt):
        search("surrogate", [task], [FakeAccount(task.evaluator, 40, 30)], state=state)
    assert trained == [1, 2, 3]
    trained.clear()
    search("surrogate", [task], [FakeAccount(task.evaluator, 40)], state=state)
    assert trained == [3, 4]


def test_the_state_of_another_search_is_refused(tmp_path):
    state = StateDir(tmp_path)
    task = make_synthetic_task(6)
    search("surrogate", [task], [FakeAccount(task.evaluator, 12)], seed=1, state=state)
    with pytest.raises(ArtifactError, match="seed differ"):
        search("surrogate", [task], [FakeAccount(task.evaluator, 12)], seed=2, state=state)


def test_state_files_are_replaced_whole_and_never_run_code(tmp_path):
    state = StateDir(tmp_path / "s")
    assert state.load() is None
    state.save({"a": torch.ones(2), "random": {"state": 2**100}, "calls": [((1, 2),)]})
    saved = state.load()
    assert saved is not None
    assert saved["random"]["state"] == 2**100
    assert saved["calls"] == [((1, 2),)]
    with pytest.raises(Exception, match="pickle|local"):
        state.save({"bad": lambda: None})
    assert torch.equal(state.load()["a"], torch.ones(2)), "a failed save leaves the old state"
    assert [f.name for f in (tmp_path / "s").iterdir()] == ["agent.pt"]
    state.file.write_bytes(state.file.read_bytes()[:100])
    with pytest.raises(ArtifactError, match="not a readable"):
        state.load()
    torch.save({"version": 1, "state": Task}, state.file)
    with pytest.raises(ArtifactError, match="not a readable"):
        state.load()


def test_surrogate_search_beats_random_search_and_uniform():
    gains = []
    for seed in (0, 1):
        best = {}
        for kind in ("random", "surrogate"):
            task = make_synthetic_task(8, seed, 0.3)
            account = FakeAccount(task.evaluator, 80)
            search(kind, [task], [account], seed=seed)
            best[kind] = account.best.score
        uniform = task.evaluator.evaluate(task.uniform_widths(0.3)).score
        assert best["surrogate"] > best["random"] > uniform
        gains.append((best["surrogate"] - uniform) / (best["random"] - uniform))
    assert min(gains) > 1.05


def test_ppo_moves_the_policy_to_where_the_surrogate_pays():
    task = make_synthetic_task(6, budget=0.3)
    account = FakeAccount(task.evaluator, 80)
    settings = SearchConfig(ppo=PPOConfig(hidden=32, surrogate_steps=3072), batch=20)
    policy = make_agent("ppo", settings).search(SearchRequest([task], [account], seed=0)).policy
    env = DistributionEnv(tasks=[task])
    obs, _ = env.reset(seed=0)
    _, reward, _, _, _ = env.step(policy.predict(obs, deterministic=True)[0])
    best = task.scale(0.3)(account.best.score)
    assert reward > 0.6 * best > 0


@pytest.mark.parametrize("kind", ["surrogate", "direct"])
def test_the_mode_of_the_returned_policy_has_been_scored(kind):
    task = make_synthetic_task(6)
    account = FakeAccount(task.evaluator, 41)
    policy = search(kind, [task], [account]).policy
    obs, _ = DistributionEnv(tasks=[task]).reset(seed=0)
    action, _ = policy.predict(obs, deterministic=True)
    assert action.any()
    assert tuple(task.widths(action, 0.5)) in account.seen


def test_several_tasks_share_one_policy_without_a_bias(monkeypatch):
    monkeypatch.setattr("rlprune.agents.ppo.behaviour_cloning._COMMON_STEPS", 20)
    tasks = [make_synthetic_task(6, s, (0.3, 0.6)) for s in range(2)]
    accounts = [FakeAccount(t.evaluator, 24) for t in tasks]
    result = search("surrogate", tasks, accounts)
    assert [a.spent for a in accounts] == [24, 24]
    assert len(result.best) == 2
    assert result.policy.bias is None
    assert result.policy.provenance["checkpoints"] == 2


def test_a_trained_policy_can_be_refined():
    task = make_synthetic_task(6)
    first = search("surrogate", [task], [FakeAccount(task.evaluator, 40)])
    portable = PortablePolicy.from_state(*portable_state(first.policy))
    other = make_synthetic_task(6, 5)
    account = FakeAccount(other.evaluator, 12)
    result = search("surrogate", [other], [account], starts=False, policy=portable)
    plan = other.space.project(portable.distribution(other, 0.5), 0.5)
    assert plans_of(account)[0] == tuple(plan)
    assert account.spent == 12
    assert other.evaluator.evaluate(result.widths()).score >= other.evaluator.evaluate(plan).score


def test_a_tiny_space_ends_without_using_up_the_account():
    evaluator = FakeEvaluator(2)
    task = Task(evaluator, 0.5)
    for kind in ("random", "surrogate", "direct", *ONE_BUDGET):
        account = FakeAccount(evaluator, 5000)
        account_evaluate = account.evaluate

        def limited(widths, account=account, evaluate=account_evaluate):
            if account.calls > 400:
                raise BudgetExhausted
            return evaluate(widths)

        account.evaluate = limited
        search(kind, [task], [account])
        assert account.spent < 200


def test_score_model_predicts_and_its_batches_do_not_repeat():
    task = make_synthetic_task(8, budget=0.4)
    rng = np.random.default_rng(0)
    plans = np.unique(random_plans(task, 0.4, 120, rng), axis=0)
    scores = np.array([task.evaluator.evaluate(p).score for p in plans])
    model = ScoreGP(task.space.widths, task.evaluator.dense.score)
    model.fit(plans[:80], scores[:80])
    mean, std = model.predict(plans[80:])
    ranks = [np.argsort(np.argsort(v)) for v in (mean, scores[80:])]
    assert np.corrcoef(*ranks)[0, 1] > 0.8
    assert (std > 0).all()
    nowhere = model.predict(np.maximum(task.space.minimums, 1)[None])[0]
    assert nowhere < np.median(mean), "far from all data a plan must not look better than most known ones"
    joint_mean, covariance = model.covariance(plans[80:])
    np.testing.assert_allclose(joint_mean, mean, atol=1e-8)
    np.testing.assert_allclose(np.sqrt(np.diagonal(covariance)), std, atol=1e-5)
    picks = choose_batch(model, plans[80:], 10, (0.0, 2.0), [7])
    assert picks[0] == 7
    assert len(set(picks)) == 10


def test_proposals_meet_the_budget_and_climbing_climbs():
    task = make_synthetic_task(8, budget=0.4)
    rng = np.random.default_rng(0)
    start = random_plans(task, 0.4, 5, rng)
    near = neighbours(task, start, 0.4, 50, rng)
    limit = task.space.target(0.4)
    assert (task.space.cost(near) <= limit).all()
    assert (task.space.cost(near) > 0.95 * limit).all()

    def value(plans):
        return np.array([task.evaluator.evaluate(p).score for p in plans])

    asked = []

    def predict(plans):
        asked.append(len(plans))
        return value(plans), np.zeros(len(plans))

    climbed = climb(task, start, 0.4, predict, (0.0,), rng)
    assert value(climbed)[0] > value(start).max()
    asked.clear()
    several = climb(task, start, 0.4, predict, (0.0, 1.0, 2.0), rng, rounds=5, keep=4)
    assert len(asked) == 5, "all climbs are predicted together"
    assert len(several) == 12
    for own in np.split(several, 3):
        assert value(own)[0] > value(start).max()


def test_climbs_go_for_the_deviation_by_their_weights():
    task = make_synthetic_task(8, budget=0.4)
    start = random_plans(task, 0.4, 5, np.random.default_rng(0))

    def predict(plans):
        return plans[:, 0].astype(float), -2.0 * plans[:, 0].astype(float)

    sure, unsure = np.split(climb(task, start, 0.4, predict, (0.0, 1.0), np.random.default_rng(1), keep=4), 2)
    assert sure[0, 0] > start[:, 0].max() > start[:, 0].min() > unsure[0, 0]


def test_the_surrogate_environment_pays_what_the_model_predicts():
    tasks = [make_synthetic_task(6), make_synthetic_task(5, 1, (0.3, 0.7))]
    rng = np.random.default_rng(0)
    models = []
    for task in tasks:
        plans = random_plans(task, 0.5, 30, rng)
        model = ScoreGP(task.space.widths, task.evaluator.dense.score)
        model.fit(plans, np.array([task.evaluator.evaluate(p).score for p in plans]))
        models.append(model)
    env = DistributionEnv(tasks=tasks)
    vec = SurrogateVecEnv(env, models, 8, 0.5, seed=0)
    obs = vec.reset()
    np.testing.assert_array_equal(obs[0], env.reset(options={"task": 0})[0])
    assert obs[7].reshape(6, -1)[:, 0].tolist() == [1, 1, 1, 1, 1, 0]
    calls = tasks[0].evaluator.calls
    actions = rng.uniform(-1, 1, size=(8, 6))
    _, rewards, dones, _ = vec.step(actions)
    assert dones.all()
    assert tasks[0].evaluator.calls == calls, "nothing is built or scored"
    mean, std = models[0].predict(tasks[0].widths(np.vstack([np.zeros(6), actions[:4]]), 0.5))
    np.testing.assert_allclose(rewards[:4], mean[1:] + 0.5 * std[1:] - mean[0], rtol=1e-5)


def test_unknown_agents_and_impossible_settings_are_named():
    with pytest.raises(ConfigError, match="did you mean 'random'"):
        make_agent("randon")
    with pytest.raises(ConfigError, match=r"search\.mode=direct"):
        make_agent("ppo", SearchConfig(stages=2))
    with pytest.raises(ConfigError, match="as many accounts"):
        SearchRequest([make_synthetic_task(4)], [])
    task = make_synthetic_task(4)
    with pytest.raises(ConfigError, match="starts must hold a list for each of the 1 tasks"):
        SearchRequest([task], [FakeAccount(task.evaluator, 5)], starts=[[], []])
    assert all(entry.summary for entry in AGENTS.values())


def test_tensorboard_on_request(tmp_path):
    pytest.importorskip("tensorboard")
    task = make_synthetic_task(4)
    search("random", [task], [FakeAccount(task.evaluator, 5)], tensorboard=tmp_path)
    assert list(tmp_path.glob("events*"))


def test_a_group_that_is_gone_has_a_finite_input() -> None:
    """Width 0 (a part of a language model that was dropped) is told apart from width 1."""
    model = ScoreGP(np.array([8, 3]), 0.0)
    inputs = model.inputs(np.array([[8, 3], [4, 1], [4, 0]]))
    assert np.isfinite(inputs).all()
    assert inputs[2, 1] < inputs[1, 1] < inputs[0, 1]


def test_expected_costs_lead_the_surrogate_and_their_factors_are_learned() -> None:
    """Scores follow a sum of costs of which one group's expectation is ten times too small."""
    random = np.random.default_rng(0)
    dense = np.full(24, 40)

    def expected(widths: np.ndarray) -> np.ndarray:
        return ((dense - widths) / dense) ** 2

    truth = np.array([10.0] + [1.0] * 23)
    plans = random.integers(8, 36, size=(160, 24))
    scores = -(expected(plans) * truth).sum(axis=1)
    seen, unseen = plans[:40], plans[40:]

    def error(model: ScoreGP) -> float:
        model.fit(seen, scores[:40])
        predicted, _ = model.predict(unseen)
        order = np.corrcoef(np.argsort(np.argsort(predicted)), np.argsort(np.argsort(scores[40:])))[0, 1]
        return 1.0 - float(order)

    informed, plain = error(ScoreGP(dense, 0.0, expected)), error(ScoreGP(dense, 0.0))
    assert informed < 0.05
    assert informed < plain


def test_batches_ahead_hold_the_mode_as_often_by_evaluation_and_the_last_one_knows_all(monkeypatch):
    asked = []
    plain = surrogate_training.next_plans

    def watched(trainer, index, budget, count, generator, forced):
        asked.append((forced, len(trainer.pending), trainer.left(index) <= count))
        return plain(trainer, index, budget, count, generator, forced)

    monkeypatch.setattr(surrogate_training, "next_plans", watched)
    task = make_synthetic_task(6, budget=0.4)
    search("ahead", [task], [FakeAccount(task.evaluator, 40)], seed=1)
    *before, last = asked
    assert last == (True, 0, True)
    assert max(pending for _, pending, _ in before) == 2
    forced = [mode for mode, _, _ in before]
    assert forced == [forced[0] ^ (number % 2 == 1) for number in range(len(forced))]
    asked.clear()
    search("surrogate", [task], [FakeAccount(task.evaluator, 40)], seed=1)
    assert asked and all(mode and not pending for mode, pending, _ in asked)


@pytest.mark.parametrize(
    ("asked", "own", "wanted"),
    [(20, 20, [0, 1, 2, 3]), (20, 10, [0, 2]), (20, 6, [0, 3]), (5, 3, [0, 2]), (6, 6, [0, 1, 2, 3])],
)
def test_the_mode_has_a_place_once_in_as_many_evaluations(asked, own, wanted):
    trainer = SimpleNamespace(
        plan_memory=None,
        search=SimpleNamespace(settings=SimpleNamespace(batch=asked)),
        batch=own,
        left=lambda index: 100,
    )
    forces = surrogate_training.SurrogateTrainer.forces_mode
    assert [batch for batch in range(4) if forces(trainer, batch, 0, own)] == wanted
    trainer.left = lambda index: own  # the last batch
    assert all(forces(trainer, batch, 0, own) for batch in range(4))
    trainer.plan_memory = object()
    assert not any(forces(trainer, batch, 0, own) for batch in range(4))
