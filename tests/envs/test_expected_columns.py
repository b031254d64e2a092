"""What cuts are expected to cost, as a policy sees it and as the surrogate starts from it."""

from __future__ import annotations

import numpy as np
import pytest

from helpers.small import small_experiments
from rlprune.envs import DistributionEnv, Task
from rlprune.envs.observation import EXPECTED_SHARES, FEATURE_VERSIONS
from rlprune.experiments import Experiment
from rlprune.surrogates.composite import CompositeGP
from rlprune.surrogates.proposals import random_plans

NEW = [name for name in FEATURE_VERSIONS[3] if name not in FEATURE_VERSIONS[1]]


@pytest.fixture(scope="module")
def experiments() -> dict[str, Experiment]:
    return small_experiments()


def task_of(experiment: Experiment) -> Task:
    return Task(experiment.evaluator.fork(), 0.5, "macs", base_rule="uniform")


def test_columns_are_there_where_the_ranking_has_measured_curves(experiments):
    task, plain = task_of(experiments["obs_fisher"]), task_of(experiments["taylor"])
    assert (task.feature_version, plain.feature_version) == (3, 1)
    assert plain.expected(plain.space.widths[None]) is None
    table = task.observe(0.5)
    assert table.shape == (len(task.space.groups), len(FEATURE_VERSIONS[3]))
    assert [n for n in FEATURE_VERSIONS[3] if n not in NEW] == list(FEATURE_VERSIONS[1])
    curves = task.evaluator.calibration.curves
    for column, share in zip(NEW[:3], EXPECTED_SHARES, strict=True):
        kept = task.space.limits.floor(task.space.widths * (1.0 - share))
        costs = np.array([curves[g][task.space.widths[g] - kept[g]] for g in range(len(kept))])
        found = table[:, FEATURE_VERSIONS[3].index(column)]
        assert found == pytest.approx(np.log(costs / costs.mean() + 0.05), abs=1e-5)
        assert np.ptp(found) > 0.1


def test_a_policy_that_has_not_seen_them_keeps_its_columns(experiments):
    task = task_of(experiments["obs_fisher"])
    assert task.showing(1).observe(0.5).shape[1] == len(FEATURE_VERSIONS[1])
    both = [experiments[name].evaluator.fork() for name in ("obs_fisher", "taylor")]
    assert [task.feature_version for task in DistributionEnv(both, budget=0.5).tasks] == [3, 3]


def test_a_rule_that_measures_curves_by_the_way_changes_nothing(experiments):
    """The rule `fisher` is among the starts of every search: whether it was scored before must not matter."""
    experiment = experiments["taylor"]
    experiment.rule_widths("fisher")
    task = Task(experiment.evaluator, 0.5, "macs", base_rule="uniform")
    widths = task.space.widths[None]
    assert task.expected(widths) is not None
    assert task.prior(widths) is None and task.feature_version == 1


class TestPriorMean:
    def fitted(self, experiment: Experiment, plans: np.ndarray) -> CompositeGP:
        task = task_of(experiment)
        model = CompositeGP(task)
        model.fit(plans, np.array([task.evaluator.evaluate(p).score for p in plans]))
        return model

    def test_plans_far_from_all_known_ones_are_ranked_by_what_is_expected(self, experiments):
        task = task_of(experiments["obs_fisher"])
        generator = np.random.default_rng(0)
        near = random_plans(task, 0.9, 8, generator)
        far = random_plans(task, 0.3, 30, generator)
        model = self.fitted(experiments["obs_fisher"], near)
        expected = task.expected(far).sum(axis=1)
        mean, unknown = model.predict(far)
        assert np.median(unknown) > 0.5
        assert np.corrcoef(mean, -np.log(expected))[0, 1] > 0.8

    def test_known_plans_are_told_as_they_were_scored(self, experiments):
        task = task_of(experiments["obs_fisher"])
        plans = random_plans(task, 0.5, 12, np.random.default_rng(1))
        model = self.fitted(experiments["obs_fisher"], plans)
        scores = np.array([task.evaluator.evaluate(p).score for p in plans])
        assert np.exp(-model.predict(plans)[0]) == pytest.approx(-scores, rel=0.15)
