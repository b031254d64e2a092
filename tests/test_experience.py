"""Experience: what searches on other checkpoints scored, as the prior on a new one; and the expected logit changes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from synthetic import FakeAccount, FakeEvaluator, make_space
from torch import nn

from rlprune.agents import StateDir, make_agent
from rlprune.agents.experience import Experience, ExperiencedModel, planned
from rlprune.agents.policy import load_policy, portable_state, save_policy
from rlprune.envs.task import Task
from rlprune.errors import ArtifactError
from rlprune.expectation import TOTALS, LogitChanges
from rlprune.search_settings import PPOConfig, SearchConfig

SETTINGS = SearchConfig(ppo=PPOConfig(hidden=16, surrogate_steps=256, surrogate_envs=32), batch=10)


class Additive(nn.Module):
    """Logits whose changes add up over the groups, each linear in the units that are gone."""

    def __init__(self, gone: np.ndarray, directions: torch.Tensor) -> None:
        super().__init__()
        self.shift = torch.einsum("g,gfc->fc", torch.tensor(gone, dtype=torch.float32), directions)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images @ (torch.eye(images.shape[1])[:, : self.shift.shape[1]] + self.shift)


class InformedEvaluator(FakeEvaluator):
    """A synthetic checkpoint whose statistics tell each group's cost up to a factor of its own."""

    def __init__(self, groups: int = 6, seed: int = 0) -> None:
        super().__init__(groups, seed)
        self.weights = np.exp(1.5 * np.random.default_rng(seed).normal(size=groups)) * 0.1
        self.seen = self.weights * np.exp(0.3 * np.random.default_rng(seed + 50).normal(size=groups))

    def logit_changes(self) -> InformedEvaluator:
        return self

    def features(self, widths: np.ndarray) -> np.ndarray:
        alone = self.seen * np.log(np.maximum(widths, 0.5) / self.space.widths) ** 2
        total = alone.sum(axis=1, keepdims=True)
        logs = np.log(np.maximum(np.hstack([total, total / 4, total]), 1e-4))
        return np.hstack([logs, alone / np.maximum(total, 1e-9)])


def task_of(seed: int, budget: float = 0.35) -> Task:
    return Task(InformedEvaluator(seed=seed), budget)


@pytest.fixture(scope="module")
def policy():
    tasks = [task_of(seed) for seed in range(4)]
    accounts = [FakeAccount(t.evaluator, 30) for t in tasks]
    starts = [[t.uniform_widths(0.35)] for t in tasks]
    return make_agent("ppo", SETTINGS).search(tasks, accounts, starts=starts, seed=0).policy


@pytest.fixture(scope="module")
def portable(policy, tmp_path_factory):
    return load_policy(save_policy(policy, tmp_path_factory.mktemp("saved") / "policy"))


def score(task, widths):
    return task.evaluator.evaluate(widths).score


def test_changes_that_add_up_are_added_up_exactly():
    space = make_space(3, 16)
    generator = torch.Generator().manual_seed(0)
    directions = 0.03 * torch.randn(3, 8, 4, generator=generator)
    images = torch.randn(20, 8, generator=generator)

    def build(widths):
        return Additive(space.widths - np.asarray(widths), directions)

    changes = LogitChanges(space, build, images)
    plans = np.array([[16, 30, 40], [5, 16, 20], [9, 9, 9], space.widths])
    found = changes.features(np.minimum(plans, space.widths))
    dense = build(space.widths)(images).log_softmax(dim=1)
    for row, plan in zip(found, np.minimum(plans, space.widths), strict=True):
        other = build(plan)(images).log_softmax(dim=1)
        expected = max(float((dense.exp() * (dense - other)).sum(dim=1).mean()), 1e-4)
        assert np.exp(row[0]) == pytest.approx(expected, rel=1e-3)
    shares = found[:-1, TOTALS:]
    assert shares.sum(axis=1) == pytest.approx(1.0) and (shares >= 0).all()
    assert found[0, TOTALS] == 0, "a group that keeps everything costs nothing"
    assert (found[-1, :TOTALS] == np.log(1e-4)).all(), "the dense model is expected to cost nothing"


