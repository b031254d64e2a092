"""Every agent on spaces with fewer plans than evaluations: it ends by itself, and returns the best plan there is."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch

from helpers.synthetic import FakeEvaluator, make_space
from rlprune.agents import AGENTS, SearchContext, SearchRequest, make_agent
from rlprune.agents.baselines.function import FunctionAgent
from rlprune.config.search import (
    AMCConfig,
    GPConfig,
    PPOConfig,
    SB3Config,
    SearchConfig,
    SequentialPPOConfig,
)
from rlprune.envs.task import Task
from rlprune.evaluation.ledger import EvaluationBudget, EvaluationLog

SMALL = PPOConfig(hidden=8, n_steps=8, batch_size=8, n_epochs=1, surrogate_steps=64, surrogate_envs=8)
AGENT_SETTINGS = {
    "surrogate": ("ppo", SearchConfig(ppo=SMALL, batch=8)),
    "logits": ("ppo", SearchConfig(ppo=replace(SMALL, surrogate="logits"), batch=8)),
    "direct": ("ppo", SearchConfig(ppo=SMALL, mode="direct")),
    "ppo_stages": ("ppo_stages", SearchConfig(ppo=SMALL)),
    "ppo_sequential": ("ppo_sequential", SearchConfig(ppo_sequential=SequentialPPOConfig(episodes=2))),
    "amc": ("amc", SearchConfig(amc=AMCConfig(hidden=8, batch_size=8))),
    "sb3": ("sb3", SearchConfig(sb3=SB3Config(algorithm="PPO", arguments={"n_steps": 8, "batch_size": 8}))),
    "gp": ("gp", SearchConfig(gp=GPConfig(startup=4))),
    **{
        name: (name, SearchConfig())
        for name in ("sac", "td3", "a2c", "random", "cma_es", "tpe", "evopress", "rl_pruner", "bypass")
    },
}
EVALUATIONS = 24


class Judge(FakeEvaluator):
    """Scores a plan alike, whichever way it is asked for."""

    def evaluate_staged(self, history: Any) -> Any:
        return self.evaluate(history[0]) if len(history) == 1 else super().evaluate_staged(history)


class NoData(Task):
    """The rules that read data have none here."""

    def rule_plans(self, budget: Any) -> Any:
        falling = np.arange(len(self.space.groups), 0, -1)
        return self.space.project(falling[None], budget, self.metric)


@dataclass(frozen=True)
class Small:
    """A space of ``groups`` groups cut in steps, and a budget as a ratio, or "lowest" or "one plan"."""

    groups: int
    step: int
    budget: float | str
    flat: bool = False
    ties: tuple[tuple[int, ...], ...] = ()

    def task(self) -> Task:
        space = replace(make_space(self.groups, step=self.step), ties=self.ties)
        budget = self.budget
        if budget == "lowest":
            budget = space.cost(space.minimums) / space.dense_cost("macs")
        return NoData(Judge(self.groups, flat=self.flat, space=space), budget)


SPACES = {
    "one group": Small(1, 1, 0.5),
    "one group of two plans": Small(1, 8, 0.6),
    "two groups": Small(2, 8, 0.7),
    "three groups in large steps": Small(3, 16, 0.7),
    "the lowest feasible budget": Small(3, 4, "lowest"),
    "the whole model": Small(3, 4, 1.0),
    "all plans equal": Small(2, 8, 0.7, flat=True),
    "nothing to cut": Small(2, 1000, 1.0),
    "two groups of one width": Small(4, 8, 0.6, ties=((0, 1),)),
}


def all_plans(task: Task) -> list[tuple[int, ...]]:
    """Every plan of the space within the budget to which no step can be added: what a projection can give."""
    space = task.space
    each = [
        sorted({w, *range(int(m), int(w) + 1, int(s))})
        for w, m, s in zip(space.widths, space.minimums, space.steps, strict=True)
    ]
    target = task.space.target(task.budget)
    alike = (np.array(p) for p in itertools.product(*each))
    fits = [tuple(p) for p in alike if (p == p[space.leaders]).all() and space.cost(p) <= target]
    return [
        p for p in fits if not any(q != p and all(a >= b for a, b in zip(q, p, strict=True)) for q in fits)
    ]


def account_of(task: Task, limit: int = EVALUATIONS) -> EvaluationBudget:
    evaluator: Any = task.evaluator
    return EvaluationBudget(evaluator, EvaluationLog(), method="m", seed=0, limit=limit)


def search(kind: str, task: Task, account: EvaluationBudget, starts: bool = True) -> tuple[int, ...]:
    name, settings = AGENT_SETTINGS[kind]
    plans = [[task.uniform_widths(task.budget)]] if starts else []
    found = make_agent(name, settings).search(SearchRequest([task], [account], starts=plans, seed=1))
    return tuple(int(w) for w in found.widths())


def test_every_registered_agent_is_tried() -> None:
    assert {name for name, _ in AGENT_SETTINGS.values()} == {
        name for name, entry in AGENTS.items() if not entry.on_request
    }


@pytest.mark.filterwarnings("ignore:uniform pruning scores")
@pytest.mark.parametrize("starts", [True, False], ids=["with starts", "without starts"])
@pytest.mark.parametrize("kind", AGENT_SETTINGS)
@pytest.mark.parametrize("space", SPACES)
def test_a_search_ends_with_the_best_of_its_account(kind: str, space: str, starts: bool) -> None:
    torch.set_num_threads(1)
    task = SPACES[space].task()
    account = account_of(task)
    widths = search(kind, task, account, starts)
    target = task.space.target(task.budget) * (1 + 1e-12)
    assert task.space.cost(np.array(widths)) <= target
    assert 1 <= account.spent <= EVALUATIONS
    plans = np.array([c.widths for c in account.history])
    assert (plans == plans[:, task.space.leaders]).all()
    within = [c for c in account.history if c.cost <= target]
    if kind != "ppo_stages":  # the score of its plans depends on the way that led there
        assert task.evaluator.evaluate(widths).score == max(c.score for c in within)


def test_a_function_of_a_user_ends_where_nothing_is_new() -> None:
    task = SPACES["two groups"].task()
    account = account_of(task)
    asked = []

    def forever(context: SearchContext) -> None:
        while context.left:
            asked.append(context.evaluate(context.project(context.generator.uniform(0.1, 1.0, 2))))

    found = FunctionAgent(forever).search(SearchRequest([task], [account], seed=1))
    assert len(asked) > account.spent, "repeats are free, up to a limit"
    assert task.evaluator.evaluate(found.widths()).score == max(c.score for c in account.history)


@pytest.mark.parametrize("budget", [(0.6, 0.6), (0.5, 0.9)])
@pytest.mark.parametrize("kind", ["surrogate", "direct", "random", "ppo_sequential", "sac"])
def test_several_tasks_and_a_range(kind: str, budget: tuple[float, float]) -> None:
    tasks = [Small(2, 8, 0.7).task(), replace(Small(2, 8, 0.7).task(), budget=budget)]
    accounts = [account_of(task) for task in tasks]
    name, settings = AGENT_SETTINGS[kind]
    found = make_agent(name, settings).search(SearchRequest(tasks, accounts, seed=1))
    for index, (task, account) in enumerate(zip(tasks, accounts, strict=True)):
        limit = task.space.target(task.highest_budget) * (1 + 1e-12)
        best = max(c.score for c in account.history if c.cost <= limit)
        assert task.evaluator.evaluate(found.widths(index)).score == best


def test_a_space_that_can_be_read_to_the_end_is() -> None:
    task = SPACES["two groups"].task()
    account = account_of(task, 200)
    widths = search("random", task, account)
    assert {c.widths for c in account.history} <= set(all_plans(task))
    best = max(all_plans(task), key=lambda plan: task.evaluator.evaluate(plan).score)
    assert task.evaluator.evaluate(widths).score == task.evaluator.evaluate(best).score
