"""The surrogate that models the logits of scored plans, on a small real workload."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from small import SMALL_DIGITS
from synthetic import FakeEvaluator

from rlprune.agents.composite import CompositeModel
from rlprune.agents.proposals import choose_batch, random_plans
from rlprune.config import load_config
from rlprune.envs.task import Task
from rlprune.expectation import LogitModel
from rlprune.kept_logits import MOST_LOGITS, KeptLogits
from rlprune.problem import Problem, prepare


@pytest.fixture(scope="module")
def problem() -> Problem:
    torch.set_num_threads(1)
    return prepare(load_config("digits", SMALL_DIGITS))


@pytest.fixture
def task(problem: Problem) -> Task:
    return Task(problem.evaluator.fork(), 0.5, "macs", base_rule="uniform")


def scored(task: Task, count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    plans = random_plans(task, 0.5, count, np.random.default_rng(seed))
    return plans, np.array([task.evaluator.evaluate(plan).score for plan in plans])


def test_a_known_plan_is_predicted_as_it_was_scored(task: Task) -> None:
    assert CompositeModel.applies(task)
    model = CompositeModel(task)
    plans, scores = scored(task, 12)
    model.fit(plans, scores)
    mean, deviation = model.predict(plans)
    assert np.exp(-mean) == pytest.approx(-scores, rel=0.1)
    other, _ = scored(task, 20, seed=1)
    assert deviation.max() < np.median(model.predict(other)[1])


def test_other_plans_are_put_in_order(task: Task) -> None:
    model = CompositeModel(task)
    model.fit(*scored(task, 40))
    plans, scores = scored(task, 40, seed=1)
    assert spearmanr(model.predict(plans)[0], scores)[0] > 0.6


def test_the_joint_covariance_fits_the_deviations_and_a_batch_has_no_twins(task: Task) -> None:
    model = CompositeModel(task)
    model.fit(*scored(task, 12))
    plans, _ = scored(task, 20, seed=1)
    mean, covariance = model.covariance(plans)
    single, deviation = model.predict(plans)
    assert mean == pytest.approx(single) and np.sqrt(np.diagonal(covariance)) == pytest.approx(deviation)
    assert np.linalg.eigvalsh(covariance).min() > -1e-8
    picked = choose_batch(model, plans, 6, (0.0, 1.0, 2.0))
    assert len(set(picked)) == 6


def test_a_model_that_goes_on_from_a_saved_state_is_the_same(task: Task) -> None:
    plans, scores = scored(task, 24)
    first = CompositeModel(task)
    first.fit(plans[:16], scores[:16])
    saved = first.theta
    first.fit(plans, scores)
    second = CompositeModel(task)
    second.theta = saved
    second.fit(plans, scores)
    other, _ = scored(task, 8, seed=1)
    assert np.array_equal(first.predict(other)[0], second.predict(other)[0])


def test_logits_cost_no_evaluation_and_are_the_same_when_computed_again(problem: Problem) -> None:
    evaluator = problem.evaluator.fork()
    evaluator._bank = {}  # nothing has been scored yet
    logits = evaluator.kept_logits()
    assert logits is not None and evaluator.kept_logits() is logits
    plan = tuple(int(w) for w in problem.rule_widths("uniform"))
    score = evaluator.evaluate(plan).score
    kept = logits.take((plan,))
    assert torch.equal(kept, logits.take((plan,))) and kept.shape == logits.dense.shape
    log_dense, log_plan = logits.dense.log_softmax(dim=1), kept.log_softmax(dim=1)
    divergence = (log_dense.exp() * (log_dense - log_plan)).sum(dim=1).mean()
    assert score == pytest.approx(-float(divergence), rel=1e-5)


def test_what_is_kept_of_many_classes_is_bounded() -> None:
    outputs = torch.arange(300.0)[:, None].expand(300, 1000)
    logits = KeptLogits(outputs, lambda history: outputs + 1.0)
    logits.keep("plan", outputs + 2.0)
    assert logits.dense.numel() <= MOST_LOGITS and len(logits.dense) == 60
    assert logits.dense.untyped_storage().nbytes() <= 4 * MOST_LOGITS, "no view that holds the whole"
    assert torch.equal(logits.take("plan"), logits.dense + 2.0)
    assert torch.equal(logits.take("plan"), logits.dense + 1.0), "handed over once, then computed"


def test_scores_are_modelled_where_logits_do_not_tell_them(problem: Problem) -> None:
    assert not CompositeModel.applies(Task(problem.evaluator.fork(), (0.3, 0.6), "macs"))
    assert not CompositeModel.applies(Task(FakeEvaluator(4), 0.5))
    for settings in (["score.kind=loss"], ["score.rungs=[16,32]"]):
        other = prepare(load_config("digits", [*SMALL_DIGITS, *settings]))
        assert not CompositeModel.applies(Task(other.evaluator, 0.5, "macs"))


def test_a_diverged_plan_is_only_far_away() -> None:
    model = LogitModel(np.array([8, 8]), torch.randn(20, 3, generator=torch.Generator().manual_seed(0)))
    for widths in ([4, 4], [6, 2], [2, 6]):
        model.learn(widths, torch.randn(20, 3, generator=torch.Generator().manual_seed(sum(widths))))
    assert np.isfinite(model.learn([1, 1], torch.full((20, 3), torch.nan)))
    model.fit()
    assert all(np.isfinite(part).all() for part in model.expected([[3, 3], [8, 8]]))
