"""Candidates scored by workers: the same candidates, logits and parts, and the ledger of a search without workers."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pytest
import torch

from helpers.executors import Elsewhere
from helpers.language_workload import evaluator_of, workload_of
from helpers.lm import tiny_lm
from helpers.small import SMALL_RUN
from rlprune.agents import SearchRequest, StateDir, make_agent
from rlprune.config.config import load_config
from rlprune.config.search import AMCConfig, GPConfig, PPOConfig, SearchConfig
from rlprune.envs.task import Task
from rlprune.errors import ConfigError, DataError, RunError
from rlprune.evaluation.evaluator import Evaluator
from rlprune.evaluation.ledger import EvaluationBudget, EvaluationLog
from rlprune.evaluation.parallel import check_proof, proof_of, workers_of
from rlprune.experiments.prepare import Experiment, prepare_experiment
from rlprune.pruning.history import as_history
from rlprune.surrogates.proposals import random_plans

SMALL = PPOConfig(hidden=8, surrogate_steps=128, surrogate_envs=16, n_steps=8, batch_size=8, n_epochs=1)
LIMIT = 18
SEARCHES = {
    "random": SearchConfig(),
    "evopress": SearchConfig(),
    "rl_pruner": SearchConfig(),
    "bypass": SearchConfig(),
    "ppo": SearchConfig(ppo=SMALL),
    "ppo ahead": SearchConfig(ppo=SMALL, ahead=2),
    "ppo direct": SearchConfig(ppo=SMALL, mode="direct"),
    "ppo scores": SearchConfig(ppo=dataclasses.replace(SMALL, surrogate="scores"), batch=5),
    "amc several": SearchConfig(amc=AMCConfig(hidden=16, batch_size=16), environments=3),
    "a2c several": SearchConfig(environments=3),
    "gp several": SearchConfig(gp=GPConfig(startup=LIMIT), environments=3),
}


@pytest.fixture(scope="module")
def experiment() -> Experiment:
    torch.set_num_threads(1)
    return prepare_experiment(load_config("digits", [*SMALL_RUN, "threads=1"]))


@pytest.fixture(scope="module")
def executor(experiment: Experiment) -> Elsewhere:
    return Elsewhere()


@pytest.fixture
def together(experiment: Experiment, executor: Elsewhere) -> Iterator[Evaluator]:
    """An evaluator with three workers that has scored nothing."""
    evaluator = experiment.evaluator.bare()
    evaluator.use_workers(workers_of(evaluator, executor))
    yield evaluator
    evaluator.use_workers(None)


def plans_of(evaluator: Any, count: int, budget: float = 0.5) -> list[Any]:
    return list(random_plans(Task(evaluator, budget), budget, count, np.random.default_rng(0)))


def without_seconds(candidate: Any) -> Any:
    return dataclasses.replace(candidate, seconds=0.0)


def searched(
    name: str, evaluator: Evaluator, state: Path | None = None, kill: int | None = None
) -> tuple[list[Any], Any]:
    """Rows of the ledger and the best plan; killed after so many rows."""
    log = EvaluationLog(None if state is None else state / "ledger.jsonl")
    account = EvaluationBudget(evaluator, log, method=name, seed=0, limit=LIMIT)
    task = Task(evaluator, 0.5)

    def progress(_: Any) -> None:
        if kill is not None and len(log.rows) >= kill:
            raise KeyboardInterrupt

    request = SearchRequest(
        [task],
        [account],
        starts=[[task.uniform_widths(0.5)]],
        seed=1,
        state=None if state is None else StateDir(state / "state"),
        progress=progress,
    )
    found = make_agent(name.split()[0], SEARCHES[name]).search(request)
    return [{k: v for k, v in row.items() if k != "seconds"} for row in log.rows], found.best


def test_workers_score_what_is_scored_here(together: Evaluator, experiment: Experiment) -> None:
    plans = plans_of(together, 4)
    alone = [experiment.evaluator.bare().evaluate(plan) for plan in plans]
    together.prefetch(plans)
    counted = together._ahead.workers.executor.done  # type: ignore[union-attr]
    found = [together.evaluate(plan) for plan in plans]
    assert [*map(without_seconds, found)] == [*map(without_seconds, alone)]
    together.prefetch(plans)
    assert together._ahead.workers.executor.done == counted, "what is known is not asked for"  # type: ignore[union-attr]


def test_a_worker_keeps_memory_as_the_first_process_does(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[bool] = []
    adapter = type(experiment.evaluator.adapter)
    monkeypatch.setattr(adapter, "keep_memory", lambda self: kept.append(True))
    cloudpickle.loads(cloudpickle.dumps(experiment.evaluator.bare()))
    assert kept, "a worker unpickles its evaluator, and makes none"


def test_logits_come_back_with_the_candidates(
    together: Evaluator, experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = plans_of(together, 2)
    alone = experiment.evaluator.bare()
    caches = alone.logit_cache(), together.logit_cache()
    together.prefetch(plans)
    for evaluator in (alone, together):
        for plan in plans:
            evaluator.evaluate(plan)
    monkeypatch.setattr(Evaluator, "_outputs", lambda *_: pytest.fail("built again"))
    for plan in map(as_history, plans):
        kept = [cache.take(plan) for cache in caches if cache is not None]
        assert len(kept) == 2 and torch.equal(*kept)


@pytest.mark.parametrize("name", SEARCHES)
def test_the_ledger_is_that_of_a_search_without_workers(
    name: str, together: Evaluator, experiment: Experiment, executor: Elsewhere
) -> None:
    before = executor.done
    rows, best = searched(name, together)
    assert (rows, best) == searched(name, experiment.evaluator.bare())
    assert len(rows) == LIMIT
    if name != "ppo direct":  # each of its steps waits for the one before
        assert executor.done - before >= LIMIT - 4, "hardly anything was scored ahead"


@pytest.mark.parametrize("name", ["ppo ahead", "random"])
def test_killed_and_resumed_with_workers(
    name: str, together: Evaluator, experiment: Experiment, tmp_path: Path
) -> None:
    for kill in (5, 11):
        with pytest.raises(KeyboardInterrupt):
            searched(name, together.fork(), tmp_path, kill)
    found = searched(name, together.fork(), tmp_path)
    assert found == searched(name, experiment.evaluator.bare())


def test_successive_halving_goes_on_from_what_workers_have_read() -> None:
    workload = workload_of(tiny_lm("llama"), sizes=(4, 6, 8, 5))
    alone, other = (evaluator_of(workload, rungs=(2, 4)) for _ in range(2))
    other.use_workers(workers_of(other, Elsewhere()))
    ledgers = []
    for evaluator in (alone, other):
        log = EvaluationLog()
        account = EvaluationBudget(evaluator, log, method="random", seed=0, limit=9)
        task = Task(evaluator, 0.7, metric="params")
        make_agent("random", SearchConfig()).search(SearchRequest([task], [account], seed=2))
        ledgers.append([{k: v for k, v in row.items() if k != "seconds"} for row in log.rows])
    assert ledgers[0] == ledgers[1]
    assert {row["samples"] for row in ledgers[0]} == {2, 4, 8}


def test_plans_that_all_score_the_same_are_still_refused(experiment: Experiment, executor: Elsewhere) -> None:
    evaluator = experiment.evaluator.bare()
    evaluator.use_workers(workers_of(evaluator, executor))
    plans = plans_of(evaluator, 8)
    evaluator.prefetch(plans)
    same = [f.result() for f in evaluator._ahead.futures.values()]  # type: ignore[union-attr]
    for future, answer in zip(evaluator._ahead.futures.values(), same, strict=True):  # type: ignore[union-attr]
        future._result = dataclasses.replace(  # type: ignore[attr-defined]
            answer, candidate=dataclasses.replace(answer.candidate, score=-1.0)
        )
    with pytest.raises(DataError, match="every one of 6 different plans scored -1.0000"):
        for plan in plans:
            evaluator.evaluate(plan)


def test_what_cannot_be_sent_is_prepared_again_or_refused(experiment: Experiment) -> None:
    evaluator = experiment.evaluator.bare()
    evaluator.workload.lock = threading.Lock()  # type: ignore[attr-defined]
    try:
        with pytest.raises(
            ConfigError, match="cannot be sent to another process .*lock.*execution.engine=serial"
        ):
            workers_of(evaluator, Elsewhere())
        evaluator.use_workers(workers_of(evaluator, Elsewhere(), experiment.rebuild))
        plan = plans_of(evaluator, 1)
        evaluator.prefetch(plan)
        found = without_seconds(evaluator.evaluate(plan[0]))
    finally:
        del evaluator.workload.lock  # type: ignore[attr-defined]
    assert found == without_seconds(experiment.evaluator.bare().evaluate(plan[0]))


def test_another_dense_model_is_refused(experiment: Experiment) -> None:
    evaluator = experiment.evaluator.bare()
    other = prepare_experiment(experiment.config.override(["model.seed=5"])).evaluator
    with pytest.raises(RunError, match="the dense model of a worker is another one: .*loss"):
        check_proof(proof_of(other), proof_of(evaluator))
    close = {name: value * (1 + 1e-7) for name, value in proof_of(evaluator).items()}
    check_proof(close, proof_of(evaluator))
