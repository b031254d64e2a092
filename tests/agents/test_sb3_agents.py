"""What is particular to the agents that stable-baselines3 trains; their common contract is in test_agents.py."""

from __future__ import annotations

import itertools
import sys

import numpy as np
import pytest
import torch
from gymnasium import spaces

from helpers.small import SMALL_RUN
from helpers.synthetic import FakeAccount, FakeEvaluator, make_synthetic_task
from rlprune.agents import SearchRequest, make_agent
from rlprune.agents.base import TrialRecorder
from rlprune.agents.baselines.amc import FinalRewardBuffer, truncated_normal
from rlprune.agents.baselines.episodes import Episodes, Turns
from rlprune.agents.baselines.sb3 import DEFAULTS, SB3Agent, check_arguments, find_algorithm
from rlprune.cli.catalogue import check_names
from rlprune.config.config import load_config
from rlprune.config.search import AMCConfig, PPOConfig, SB3Config, SearchConfig, StagedPPOConfig
from rlprune.envs.distribution import DistributionEnv
from rlprune.envs.sequential import SequentialEnv
from rlprune.envs.task import Task
from rlprune.errors import ConfigError
from rlprune.evaluation.ledger import BudgetExhausted, EvaluationBudget, EvaluationLog

torch.set_num_threads(1)
LEARNERS = {
    "amc": SearchConfig(amc=AMCConfig(hidden=32, batch_size=32)),
    "ppo_sequential": SearchConfig(),
    "sac": SearchConfig(),
    "td3": SearchConfig(),
    "a2c": SearchConfig(),
}


def search(name, settings, task, account, **kwargs):
    starts = [[task.uniform_widths(task.budget)]]
    return make_agent(name, settings).search(SearchRequest([task], [account], starts=starts, **kwargs))


@pytest.mark.parametrize("name", ["amc", "sac"])
def test_off_policy_agents_learn(name):
    """The last tenth of the plans is better than the random ones of the warm-up."""
    task = make_synthetic_task(6, budget=0.3)
    account = FakeAccount(task.evaluator, 90)
    search(name, LEARNERS[name], task, account)
    reward = [task.scale(0.3)(c.score) for c in account.history]
    assert np.mean(reward[-12:]) > np.mean(reward[1:20]) + 0.3


@pytest.mark.parametrize("name", LEARNERS)
def test_every_plan_that_was_scored_meets_the_budget(name):
    task = make_synthetic_task(5, budget=0.4)
    account = FakeAccount(task.evaluator, 30)
    search(name, LEARNERS[name], task, account)
    assert all(c.cost <= task.space.target(0.4) for c in account.history)


def test_stages_are_charged_and_the_best_plan_is_a_history():
    task = make_synthetic_task(6, budget=0.4)
    account = FakeAccount(task.evaluator, 31)
    settings = SearchConfig(ppo_stages=StagedPPOConfig(stages=3))
    result = search("ppo_stages", settings, task, account)
    assert account.spent == 31
    stages = [len(key) for key in account.seen if isinstance(key[0], tuple)]
    assert set(stages) == {2, 3} and stages.count(3) >= 8
    history = max((k for k in account.seen if len(k) == 3 and isinstance(k[0], tuple)), key=_score(account))
    assert result.best[0] == history or len(result.best[0]) == 1
    for before, after in itertools.pairwise(history):
        assert np.all(np.array(after) <= before), "what a stage cut does not come back"


def _score(account):
    return lambda key: account.seen[key].score


def test_a_transition_gets_the_final_reward_of_its_episode():
    box = spaces.Box(-1.0, 1.0, (1,), np.float32)
    buffer = FinalRewardBuffer(20, box, box, "cpu", baseline=0.0)
    for step, (reward, done) in enumerate([(0.0, False), (0.0, False), (0.7, True), (0.0, False)]):
        at = np.full((1, 1), step / 10, np.float32)
        buffer.add(at, at, at, np.array([reward]), np.array([done]), [{}])
        assert buffer.size() == (0 if step < 2 else 3), "an episode is stored at its end"
    assert buffer.rewards[:3].ravel().tolist() == pytest.approx([0.7, 0.7, 0.7])
    assert buffer.dones[:3].ravel().tolist() == [0.0, 0.0, 1.0]
    assert buffer.sample(4).rewards.numpy() == pytest.approx(0.7)
    buffer._baseline = 0.5
    assert buffer.sample(4).rewards.numpy() == pytest.approx(0.0), "the moving average is taken off"


def test_truncated_normal_noise_stays_inside_and_follows_its_density():
    np.random.seed(0)
    drawn = truncated_normal(np.full(20_000, 0.8), 0.5)
    assert drawn.min() >= -1.0 and drawn.max() <= 1.0
    inside = 0.8 + 0.5 * np.random.normal(size=200_000)
    inside = inside[np.abs(inside) <= 1.0]
    for quantile in (0.1, 0.5, 0.9):
        assert np.quantile(drawn, quantile) == pytest.approx(np.quantile(inside, quantile), abs=0.02)
    assert truncated_normal(np.array([-1.0, 1.0]), 1e-9) == pytest.approx([-1.0, 1.0])


