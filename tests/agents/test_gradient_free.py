"""What is particular to the agents without a policy; their common contract is in test_agents.py."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest

from helpers.synthetic import FakeAccount, FakeEvaluator, make_synthetic_task
from rlprune.agents import SearchRequest, make_agent
from rlprune.agents.base import TrialRecorder
from rlprune.agents.baselines.bypass import _first, _Shift
from rlprune.agents.baselines.evopress import swap_levels
from rlprune.agents.baselines.optuna import TPE, action_of
from rlprune.agents.baselines.rl_pruner import _noisy, _towards, stage_plans
from rlprune.config.search import BypassConfig, GPConfig, RLPrunerConfig, SearchConfig
from rlprune.envs.task import Task
from rlprune.errors import ConfigError
from rlprune.surrogates.proposals import random_plans


def run(name, task, evaluations, *, seed=0, starts=None, settings=None):
    account = FakeAccount(task.evaluator, evaluations)
    plans = [task.uniform_widths(task.budget)] if starts is None else starts
    request = SearchRequest([task], [account], starts=[plans], seed=seed)
    make_agent(name, settings or SearchConfig()).search(request)
    return account


def best_of(account, task):
    """The best score within the budget (RL-Pruner's earlier stages exceed it)."""
    return max(c.score for c in account.history if c.cost <= task.space.target(task.budget))


@pytest.mark.parametrize("name", ["cma_es", "tpe", "evopress", "rl_pruner", "bypass"])
def test_they_find_better_plans_than_random_search(name):
    gains = []
    for seed in (0, 1, 2):
        task = make_synthetic_task(8, seed, 0.3)
        best = {m: best_of(run(m, task, 100, seed=seed), task) for m in ("random", name)}
        uniform = task.evaluator.evaluate(task.uniform_widths(0.3)).score
        gains.append((best[name] - uniform) / (best["random"] - uniform))
    assert np.mean(gains) > 1.0


def test_the_process_finds_better_plans_than_random_search():
    task = make_synthetic_task(5, 1, 0.3)
    found = run("gp", task, 40, settings=SearchConfig(gp=GPConfig(startup=12)))
    assert best_of(found, task) > best_of(run("random", task, 40), task)


@pytest.mark.parametrize(("missing", "agent"), [("optuna", "tpe"), ("optuna", "gp"), ("cmaes", "cma_es")])
def test_a_missing_library_is_named_with_its_extra(missing, agent, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(
        ConfigError, match=rf"^search\.agent: '{agent}' needs `pip install 'rlprune\[benchmark\]'`$"
    ):
        make_agent(agent)


def test_the_action_of_a_plan_leads_back_to_it():
    task = make_synthetic_task(8, budget=0.4)
    actions = np.random.default_rng(0).uniform(-0.4, 0.4, size=(30, 8))
    for plan in task.widths(actions, 0.4):
        again = task.widths(action_of(task, plan), 0.4)
        assert np.abs(again - plan).max() <= 2, "but for the rounding of the widths"
    far = task.space.project(np.eye(8)[0] + 1e-3, 0.4)
    assert np.abs(action_of(task, far, 0.5)).max() == 0.5


def test_starts_are_told_and_probes_beyond_the_budget_are_not(monkeypatch):
    made = []
    original = TPE.sampler
    monkeypatch.setattr(TPE, "sampler", lambda self, seed: made.append(original(self, seed)) or made[-1])
    told = []
    monkeypatch.setattr(
        "optuna.study.Study.add_trial", lambda self, trial: told.append((trial.values[0], trial.params))
    )
    task = make_synthetic_task(4, budget=0.4)
    probe = task.space.widths.copy()
    probe[0] //= 2
    uniform = task.uniform_widths(0.4)
    run("tpe", task, 5, starts=[uniform, probe])
    assert len(made) == 1
    assert [value for value, _ in told] == [task.evaluator.evaluate(uniform).score]
    assert np.abs(list(told[0][1].values())).max() < 0.1, "action 0 is the base rule, uniform here"


def test_a_sampler_that_repeats_itself_is_told_of_random_plans():
    """Of two groups on a budget there are few plans; the sampler asks for the same ones again and again."""
    task = Task(FakeEvaluator(2), 0.5)
    plans = {tuple(p) for p in random_plans(task, 0.5, 3000, np.random.default_rng(0))}
    account = run("cma_es", task, 1000)
    assert len(plans) * 0.9 <= account.spent <= len(plans) * 1.1
    assert account.calls < 20 * account.spent


def test_swaps_keep_the_budget_and_touch_few_groups():
    task = make_synthetic_task(8, budget=0.4)
    generator = np.random.default_rng(0)
    parent = task.uniform_widths(0.4)
    limit = task.space.target(0.4)
    children = np.array([swap_levels(task, parent, 0.2, 1, generator) for _ in range(60)])
    cost = task.space.cost(children)
    assert (cost <= limit).all() and (cost > 0.97 * limit).all()
    moved = np.abs(children - parent)
    assert ((np.sort(moved, axis=1)[:, :-2] <= 1).all(axis=1)).mean() > 0.9, (
        "one swap: two groups, and rounding"
    )
    assert len(np.unique(children, axis=0)) > 20
    dense = swap_levels(replace(task, budget=1.0), task.space.widths, 0.1, 3, generator)
    assert (dense == task.space.widths).all()
    rounded = Task(FakeEvaluator(8), 0.4)
    rounded.evaluator.space = rounded.space.with_rounding(4)
    child = swap_levels(rounded, rounded.uniform_widths(0.4), 0.2, 3, generator)
    assert (child % 4 == 0).all()


def test_stages_fall_to_the_budget_and_bring_nothing_back():
    task = make_synthetic_task(6, budget=0.3)
    generator = np.random.default_rng(0)
    before = task.space.widths
    dense = task.space.dense_cost()
    for stage in (1, 2, 3):
        samples = _noisy(np.full(6, 1 / 6), 0.04, 20, generator)
        np.testing.assert_allclose(samples.sum(axis=1), 1.0)
        plans = stage_plans(task, samples, before, stage, 3)
        assert (plans <= before).all()
        target = dense * (1 - 0.7 * stage / 3)
        assert (task.space.cost(plans) <= target).all() and (task.space.cost(plans) > 0.95 * target).all()
        before = plans[0]
    cut = (
        task.space.widths - stage_plans(task, np.array([[1, 1, 2, 1, 1, 1]]) / 7, task.space.widths, 1, 3)[0]
    )
    assert cut[2] == pytest.approx(2 * cut[3], abs=2), "probabilities count units"


def test_the_probabilities_move_by_a_quarter_of_themselves_at_most():
    now = np.array([0.5, 0.49, 0.01])
    moved = _towards(now, np.array([0.1, 0.1, 0.8]), 0.1)
    ratio = moved / now
    assert ratio[2] / ratio[:2].mean() == pytest.approx(1.25 / (0.92 + 0.9204) * 2, rel=1e-3)
    assert moved.sum() == pytest.approx(1.0)


def test_rl_pruner_pays_for_its_stages_and_ends_on_the_budget():
    task = make_synthetic_task(6, budget=0.3)
    account = run("rl_pruner", task, 61, settings=SearchConfig(rl_pruner=RLPrunerConfig(stages=3)))
    ratios = np.array([c.cost for c in account.history]) / task.space.dense_cost()
    stage = [int(np.sum(np.abs(ratios[1:] - target) < 0.03)) for target in (0.767, 0.533, 0.3)]
    assert stage == [20, 20, 20]


def test_keep_probabilities_are_shifted_onto_the_budget():
    task = make_synthetic_task(6, budget=0.4)
    shift = _Shift(task)
    units = int(task.space.widths.sum())
    keep = shift(np.random.default_rng(0).normal(0.5, 0.5, size=units))
    assert task.space.cost(shift.counts(keep)) == pytest.approx(task.space.target(0.4), rel=1e-6)
    assert (keep >= 0.01).all() and (keep <= 0.99).all()
    mask = np.random.default_rng(1).random(units) < keep
    assert task.space.cost(shift.widths(mask)) <= task.space.target(0.4)


@pytest.mark.parametrize("start", ["rule", "importance", "uniform"])
def test_the_first_keep_probabilities(start):
    task = make_synthetic_task(6, budget=0.4)
    recorder = TrialRecorder(FakeAccount(task.evaluator, 5))
    plan = random_plans(task, 0.4, 1, np.random.default_rng(0))[0]
    recorder.evaluate(plan)
    shift = _Shift(task)
    keep = _first(task, recorder, shift, start)
    assert keep.shape == (task.space.widths.sum(),)
    if start == "rule":
        assert (shift.widths(keep) == plan).all()
    if start == "importance":
        scores = np.concatenate(task.evaluator.importance)
        assert (np.argsort(keep) == np.argsort(scores)).all()
    if start == "uniform":
        assert len(np.unique(keep)) == 1


def test_bypass_learns_which_group_is_dear():
    """The last plans keep more of the group that the score depends on than the first ones."""
    task = make_synthetic_task(6, budget=0.4)
    task.evaluator.weights = np.array([0.0, 0.0, 3.0, 0.0, 0.0, 0.0])
    settings = SearchConfig(bypass=BypassConfig(lr=0.05, start="uniform"))
    account = run("bypass", task, 120, settings=settings)
    kept = np.array([c.widths[2] for c in account.history]) / task.space.widths[2]
    assert kept[-20:].mean() > kept[1:21].mean() + 0.1
