"""The surrogate that models the logits of scored plans, on a small real workload."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from helpers.small import SMALL_RUN
from helpers.synthetic import FakeEvaluator
from rlprune.config.config import load_config
from rlprune.envs.task import Task
from rlprune.evaluation.evaluator import Evaluator
from rlprune.evaluation.logit_cache import MOST_LOGITS, MOST_PLANS, LogitCache
from rlprune.experiments.prepare import Experiment, prepare_experiment
from rlprune.experiments.train import train
from rlprune.language.judge import OUTPUT_TOKENS, bucketed
from rlprune.pruning.history import History
from rlprune.surrogates import logit_gp as expectation
from rlprune.surrogates.composite import CompositeGP
from rlprune.surrogates.divergence import Divergences
from rlprune.surrogates.logit_changes import Changes
from rlprune.surrogates.logit_gp import LogitGP
from rlprune.surrogates.proposals import choose_batch, random_plans


@pytest.fixture(scope="module")
def experiment() -> Experiment:
    torch.set_num_threads(1)
    return prepare_experiment(load_config("digits", SMALL_RUN))


@pytest.fixture(scope="module")
def language() -> Experiment:
    torch.set_num_threads(1)
    small = ["model.arguments={layers: 2, hidden: 32, heads: 4, kv_heads: 2, intermediate: 48, vocab: 300}"]
    small += ["model.train.epochs=1", "data.sequence_length=16", "data.train=64", "data.calibration=8"]
    small += ["data.validation=6", "data.test=6", f"score.top_k={OUTPUT_TOKENS}", "budget.target=0.6"]
    return prepare_experiment(load_config("tiny_llama", small))


@pytest.fixture
def task(experiment: Experiment) -> Task:
    return Task(experiment.evaluator.fork(), 0.5, "macs", base_rule="uniform")


def scored_at(task: Task, budget: float, count: int = 10, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    plans = random_plans(task, budget, count, np.random.default_rng(seed))
    return plans, np.array([task.evaluator.evaluate(plan).score for plan in plans])


def scored(task: Task, count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    return scored_at(task, 0.5, count, seed)


def test_a_known_plan_is_predicted_as_it_was_scored(task: Task) -> None:
    assert CompositeGP.applies(task)
    model = CompositeGP(task)
    plans, scores = scored(task, 12)
    model.fit(plans, scores)
    mean, deviation = model.predict(plans)
    # The process fits its own noise, and processors train other dense models: nearly all of the differences are known.
    logs = -np.log(-scores)
    assert np.mean((mean - logs) ** 2) < 0.1 * np.var(logs)
    other, _ = scored(task, 20, seed=1)
    assert deviation.max() < np.median(model.predict(other)[1])


def test_other_plans_are_put_in_order(task: Task) -> None:
    model = CompositeGP(task)
    model.fit(*scored(task, 40))
    plans, scores = scored(task, 40, seed=1)
    assert spearmanr(model.predict(plans)[0], scores)[0] > 0.6


def test_the_joint_covariance_fits_the_deviations_and_a_batch_has_no_twins(task: Task) -> None:
    model = CompositeGP(task)
    model.fit(*scored(task, 12))
    plans, _ = scored(task, 20, seed=1)
    mean, covariance = model.covariance(plans)
    single, deviation = model.predict(plans)
    assert mean == pytest.approx(single) and np.sqrt(np.diagonal(covariance)) == pytest.approx(deviation)
    assert np.linalg.eigvalsh(covariance).min() > -1e-8
    picked = choose_batch(model, plans, 6, (0.0, 1.0, 2.0))
    assert len(set(picked)) == 6
    assert choose_batch(model, plans[:0], 6, (0.0, 1.0, 2.0)) == []  # a small space has no plan left


def test_a_model_that_goes_on_from_a_saved_state_is_the_same(task: Task) -> None:
    plans, scores = scored(task, 24)
    first = CompositeGP(task)
    first.fit(plans[:16], scores[:16])
    saved = first.theta
    first.fit(plans, scores)
    second = CompositeGP(task)
    second.theta = saved
    second.fit(plans, scores)
    other, _ = scored(task, 8, seed=1)
    assert np.array_equal(first.predict(other)[0], second.predict(other)[0])


def test_logits_cost_no_evaluation_and_are_the_same_when_computed_again(experiment: Experiment) -> None:
    evaluator = experiment.evaluator.fork()
    evaluator._bank = {}  # nothing has been scored yet
    logits = evaluator.logit_cache()
    assert logits is not None and evaluator.logit_cache() is logits
    plan = tuple(int(w) for w in experiment.rule_widths("uniform"))
    score = evaluator.evaluate(plan).score
    kept = logits.take((plan,))
    assert torch.equal(kept, logits.take((plan,))) and kept.shape == logits.dense.shape
    log_dense, log_plan = logits.dense.log_softmax(dim=1), kept.log_softmax(dim=1)
    divergence = (log_dense.exp() * (log_dense - log_plan)).sum(dim=1).mean()
    assert score == pytest.approx(-float(divergence), rel=1e-5)


def test_a_run_computes_no_logits_of_a_scored_plan_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    again: list[History] = []
    outputs = Evaluator._outputs
    monkeypatch.setattr(Evaluator, "_outputs", lambda self, plan: again.append(plan) or outputs(self, plan))
    settings = [*SMALL_RUN, "search.evaluations=12", "search.baselines=[random]", "threads=1"]
    train(load_config("digits", settings), tmp_path / "run")
    # The dense model was scored before anybody knew who would ask.
    assert len(again) <= 1, f"{len(again)} candidates more than were charged for"


def test_logits_that_nobody_takes_are_dropped() -> None:
    outputs = torch.zeros(3, 2)
    logits = LogitCache(outputs, lambda history: outputs - 1.0)
    for number in range(MOST_PLANS + 1):
        logits.keep(((number,),), outputs + number)
    assert torch.equal(logits.take(((MOST_PLANS,),)), outputs + MOST_PLANS)
    assert torch.equal(logits.take(((0,),)), outputs - 1.0), "the oldest are computed when they are asked for"


def test_the_log_probabilities_of_a_language_model_tell_its_score(language: Experiment) -> None:
    evaluator = language.evaluator.fork()
    evaluator._bank = {}
    logits = evaluator.logit_cache()
    assert logits is not None
    plan = tuple(int(w) for w in language.rule_widths("uniform"))
    score = evaluator.evaluate(plan).score
    kept = logits.take((plan,))
    tokens = 6 * 15  # all but the first of each sequence
    assert kept.shape == (tokens, OUTPUT_TOKENS + 1) == logits.dense.shape
    assert torch.allclose(kept.exp().sum(dim=1), torch.ones(tokens), atol=1e-5)
    # top_k is the number of columns here, so the divergence of the columns is the score's.
    divergence = (logits.dense.exp() * (logits.dense - kept)).sum(dim=1).mean()
    assert score == pytest.approx(-float(divergence), rel=1e-3) and score < -1e-3
    task = Task(evaluator, 0.6, "block_params")
    model = CompositeGP(task)
    plans = random_plans(task, 0.6, 12, np.random.default_rng(0))
    scores = np.array([evaluator.evaluate(p).score for p in plans])
    model.fit(plans, scores)
    assert np.exp(-model.predict(plans)[0]) == pytest.approx(-scores, rel=0.1)


def test_a_bucket_is_left_where_the_tokens_are_the_vocabulary() -> None:
    logs = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)).log_softmax(dim=1)
    tokens = logs.argsort(dim=1, descending=True)
    found = bucketed(tokens, logs)
    assert torch.equal(found[:, :4], logs.gather(1, tokens)) and (found[:, 4] < -15).all()
    some = bucketed(tokens[:, :2], logs)
    assert torch.allclose(some.exp().sum(dim=1), torch.ones(5))


def test_moments_do_not_depend_on_when_they_are_asked_for() -> None:
    """A resumed search takes all of its plans in at once."""
    rows = torch.randn(40, 3000, generator=torch.Generator().manual_seed(0))
    shifts = torch.randn(40, 300, generator=torch.Generator().manual_seed(1))
    often, once = Changes(3000, 10), Changes(3000, 10)
    for i, (row, shift) in enumerate(zip(rows, shifts, strict=True)):
        often.append(row, shift)
        once.append(row, shift)
        if i % 6 == 0:
            often.gram()
    assert torch.equal(often.gram(), once.gram())
    raw = rows + shifts.repeat(1, 10)
    assert torch.allclose(once.gram()[1:, 1:], (raw @ raw.T).double() / 3000, atol=1e-5)


def test_one_model_serves_a_range_of_budgets(experiment: Experiment) -> None:
    task = Task(experiment.evaluator.fork(), (0.3, 0.7), "macs", base_rule="uniform")
    model = CompositeGP(task)
    plans, scores = (
        np.concatenate(parts)
        for parts in zip(*(scored_at(task, b) for b in task.anchor_budgets), strict=True)
    )
    model.fit(plans, scores)
    for budget in (0.4, 0.6):
        others, found = scored_at(task, budget, seed=1)
        assert spearmanr(model.predict(others)[0], found)[0] > 0.5


def test_the_kernel_is_fitted_to_so_many_plans_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    """The predictions use all of them all the same."""
    generator = torch.Generator().manual_seed(0)
    effects, dense = torch.randn(2, 20, 3, generator=generator), torch.randn(20, 3, generator=generator)
    model = LogitGP(np.array([64, 64]), dense)
    seen, adapted = [], expectation.adapted

    def spy(scales: torch.Tensor, x: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen.append(len(x))
        return adapted(scales, x, *rest)

    monkeypatch.setattr(expectation, "adapted", spy)
    monkeypatch.setattr(expectation, "_FIT_PLANS", 12)
    plans = [(a, b) for a in (8, 20, 32, 44, 60) for b in (8, 20, 32, 44, 60)]
    for count, plan in enumerate(plans):
        model.learn(plan, dense + sum((1 - w / 64) * e for w, e in zip(plan, effects, strict=True)))
        if count % 7 == 0:
            model.fit()
    model.fit()
    assert seen[0] == 2 and max(seen) == seen[-1] == 12
    centre, _ = model.expected(plans)
    assert centre == pytest.approx([model.known[p] for p in plans], rel=0.05, abs=1e-3)
    changes = torch.stack([sum((1 - w / 64) * e for w, e in zip(p, effects, strict=True)) for p in plans])
    changes = changes.flatten(1)
    assert torch.allclose(model._changes.gram()[1:, 1:], (changes @ changes.T).double() / 60, rtol=1e-4)


def test_what_is_kept_of_many_classes_is_bounded() -> None:
    outputs = torch.arange(300.0)[:, None].expand(300, 1000)
    logits = LogitCache(outputs, lambda history: outputs + 1.0)
    logits.keep("plan", outputs + 2.0)
    assert logits.dense.numel() <= MOST_LOGITS and len(logits.dense) == 60
    assert logits.dense.untyped_storage().nbytes() <= 4 * MOST_LOGITS, "no view that holds the whole"
    assert torch.equal(logits.take("plan"), logits.dense + 2.0)
    assert torch.equal(logits.take("plan"), logits.dense + 1.0), "handed over once, then computed"


def test_scores_are_modelled_where_logits_do_not_tell_them() -> None:
    assert not CompositeGP.applies(Task(FakeEvaluator(4), 0.5))
    for settings in (["score.kind=loss"], ["score.rungs=[16,32]"]):
        other = prepare_experiment(load_config("digits", [*SMALL_RUN, *settings]))
        assert not CompositeGP.applies(Task(other.evaluator, 0.5, "macs"))


def test_a_diverged_plan_is_only_far_away() -> None:
    model = LogitGP(np.array([8, 8]), torch.randn(20, 3, generator=torch.Generator().manual_seed(0)))
    for widths in ([4, 4], [6, 2], [2, 6]):
        model.learn(widths, torch.randn(20, 3, generator=torch.Generator().manual_seed(sum(widths))))
    assert np.isfinite(model.learn([1, 1], torch.full((20, 3), torch.nan)))
    model.fit()
    assert all(np.isfinite(part).all() for part in model.expected([[3, 3], [8, 8]]))


@pytest.mark.parametrize("variance", [0.0, 0.01, 1.0, 25.0, 400.0])
@pytest.mark.parametrize("certain", [0.0, 8.0])
def test_what_uncertain_logits_add_is_what_sampling_them_adds(variance: float, certain: float) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(100, 10, generator=generator)
    logits[..., 3] += certain
    noise = torch.randn(4000, 100, 10, generator=generator) * variance**0.5
    log_p = logits.log_softmax(dim=-1)

    def divergence(others: torch.Tensor) -> torch.Tensor:
        return (log_p.exp() * (log_p - others.log_softmax(dim=-1))).sum(dim=-1).mean(dim=-1)

    sampled = float((divergence(logits + noise) - divergence(logits)).mean())
    divergences = Divergences(logits)
    centred = divergences.centred(logits)[0][None].repeat(2, 1)
    # Beside a plan whose exponents leave float32.
    found = divergences.expected(centred, torch.tensor([variance, 1e5], dtype=torch.float64))[1]
    assert float(found[0]) == pytest.approx(sampled, rel=0.25, abs=2e-3)
    assert float(found[1]) == pytest.approx(1e5**0.5 * 1.54, rel=0.3)  # the largest of ten normal numbers


def test_a_plan_that_is_like_no_known_one_is_not_expected_to_be_good() -> None:
    """The expected logits are the dense model's there; their divergence is not what is to be expected."""
    generator = torch.Generator().manual_seed(2)
    dense = 8.0 * torch.randn(60, 5, generator=generator)
    model = LogitGP(np.array([64] * 6), dense)
    for seed in range(8):
        plan = np.random.default_rng(seed).integers(24, 40, size=6)
        model.learn(plan, dense + 6.0 * torch.randn(60, 5, generator=generator))
    model.fit(adapt=False)
    far = [[1, 1, 1, 1, 1, 1]]
    centre, spread = model.expected(far)
    least = min(model.known.values())
    assert centre[0] < 0.5 * least < (centre + spread)[0]