def test_amc_explores_at_random_first_and_less_and_less_after_it():
    task = make_synthetic_task(6, budget=0.3)
    account = FakeAccount(task.evaluator, 81)
    search("amc", SearchConfig(amc=AMCConfig(hidden=16, warmup=30)), task, account)
    plans = np.array(list(account.seen))
    spread = [plans[rows].std(axis=0).mean() for rows in (slice(1, 31), slice(60, 81))]
    assert spread[1] < 0.5 * spread[0]


def test_one_evaluation_is_kept_for_the_plan_of_the_trained_policy(monkeypatch):
    """It is scored right after the training, and the noise around it has to find no more than a few plans."""
    made = []
    original = SB3Agent.algorithm
    monkeypatch.setattr(SB3Agent, "algorithm", lambda *args: made.append(original(*args)) or made[-1])
    task = make_synthetic_task(6)
    account = FakeAccount(task.evaluator, 40)
    search("sac", SearchConfig(), task, account)
    obs, _ = DistributionEnv(tasks=[task]).reset(seed=0)
    action, _ = made[0].predict(obs, deterministic=True)
    assert list(account.seen)[-1] == tuple(task.widths(action, 0.5))


def test_episodes_go_to_the_tasks_in_turn_and_end_when_nothing_new_comes():
    tasks = [make_synthetic_task(4, seed) for seed in (0, 1)]
    recorders = [TrialRecorder(FakeAccount(t.evaluator, 10)) for t in tasks]
    charged = [t.with_scorer(r) for t, r in zip(tasks, recorders, strict=True)]
    episodes = Episodes(SequentialEnv(tasks=charged), Turns(charged, recorders))
    turns = []
    with pytest.raises(BudgetExhausted):
        for _ in range(200):
            _, info = episodes.reset()
            turns.append(info["task"])
            done = False
            while not done:
                *_, done, _, _ = episodes.step(np.zeros(1, np.float32))
    assert turns[:4] == [0, 1, 0, 1]
    assert 50 <= len(turns) < 60
    assert max(r.account.spent for r in recorders) == 2, "the same plan again is free"


@pytest.mark.parametrize("name", ["amc", "a2c"])
def test_a_space_smaller_than_the_account_ends_the_search(name):
    evaluator = FakeEvaluator(2)
    task = Task(evaluator, 0.5)
    account = FakeAccount(evaluator, 5000)
    search(name, LEARNERS[name], task, account)
    assert account.spent < 200


@pytest.mark.parametrize("name", ["amc", "sac"])
def test_a_search_is_resumed_from_its_ledger_on_any_number_of_threads(name, tmp_path):
    def run(path, limit, threads=1):
        task = make_synthetic_task(6, budget=0.4)
        evaluator = _Scorer(task.evaluator)
        account = EvaluationBudget(evaluator, EvaluationLog(path), method=name, seed=0, limit=limit)
        torch.set_num_threads(threads)
        try:
            search(name, LEARNERS[name], task, account, seed=2, progress=evaluator.stop)
        except KeyboardInterrupt:
            pass
        finally:
            torch.set_num_threads(1)
        return account, evaluator

    whole, _ = run(None, 40)
    _Scorer.stop_at = 25
    stopped, _ = run(tmp_path / "ledger.jsonl", 40)
    _Scorer.stop_at = 10**6
    assert stopped.spent == 25
    resumed, evaluator = run(tmp_path / "ledger.jsonl", 40, threads=2)
    assert list(resumed.plans) == list(whole.plans)
    assert evaluator.scored == 15, "what the ledger holds is not scored again"
    assert evaluator.threads == {2}, "evaluations keep the threads that were set"


class _Scorer:
    """A FakeEvaluator as an account sees a real one; its memo answers for what the ledger told it."""

    rungs = ()
    stop_at = 10**6

    def __init__(self, evaluator):
        self.evaluator, self.known, self.scored, self.threads = evaluator, {}, 0, set()

    def remember(self, history, candidate):
        self.known[history] = candidate

    def evaluate_staged(self, history):
        from rlprune.evaluation.candidate import Candidate

        if history not in self.known:
            self.scored += 1
            self.threads.add(torch.get_num_threads())
            found = self.evaluator.evaluate(history[-1])
            self.known[history] = Candidate(
                found.widths, found.cost, found.score, found.loss, found.metric, 0.0, 0.01, 1
            )
        return self.known[history]

    def stop(self, progress):
        if progress.spent >= self.stop_at:
            raise KeyboardInterrupt


