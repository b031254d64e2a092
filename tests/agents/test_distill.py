"""A search over a range of budgets: one model of the score for all of them, and the policy learns the best plans."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from helpers.synthetic import FakeAccount, make_synthetic_task
from rlprune.agents import SearchRequest, StateDir, make_agent
from rlprune.agents.ppo.behaviour_cloning import REACH, clone_behaviour, demonstrations, wanted_action
from rlprune.agents.ppo.policy import PortablePolicy, portable_state
from rlprune.config.search import PPOConfig, SearchConfig
from rlprune.envs.distribution import DistributionEnv
from rlprune.envs.task import KNOTS, deviate
from rlprune.evaluation.ledger import BudgetExhausted
from rlprune.surrogates.score_gp import ScoreGP

SETTINGS = SearchConfig(ppo=PPOConfig(hidden=32, surrogate_steps=256, surrogate_envs=32), batch=10)
RANGE = (0.3, 0.7)


def search(task, account, **kwargs):
    return make_agent("ppo", SETTINGS).search(SearchRequest([task], [account], seed=0, **kwargs))


def applied(policy, task, budget):
    """Widths of the saved form of a policy, which has no bias of its own for each group."""
    portable = PortablePolicy.from_state(*portable_state(policy))
    return task.space.project(portable.distribution(task, budget), budget)


def test_plans_within_reach_come_from_the_wanted_action():
    task = make_synthetic_task(8)
    rng = np.random.default_rng(0)
    for widths in task.widths(rng.uniform(-0.9, 0.9, size=(20, 8)), 0.4):
        action = wanted_action(task, 0.4, widths.astype(float))
        assert (np.abs(action) < REACH).all()
        assert task.widths(action, 0.4).tolist() == widths.tolist()


def test_a_plan_out_of_reach_is_approached():
    task = make_synthetic_task(8)
    shares = np.array([0.9, 0.0, 0.9, 0.9, 0.9, 0.001, 0.9, 0.001]) + 1e-6
    plan = task.space.project(shares, 0.3)
    near = task.widths(wanted_action(task, 0.3, plan.astype(float)), 0.3)
    base = task.widths(np.zeros(8), 0.3)
    assert np.abs(near - plan).sum() < 0.3 * np.abs(base - plan).sum()


def test_lessons_go_from_plan_to_plan():
    low, high = np.array([2, 8]), np.array([10, 12])
    found = sorted(demonstrations([(0.3, low), (0.5, high)]), key=lambda lesson: lesson[0])
    assert [budget for budget, _, _ in found] == pytest.approx([0.3, 0.35, 0.4, 0.45, 0.5])
    assert (
        found[0][1].tolist() == [2, 8]
        and found[2][1].tolist() == [6, 10]
        and found[-1][1].tolist() == [10, 12]
    )


def test_the_policy_gives_the_best_plan_of_every_budget_without_a_search():
    task = make_synthetic_task(6, 1, RANGE)
    account = FakeAccount(task.evaluator, 80)
    policy = search(task, account).policy
    assert (
        len(task.anchor_budgets) == KNOTS and task.anchor_budgets[0] == 0.3 and task.anchor_budgets[-1] == 0.7
    )
    for budget in task.anchor_budgets:
        limit = task.space.target(budget)
        best = max(c.score for key, c in account.seen.items() if task.space.cost(np.array(key)) <= limit)
        score = task.evaluator.evaluate(applied(policy, task, budget)).score
        uniform = task.evaluator.evaluate(task.uniform_widths(budget)).score
        assert score - uniform >= 0.9 * (best - uniform) > 0
    for budget in (0.35, 0.55):  # never searched
        score = task.evaluator.evaluate(applied(policy, task, budget)).score
        assert score > task.evaluator.evaluate(task.uniform_widths(budget)).score


def test_of_several_tasks_what_they_have_in_common_is_learned():
    tasks = [make_synthetic_task(6, seed, RANGE) for seed in range(4)]
    request = SearchRequest(tasks, [FakeAccount(t.evaluator, 10) for t in tasks])
    policy = make_agent("ppo", SETTINGS).search(request).policy
    critic = {n: p.clone() for n, p in policy.network.state_dict().items() if n.startswith("critic")}
    rng = np.random.default_rng(3)
    common = rng.uniform(-0.8, 0.8, size=6)
    wanted = [
        [
            (b, t.widths(common + rng.normal(0, 0.1, size=6), b).astype(float), 1.0)
            for b in (0.3, 0.7)
            for _ in range(3)
        ]
        for t in tasks
    ]
    torch.manual_seed(0)
    clone_behaviour(policy, DistributionEnv(tasks=tasks), tasks, wanted, common=True)
    other = make_synthetic_task(6, 9, RANGE)
    for budget in (0.3, 0.7):
        plan = other.widths(common, budget)
        missed = np.abs(applied(policy, other, budget) - plan).sum()
        assert missed < 0.5 * np.abs(other.uniform_widths(budget) - plan).sum()
    assert all(torch.equal(policy.network.state_dict()[n], p) for n, p in critic.items()), (
        "only the actor is taught"
    )


@pytest.mark.parametrize(("seeds", "budget"), [((0,), RANGE), ((0, 1), 0.5)], ids=["range", "checkpoints"])
def test_interrupted_and_resumed_is_the_same_search(tmp_path, monkeypatch, seeds, budget):
    for steps in ("_STEPS", "_COMMON_STEPS"):
        monkeypatch.setattr(f"rlprune.agents.ppo.behaviour_cloning.{steps}", 20)

    def result(state, stop=None):
        tasks = [make_synthetic_task(6, seed, budget) for seed in seeds]
        accounts = [FakeAccount(task.evaluator, 50, stop_after=stop) for task in tasks]
        found = make_agent("ppo", SETTINGS).search(SearchRequest(tasks, accounts, seed=0, state=state))
        return [list(account.seen) for account in accounts], portable_state(found.policy)[0]

    plans, weights = result(None)
    state = StateDir(tmp_path, "range")
    with pytest.raises(KeyboardInterrupt):
        result(state, stop=33)
    torch.manual_seed(5)  # what the process has drawn before does not matter
    again, resumed = result(state)
    assert again == plans
    assert all(torch.equal(resumed[name], weights[name]) for name in weights)


@pytest.mark.parametrize(("language", "budget"), [(False, 0.5), (False, RANGE), (True, RANGE)])
def test_tasks_without_common_plans_are_taught_their_own(monkeypatch, language, budget):
    taught = []
    monkeypatch.setattr(
        "rlprune.agents.ppo.surrogate_training.clone_behaviour",
        lambda policy, env, tasks, wanted, *, common: taught.append((common, [len(own) for own in wanted])),
    )
    tasks = [make_synthetic_task(6, seed, budget, common_plans=not language) for seed in (0, 1)]
    accounts = [FakeAccount(t.evaluator, 12) for t in tasks]
    make_agent("ppo", SETTINGS).search(SearchRequest(tasks, accounts, seed=0))
    ((common, counts),) = taught
    assert common is not language
    alone = (
        1 if budget == 0.5 else len(demonstrations([(float(b), np.ones(6)) for b in tasks[0].anchor_budgets]))
    )
    assert all(0 < count <= alone if language else count > alone for count in counts)


def test_a_base_rule_that_has_nothing_left_to_ask_leaves_the_policy_as_it_is(monkeypatch):
    def spent(*args, **kwargs):
        raise BudgetExhausted("spent")

    monkeypatch.setattr("rlprune.agents.ppo.surrogate_training.clone_behaviour", spent)
    task = make_synthetic_task(6, 0, RANGE)
    account = FakeAccount(task.evaluator, 12)
    assert search(task, account).policy.reach == 1.0 and account.spent == 12


def test_the_score_model_orders_plans_at_every_budget():
    task = make_synthetic_task(6, 0, RANGE)
    rng = np.random.default_rng(0)

    def plans(budget, count):
        return task.space.project(deviate(np.ones(6), rng.uniform(-1, 1, size=(count, 6))), budget)

    def scores(widths):
        return np.array([task.evaluator.evaluate(w).score for w in widths])

    model = ScoreGP(task.space.widths, 0.0, cost=task.space.cost)
    train = np.vstack([plans(b, 40) for b in task.anchor_budgets])
    model.fit(train, scores(train))
    for budget in task.anchor_budgets:
        new = plans(budget, 60)
        mean, _ = model.predict(new)
        order = np.corrcoef(np.argsort(np.argsort(mean)), np.argsort(np.argsort(scores(new))))[0, 1]
        assert order > 0.8
        # What is usual at a budget is taken out: no budget's plans are all good or all bad.
        assert abs(mean.mean() - model.predict(train)[0].mean()) < 1.0
