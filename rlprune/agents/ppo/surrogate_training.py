"""Surrogate training: batches of real evaluations, and between them PPO on a fitted model of the score.

A batch: fit a Gaussian process to all that an account has scored, let PPO take its thousands of steps
on it, and score next what the process finds most promising among the policy's mode, samples of the
policy, and small changes of the best plans. A range of budgets is searched at several of them in turn, all
with one process; at the end the policy is taught the best plan of each, and those of several checkpoints
(:mod:`.distill`).
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import TypedDict, cast

import numpy as np
import torch

from ...envs.task import Task
from ...evaluation.ledger import BudgetExhausted
from ...pruning.budget import BudgetLike
from ...pruning.history import History, all_final_widths, as_history, final_widths
from ...surrogates.base import Surrogate
from ...surrogates.composite import CompositeGP
from ...surrogates.probes import ProbedModel
from ...surrogates.proposals import choose_batch, climb, fresh, neighbours, random_plans
from ...surrogates.score_gp import ScoreGP
from ...utils.arrays import Floats32, Ints
from ..base import SearchResult, TrialRecorder
from ..sb3_internals import reset_before_rollout
from .behaviour_cloning import COMMON_PLANS, clone_behaviour, demonstrations
from .policy import GroupPolicy
from .surrogate_env import SurrogateVecEnv
from .trainer import (
    Search,
    TrainingState,
    derived_seed,
    make_ppo,
    restore_training,
    seed_everything,
    training_state,
)
from .transfer import can_build, collect

MODE = "surrogate"
# PPO on the surrogate: steps are cheap and an update is not, so its rollouts are long (about so many steps, as many
# as make up what is asked for), their minibatches few, and its epochs too.
_ROLLOUT = 256
_MINIBATCHES = 2
_EPOCHS = 4
# Logarithm of the first deviation: the surrogate is asked thousands of times, so it can be wide.
_LOG_STD = -1.0
# Plans of each kind that compete for a place in the next batch.
_SAMPLES = 128
_NEIGHBOURS = 192
_PARENTS = 5
# Probed plans that compete too, where experience has probed the checkpoint.
_PROMISING = 24


class _State(TypedDict):
    """What a killed search goes on from."""

    batch: int
    training: TrainingState
    thetas: list[list[float] | None]
    pending: list[list[list[History]]]


class SurrogateTrainer:
    """The parts of a running surrogate search."""

    def __init__(self, search: Search) -> None:
        self.search = search
        self.plan_memory = None if search.policy is None else search.policy.plan_memory
        if self.plan_memory is not None and not all(can_build(t) for t in search.tasks):
            self.plan_memory = None
        self.models = [self._model(task) for task in search.tasks]
        # Batches that have been chosen and not scored, the oldest first: of each task its plans.
        self.pending: deque[list[list[History]]] = deque()
        settings = search.settings.ppo
        envs = max(2, settings.surrogate_envs, len(search.tasks))
        self.venv = SurrogateVecEnv(
            search.env, self.models, envs, settings.kappa, derived_seed(search.seed, 3)
        )
        rollouts = max(1, round(self.steps / _ROLLOUT))
        n_steps = max(1, -(-self.steps // (rollouts * envs)))
        rollout = n_steps * envs
        batch = max(d for d in range(1, rollout + 1) if rollout % d == 0 and d <= rollout // _MINIBATCHES)
        self.ppo = make_ppo(
            search, self.venv, n_steps=n_steps, batch_size=batch, n_epochs=_EPOCHS, log_std_init=_LOG_STD
        )

    def _model(self, task: Task) -> Surrogate:
        if self.plan_memory is not None and self.search.policy is not None:
            # Probes, where that has not been done.
            self.search.policy.widths(task, task.highest_budget, task.metric)
            return ProbedModel(task)
        if self.search.settings.ppo.surrogate == "logits" and CompositeGP.applies(task):
            return CompositeGP(task)
        cost = partial(task.space.cost, metric=task.metric) if task.is_range else None
        return ScoreGP(task.space.widths, task.evaluator.dense.score, task.expected, cost)

    @property
    def batch(self) -> int:
        """Evaluations between two fits."""
        asked = self.search.settings.batch
        most = [asked if model.batch is None else model.batch for model in self.models]
        batch = min(asked, sum(most))
        # With one half being scored while the other is chosen, a plan is chosen with as few unknown as in a whole one.
        return -(-batch // 2) if self.search.settings.ahead else batch

    @property
    def steps(self) -> int:
        """PPO's steps between two fits, in proportion to the evaluations."""
        settings = self.search.settings
        return -(-settings.ppo.surrogate_steps * self.batch // settings.batch)

    @property
    def informed(self) -> bool:
        """Whether the models have something to say before the first batch."""
        known = min(len(recorder.scores) for recorder in self.search.recorders)
        return all(model.ready(known) for model in self.models)

    @property
    def policy(self) -> GroupPolicy:
        policy = self.ppo.policy
        assert isinstance(policy, GroupPolicy)
        return policy

    def pending_of(self, index: int) -> list[History]:
        """Plans of a task that have been chosen and not scored."""
        return [plan for chosen in self.pending for plan in chosen[index]]

    def known(self, index: int) -> set[History]:
        """Plans of a task that were asked for, or will be."""
        return self.search.recorders[index].known | set(self.pending_of(index))

    def left(self, index: int) -> int:
        """Evaluations that a task's next batches can spend."""
        return max(0, self.search.recorders[index].account.left - len(self.pending_of(index)))

    @property
    def ends(self) -> bool:
        """Whether the next batch spends what is left of every account."""
        share = max(1, self.batch // len(self.search.tasks))
        return all(self.left(index) <= share for index in range(len(self.search.tasks)))

    def forces_mode(self, batch: int, index: int, count: int) -> bool:
        """Whether the policy's mode has a place in a batch of ``count`` plans whatever the surrogate says of it.

        Once in `search.batch` evaluations, so in every third batch where the model asks for smaller ones, and in every
        other of the half batches that are chosen ahead; always in the last one. Never where few evaluations are spent
        with experience: that knows better what is worth them.
        """
        if self.plan_memory is not None:
            return False
        every = max(1, round(self.search.settings.batch / self.batch))
        return batch % every == 0 or self.left(index) <= count

    def save(self, batch: int) -> None:
        contents: _State = {
            "batch": batch,
            "training": training_state(self.ppo),
            "thetas": [model.theta for model in self.models],
            "pending": list(self.pending),
        }
        self.search.save(MODE, contents)

    def restore(self, saved: _State) -> int:
        restore_training(self.ppo, saved["training"])
        for model, theta in zip(self.models, saved["thetas"], strict=True):
            model.theta = theta
        for chosen in saved.get("pending", []):  # states of older versions have none
            self.pending.append([[as_history(plan) for plan in plans] for plans in chosen])
            self.begin(self.pending[-1])
        return int(saved["batch"])

    def begin(self, chosen: Sequence[Sequence[History]]) -> None:
        """Let workers begin with a batch."""
        for recorder, plans in zip(self.search.recorders, chosen, strict=True):
            recorder.prefetch(plans)

    def score_oldest(self) -> None:
        """Score the batch that was chosen first among those that are pending."""
        chosen = self.pending.popleft()
        for recorder, plans in zip(self.search.recorders, chosen, strict=True):
            recorder.evaluate_batch(plans)

    def fit(self) -> None:
        for model, recorder in zip(self.models, self.search.recorders, strict=True):
            widths = all_final_widths(recorder.scores)
            model.fit(widths, np.array([c.score for c in recorder.scores.values()]))

    def train(self, batch: int) -> None:
        """PPO's steps on the freshly fitted surrogate."""
        seed_everything(self.search.seed, 1, batch)
        self.venv.reseed(derived_seed(self.search.seed, 4, batch))
        reset_before_rollout(self.ppo)  # so that nothing of the last batch has to be saved
        if self.steps:
            self.ppo.learn(self.steps, reset_num_timesteps=False)

    def budget(self, task: Task, batch: int) -> BudgetLike:
        return task.anchor_budgets[batch % len(task.anchor_budgets)]

    def clone_plans(self) -> None:
        """Teach the policy the best plans: of several checkpoints, where these have plans in common, and of a range."""
        search = self.search
        several = len(search.tasks) > 1 and all(task.common_plans for task in search.tasks)
        if not several and not search.tasks[0].is_range:
            return
        seed_everything(search.seed, 7)
        wanted = []
        for task, recorder in zip(search.tasks, search.recorders, strict=True):
            plans = [(b, [final_widths(p) for p in recorder.within(task, b)]) for b in task.anchor_budgets]
            best = [(budget, found[0]) for budget, found in plans if found]
            more = [(b, p.astype(np.float64), 1.0) for b, found in plans for p in found[1:COMMON_PLANS]]
            wanted.append(demonstrations(best) + (more if several else []))
        clone_behaviour(self.policy, search.env, search.tasks, wanted, common=several)


def surrogate_search(search: Search) -> SearchResult:
    """Spend the accounts batch by batch; the last batch holds the mode of the policy that is returned, unless that
    is taught other plans at the end."""
    trainer = SurrogateTrainer(search)
    saved = search.load(MODE)
    batch = 0
    try:
        if saved is None:
            search.score_starts()
        else:
            with search.restoring():
                batch = trainer.restore(cast("_State", saved))
        while trainer.pending or any(recorder.account.left > 0 for recorder in search.recorders):
            trainer.save(batch)
            before = sum(recorder.account.spent for recorder in search.recorders)
            found = _choose_batch(trainer, batch)
            batch += 1
            # The last batch is chosen with all that can be known.
            ahead = 0 if trainer.ends else search.settings.ahead
            while trainer.pending and (len(trainer.pending) > ahead or not found):
                trainer.score_oldest()
                found = True
            spent = sum(recorder.account.spent for recorder in search.recorders)
            if spent == before and not trainer.pending:
                break  # nothing left that has not been scored: the space is smaller than the account
    except BudgetExhausted:
        pass
    # A base rule that probes may have nothing left to ask at the budgets between those that were searched.
    with contextlib.suppress(BudgetExhausted):
        trainer.clone_plans()
    scored = [recorder.scores for recorder in search.recorders]
    trainer.policy.plan_memory = collect(search.tasks, scored)
    return search.result(trainer.policy)


def _choose_batch(trainer: SurrogateTrainer, batch: int) -> bool:
    """Train on what is known, and add a batch to the pending ones; whether there is anything in it."""
    search = trainer.search
    generator = np.random.default_rng([search.seed, 5, batch])
    per_task = max(1, trainer.batch // len(search.tasks))
    informed = batch > search.settings.ahead or trainer.informed
    if not any(trainer.left(index) for index in range(len(search.tasks))):
        return False
    if informed:
        trainer.fit()
        trainer.train(batch)
    chosen: list[list[History]] = []
    for index, task in enumerate(search.tasks):
        count = min(per_task, trainer.left(index))
        budget = trainer.budget(task, batch + index)
        if not informed:
            plans = first_plans(trainer, index, budget, count, generator)
        else:
            forced = trainer.forces_mode(batch, index, count)
            plans = next_plans(trainer, index, budget, count, generator, forced)
        chosen.append([as_history(plan) for plan in plans[:count]])
    trainer.pending.append(chosen)
    trainer.begin(chosen)
    return any(chosen)


def first_plans(
    trainer: SurrogateTrainer, index: int, budget: BudgetLike, count: int, generator: np.random.Generator
) -> Ints:
    """The policy's mode (untrained: the base plan), samples around it, and as many random plans.

    Where costs are expected before any evaluation, plans far from the starts are known to be bad: small
    changes of the best start take the random plans' place.
    """
    task, recorder = trainer.search.tasks[index], trainer.search.recorders[index]
    seed_everything(trainer.search.seed, 6, index)
    known = trainer.known(index)
    around = fresh(_policy_plans(trainer, index, budget), known)[: -(-count // 2)]
    parents = _parents(task, recorder, budget, around)
    if trainer.models[index].informed(parents):
        anywhere = neighbours(task, parents, budget, 4 * count, generator)
    else:
        anywhere = random_plans(task, budget, 4 * count, generator)
    return fresh(np.vstack([around, anywhere]), known)


def next_plans(
    trainer: SurrogateTrainer,
    index: int,
    budget: BudgetLike,
    count: int,
    generator: np.random.Generator,
    forced: bool,
) -> Ints:
    """The policy's mode first where it is forced, then what the surrogate ranks highest among all proposals."""
    task, recorder = trainer.search.tasks[index], trainer.search.recorders[index]
    model = trainer.models[index]
    samples = _policy_plans(trainer, index, budget)
    known, pending = trainer.known(index), all_final_widths(trainer.pending_of(index))
    mode = fresh(samples[:1], known)
    parents = np.vstack([_parents(task, recorder, budget, samples), model.promising(_PROMISING)])
    climbed = climb(task, parents, budget, model.predict, model.climbs, generator)
    changed = neighbours(task, parents, budget, _NEIGHBOURS, generator)
    pool = fresh(np.vstack([mode, climbed, parents, samples, changed]), known)
    if not len(pool):  # a space that is smaller than the account
        return pool
    chosen: list[int] = [0] if len(mode) and forced else []
    if not len(pending):
        return pool[choose_batch(model, pool, count, model.kappas, chosen)]
    # What is being scored counts as known, as the picks of one batch do for each other.
    before = len(pending)
    first = [*range(before), *(before + row for row in chosen)]
    picks = choose_batch(model, np.vstack([pending, pool]), before + count, model.kappas, first)
    return pool[[pick - before for pick in picks[before:]]]


def _parents(task: Task, recorder: TrialRecorder, budget: BudgetLike, samples: Ints) -> Ints:
    """The best plans within the budget, the best plans of other budgets brought to this one, the policy's mode."""
    within = recorder.within(task, budget)[:_PARENTS]
    best = all_final_widths(within).reshape(-1, samples.shape[1])
    others = [recorder.within(task, other)[:1] for other in task.anchor_budgets if other != budget]
    shares = [1.0 - final_widths(found[0]) / task.space.widths for found in others if found]
    if not shares:
        return np.vstack([best, samples[:1]])
    moved = task.space.project(np.maximum(shares, 1e-4), budget, task.metric)
    return np.vstack([best, moved, samples[:1]])


def _policy_plans(trainer: SurrogateTrainer, index: int, budget: BudgetLike) -> Ints:
    """Plans of the policy: its mode (row 0) and samples."""
    task, policy = trainer.search.tasks[index], trainer.policy
    obs, _ = trainer.search.env.reset(options={"task": index, "budget": budget})
    rows = torch.from_numpy(np.repeat(obs[None], _SAMPLES, axis=0))
    with torch.no_grad():
        distribution = policy.get_distribution(rows)
        actions: Floats32 = distribution.sample().numpy()
        actions[0] = distribution.mode().numpy()[0]
    return task.widths(np.clip(actions[:, : len(task.space.groups)], -1.0, 1.0), budget)