@pytest.mark.parametrize("algorithm", ["A2C", "DDPG", "PPO", "SAC", "TD3"])
def test_every_algorithm_takes_its_defaults_and_arguments(algorithm):
    task = make_synthetic_task(4)
    account = FakeAccount(task.evaluator, 12)
    arguments = {"learning_rate": 0.01, "policy_kwargs": {"net_arch": [8]}}
    settings = SearchConfig(sb3=SB3Config(algorithm=algorithm, arguments=arguments))
    agent = make_agent("sb3", settings)
    agent.search(SearchRequest([task], [account]))
    assert account.spent == 12
    assert arguments["policy_kwargs"] == {"net_arch": [8]}, "the settings are left alone"


@pytest.mark.parametrize("algorithm", ["ARS", "CrossQ", "RecurrentPPO", "TQC", "TRPO"])
def test_sb3_contrib(algorithm):
    pytest.importorskip("sb3_contrib")
    task = make_synthetic_task(4)
    account = FakeAccount(task.evaluator, 12)
    agent = make_agent("sb3", SearchConfig(sb3=SB3Config(algorithm=algorithm)))
    agent.search(SearchRequest([task], [account]))
    assert account.spent == 12


def test_a_missing_sb3_contrib_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sb3_contrib", None)
    with pytest.raises(ConfigError, match=r"TQC needs sb3-contrib; pip install 'rlprune\[contrib\]'"):
        find_algorithm("TQC")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"learning_rat": 1e-3}, r"arguments\.learning_rat: SAC has no such argument.*'learning_rate'"),
        ({"n_epochs": 3}, r"arguments\.n_epochs: SAC has no such argument"),
        ({"seed": 3}, r"arguments\.seed: SAC has no such argument"),
        ({"batch_size": "many"}, r"arguments\.batch_size: expected int, got 'many'"),
        ({"batch_size": True}, r"arguments\.batch_size: expected int, got True"),
        ({"batch_size": 0}, r"arguments\.batch_size: must be at least 1, got 0"),
        ({"learning_rate": -0.1}, r"arguments\.learning_rate: must be at least 0"),
        ({"gradient_steps": -2}, r"arguments\.gradient_steps: must be at least -1"),
        ({"policy_kwargs": {"net_arc": [8]}}, r"arguments: SAC does not take them \(.*net_arc"),
        ({"train_freq": [1, "week"]}, r"arguments: SAC does not take them \(.*week"),
        ({"action_noise": "loud"}, r"arguments\.action_noise: SAC has no such argument"),
    ],
)
def test_wrong_arguments_are_one_line_when_the_agent_is_made(arguments, message):
    with pytest.raises(ConfigError, match=message) as caught:
        make_agent("sb3", SearchConfig(sb3=SB3Config(arguments=arguments)))
    assert "\n" not in str(caught.value)


def test_wrong_arguments_are_refused_before_anything_is_trained():
    config = load_config("digits", [*SMALL_RUN, "search.sb3.arguments.taux=0.1"])
    with pytest.raises(ConfigError, match=r"search\.sb3\.arguments\.taux: SAC has no such argument"):
        check_names(config)
    with pytest.raises(
        ConfigError, match=r"search\.sb3\.algorithm: 'SACK' is not one of .*did you mean 'SAC'"
    ):
        load_config("digits", ["search.sb3.algorithm=SACK"])


def test_lists_reach_the_algorithm_as_tuples_and_defaults_name_real_arguments():
    sac = find_algorithm("SAC")
    assert check_arguments(sac, {"train_freq": [2, "step"], "ent_coef": 0.1})["train_freq"] == (2, "step")
    for name in ("A2C", "DDPG", "PPO", "SAC", "TD3"):
        given = {k: v for k, v in DEFAULTS[name].items() if k != "policy_kwargs"}
        assert check_arguments(find_algorithm(name), given) == given


def test_a_named_algorithm_does_not_read_the_settings_of_another():
    settings = SearchConfig(sb3=SB3Config(algorithm="PPO", arguments={"n_steps": 8}))
    assert make_agent("sac", settings).settings.sb3 == SB3Config(algorithm="SAC")


@pytest.mark.parametrize(
    ("agent", "mode", "given", "expected"),
    [
        ("ppo", "surrogate", None, -1.0),
        ("ppo", "direct", None, -2.0),
        ("ppo_stages", "surrogate", None, -2.0),
        ("ppo", "direct", -0.5, -0.5),
    ],
)
def test_the_first_deviation_follows_the_mode_unless_it_is_set(agent, mode, given, expected):
    task = make_synthetic_task(4)
    settings = SearchConfig(mode=mode, ppo=PPOConfig(hidden=8, log_std_init=given))
    policy = search(agent, settings, task, FakeAccount(task.evaluator, 3)).policy
    assert policy.log_std.item() == expected, "an account this small ends before any update"