def test_a_new_checkpoint_gets_a_better_plan_than_the_network_alone_gives(portable):
    gains = []
    for seed in (10, 11, 12, 13):
        task = task_of(seed)
        alone = task.space.project(portable.distribution(task, 0.35), 0.35)
        plan = portable.widths(task, 0.35)
        assert task.space.cost(plan) <= task.space.target(0.35)
        uniform = score(task, task.uniform_widths(0.35))
        assert score(task, plan) > uniform
        gains.append(score(task, plan) - score(task, alone))
    assert np.mean(gains) > 0


def test_evaluations_on_the_new_checkpoint_correct_the_prior(portable):
    task = task_of(20)
    rng = np.random.default_rng(0)
    plans = task.widths(rng.uniform(-1, 1, size=(60, 6)), 0.35)
    truth = np.array([score(task, p) for p in plans])
    prior, after = ExperiencedModel(portable.experience, task), ExperiencedModel(portable.experience, task)
    after.fit(plans[:20], truth[:20])
    wanted = -np.log(-truth[20:])
    errors = [np.std(model.predict(plans[20:])[0] - wanted) for model in (prior, after)]
    assert errors[1] < errors[0]
    mean, std = after.predict(plans)
    joint_mean, joint = after.covariance(plans)
    assert joint_mean == pytest.approx(mean) and np.sqrt(np.diag(joint)) == pytest.approx(std, rel=1e-3)
    assert after.mean(plans) == pytest.approx(mean)
    assert std[:20].max() < std[20:].mean(), "what was scored is known best"


def test_refining_starts_from_the_plan_and_resumes_to_the_same(portable, tmp_path):
    def refine(state, stop=None):
        task = task_of(21)
        account = FakeAccount(task.evaluator, 12, stop_after=stop)
        settings = SearchConfig(ppo=SETTINGS.ppo, batch=4)
        found = make_agent("ppo", settings).search([task], [account], seed=0, state=state, policy=portable)
        return task, list(account.seen), found

    task, plans, found = refine(None)
    assert plans[0] == tuple(portable.widths(task, 0.35)) and len(plans) == 12
    assert score(task, found.widths()) >= score(task, plans[0])
    state = StateDir(tmp_path, "refine")
    with pytest.raises(KeyboardInterrupt):
        refine(state, stop=7)
    assert refine(state)[1] == plans


def test_the_plan_is_the_best_that_a_local_search_finds(portable):
    task = task_of(22)
    starts = np.array([task.uniform_widths(0.35)])
    best = planned(portable.experience, task, 0.35, starts)
    model = ExperiencedModel(portable.experience, task)
    assert model.mean(best[None])[0] > model.mean(starts)[0]
    assert best.tolist() == planned(portable.experience, task, 0.35, starts).tolist()


def test_experience_stays_out_where_it_does_not_apply(portable, policy):
    assert policy.experience is not None and portable.experience is not None
    plain = Task(FakeEvaluator(6, 3), 0.35)  # tells nothing of its logits
    own = plain.space.project(portable.distribution(plain, 0.35), 0.35)
    assert portable.widths(plain, 0.35).tolist() == own.tolist()
    single = make_agent("ppo", SETTINGS).search([task_of(1)], [FakeAccount(task_of(1).evaluator, 12)]).policy
    assert single.experience is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda tensors, meta: tensors.pop("experience.targets"),
        lambda tensors, meta: tensors.update({"experience.inputs": torch.zeros(3, 4)}),
        lambda tensors, meta: meta.update(experience={"bounds": [1.0, 0.5], "fingerprint": ""}),
        lambda tensors, meta: meta.update(experience=7),
        lambda tensors, meta: meta.update(reach=-1),
    ],
)
def test_damaged_experience_is_refused(policy, damage):
    from rlprune.agents.policy import PortablePolicy

    tensors, meta = portable_state(policy)
    damage(tensors, meta)
    with pytest.raises(ArtifactError, match="policy: (its experience is damaged|reach)"):
        PortablePolicy.from_state(tensors, meta)


def test_the_file_gives_the_same_experience_back(policy, portable):
    tensors, meta = policy.experience.state()
    again = Experience.from_state(tensors, meta)
    for name in ("inputs", "targets", "tasks", "scales"):
        assert torch.equal(getattr(again, name), getattr(portable.experience, name))
    assert again.bounds == portable.experience.bounds
