"""Experience: the plans of other checkpoints, the process of the logits, and what both make of a new checkpoint."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from helpers.synthetic import FakeAccount, FakeCandidate, FakeEvaluator, make_space
from rlprune.agents import SearchRequest, StateDir, make_agent
from rlprune.agents.ppo.policy import PortablePolicy, load_policy, portable_state, save_policy
from rlprune.agents.ppo.transfer import PROBES, PlanMemory, agreed, builds, can_build, collect, planned
from rlprune.config.search import PPOConfig, SearchConfig
from rlprune.envs.task import Task
from rlprune.errors import ArtifactError
from rlprune.surrogates.logit_gp import MOST_LOGITS, LogitProbes
from rlprune.surrogates.probes import ProbedModel
from rlprune.surrogates.proposals import neighbours

SETTINGS = SearchConfig(ppo=PPOConfig(hidden=16, surrogate_steps=256, surrogate_envs=32), batch=10)
GROUPS, INPUTS, CLASSES = 4, 8, 5
RNG = np.random.default_rng(0)


class Additive(nn.Module):
    """A classifier whose logits each group moves along a direction of its own, and two neighbours together."""

    def __init__(self, cut: np.ndarray, directions: torch.Tensor) -> None:
        super().__init__()
        amounts = torch.tensor([*cut, *(cut[1:] * cut[:-1])], dtype=torch.float32)
        self.weight = nn.Parameter(torch.einsum("g,gfc->fc", amounts, directions))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return 2.0 * images[:, :CLASSES] + images @ self.weight


class Checkpoint(FakeEvaluator):
    """A synthetic checkpoint that is scored by the logits of validation images; others are unlabelled."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(GROUPS, seed)
        # What the checkpoints have in common, and what belongs to each.
        common, own = (torch.Generator().manual_seed(s) for s in (0, 100 + seed))
        size = (2 * GROUPS - 1, INPUTS, CLASSES)
        self.directions = 0.3 * torch.randn(size, generator=common) + 0.2 * torch.randn(size, generator=own)
        self.directions *= torch.linspace(0.3, 1.6, GROUPS).repeat(2)[: len(self.directions), None, None]
        self.validation = torch.randn(200, INPUTS, generator=own)
        self.unlabelled = torch.randn(150, INPUTS, generator=own)
        self.models: dict[float, LogitProbes] = {}

    def build(self, widths: np.ndarray) -> nn.Module:
        return Additive(-np.log(np.maximum(widths, 0.5) / self.space.widths), self.directions)

    def logit_probes(self, target: float, make: Any = LogitProbes) -> LogitProbes:
        if target not in self.models:
            self.models[target] = make(self.space, self.build, self.unlabelled)
        return self.models[target]

    def divergence(self, widths: np.ndarray, images: torch.Tensor) -> float:
        with torch.no_grad():
            dense, other = (self.build(w)(images).log_softmax(dim=1) for w in (self.space.widths, widths))
        return float((dense.exp() * (dense - other)).sum(dim=1).mean())

    def evaluate(self, widths: np.ndarray) -> FakeCandidate:
        key = tuple(int(w) for w in widths)
        if key not in self.memo:
            self.calls += 1
            loss = self.divergence(np.array(key), self.validation)
            self.memo[key] = FakeCandidate(key, self.space.cost(np.array(key)), -loss, loss, np.exp(-loss))
        return self.memo[key]


def task_of(seed: int, budget: float = 0.35) -> Task:
    return Task(Checkpoint(seed), budget)


def score(task, widths):
    return task.evaluator.evaluate(widths).score


@pytest.fixture(scope="module")
def policy():
    tasks = [task_of(seed) for seed in range(3)]
    accounts = [FakeAccount(t.evaluator, 30) for t in tasks]
    starts = [[t.uniform_widths(0.35)] for t in tasks]
    return make_agent("ppo", SETTINGS).search(SearchRequest(tasks, accounts, starts=starts, seed=0)).policy


@pytest.fixture(scope="module")
def portable(policy, tmp_path_factory):
    return load_policy(save_policy(policy, tmp_path_factory.mktemp("saved") / "policy"))


class TestProcessOfTheLogits:
    def model(self, count: int) -> tuple[Task, LogitProbes, np.ndarray]:
        task = task_of(30)
        model = task.evaluator.logit_probes(1.0)
        plans = task.widths(np.random.default_rng(0).uniform(-1, 1, size=(count + 40, GROUPS)), 0.35)
        for widths in plans[:count]:
            model.measure(widths)
        model.fit()
        return task, model, plans[count:]

    def test_what_is_measured_is_the_divergence_on_the_images(self):
        task, model, plans = self.model(5)
        widths = plans[0]
        before = model.builds
        wanted = task.evaluator.divergence(widths, task.evaluator.unlabelled)
        assert model.measure(widths) == pytest.approx(wanted, rel=1e-4)
        assert model.measure(widths) == model.known[tuple(widths)] and model.builds == before + 1
        assert task.evaluator.calls == 0, "nothing is evaluated"

    def test_known_plans_are_expected_as_measured_and_others_nearly(self):
        _, model, plans = self.model(40)
        known = model.best(40)
        centre, spread = model.expected(known)
        assert centre == pytest.approx([model.known[tuple(w)] for w in known], rel=0.1)
        others, unsure = model.expected(plans)
        truth = [model.measure(w) for w in plans]
        assert np.corrcoef(np.log(others), np.log(truth))[0, 1] > 0.9
        assert unsure.mean() > spread.mean(), "what has not been built is less certain"

    def test_the_dense_model_costs_nothing(self):
        task, model, _ = self.model(10)
        centre, spread = model.expected(task.space.widths[None])
        assert centre[0] == pytest.approx(0.0, abs=1e-3) and spread[0] < 0.05

    def test_so_many_images_that_the_logits_fit(self):
        space = make_space(2, 4)
        images = torch.zeros(3, 2)

        class Wide(nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return torch.zeros(len(x), MOST_LOGITS // 2)

        assert LogitProbes(space, lambda widths: Wide(), images).images == 2


class TestPlan:
    def test_is_better_than_the_network_and_every_plan_of_others(self, portable):
        gains = []
        for seed in (10, 11, 12):
            task = task_of(seed)
            alone = task.space.project(portable.distribution(task, 0.35), 0.35)
            plan = portable.widths(task, 0.35)
            assert task.space.cost(plan) <= task.space.target(0.35)
            others = [alone, *portable.plan_memory.starts(task, 0.35)]
            gains.append(score(task, plan) - max(score(task, w) for w in others))
        assert np.mean(gains) > 0

    def test_takes_so_many_builds_and_no_evaluation(self, portable):
        task = task_of(13)
        plan = portable.widths(task, 0.35)
        assert task.evaluator.calls == 0 and builds(task) == (PROBES * GROUPS, 150)
        assert portable.widths(task, 0.35).tolist() == plan.tolist()
        assert builds(task)[0] == PROBES * GROUPS, "the second call builds nothing"
        assert portable.widths(task_of(13), 0.35).tolist() == plan.tolist()

    @pytest.mark.parametrize("number", [2, 3, 20])
    def test_takes_as_many_builds_as_asked(self, portable, number):
        task = task_of(16)
        plan = portable.widths(task, 0.35, builds=number)
        assert builds(task)[0] == number and task.evaluator.calls == 0
        assert task.space.cost(plan) <= task.space.target(0.35)

    def test_more_builds_go_on_where_the_first_ended(self, portable):
        task = task_of(17)
        model = task.evaluator.logit_probes(task.space.target(0.35))
        few = portable.widths(task, 0.35, builds=20)
        some = set(model.known)
        many = portable.widths(task, 0.35, builds=40)
        assert builds(task)[0] == 40 and some < set(model.known)
        assert model.known[tuple(many)] <= model.known[tuple(few)]
        assert portable.widths(task, 0.35, builds=30).tolist() == many.tolist(), "fewer build nothing"
        assert builds(task)[0] == 40

    @pytest.mark.parametrize("number", [0, 1])
    def test_without_builds_the_network_answers(self, portable, number):
        task = task_of(18)
        own = task.space.project(portable.distribution(task, 0.35), 0.35)
        assert portable.widths(task, 0.35, builds=number).tolist() == own.tolist()
        assert builds(task)[0] == 1, "the dense model alone"

    def test_another_budget_is_probed_anew(self, portable):
        task = task_of(14)
        portable.widths(task, 0.35)
        plan = portable.widths(task, 0.6)
        assert task.space.cost(plan) <= task.space.target(0.6)
        assert plan.tolist() == portable.widths(task_of(14), 0.6).tolist()

    def test_a_space_that_is_used_up_ends_the_builds(self):
        task = task_of(15, budget=1.0)
        assert planned(task, 1.0, task.space.widths[None]).tolist() == task.space.widths.tolist()


class TestNetworkAlone:
    """It is taught what the best plans of the training checkpoints have in common."""

    def test_is_better_than_uniform_on_other_checkpoints(self, portable):
        for seed in range(40, 46):
            task = task_of(seed)
            own = portable.widths(task, 0.35, builds=0)
            assert score(task, own) > score(task, task.uniform_widths(0.35))

    def test_comes_near_the_plans_it_was_taught(self, portable):
        for seed in range(3):
            task = task_of(seed)
            best = max(score(task, plan) for plan in portable.plan_memory.starts(task, 0.35))
            uniform = score(task, task.uniform_widths(0.35))
            assert score(task, portable.widths(task, 0.35, builds=0)) - uniform > 0.5 * (best - uniform)


class TestPlansOfOthers:
    def test_collected_are_those_that_no_cheaper_one_beats(self):
        tasks = [task_of(0), task_of(1)]
        space = tasks[0].space
        cheap, middle, dear = (space.project(np.ones(GROUPS), b) for b in (0.2, 0.4, 0.6))

        def scored(*pairs):
            return {(tuple(w),): FakeCandidate(tuple(w), space.cost(w), s, -s, 0.0) for w, s in pairs}

        found = collect(
            tasks, [scored((dear, -0.2), (middle, -0.1), (cheap, -0.5)), scored((dear, -0.1), (cheap, -0.3))]
        )
        assert found is not None and found.tasks.tolist() == [0, 0, 1, 1]
        assert found.starts(tasks[0], 0.4).tolist() == [
            middle.tolist(),
            space.project(1 - cheap / space.widths, 0.4).tolist(),
        ]
        # Below what any of them costs, the cheapest one is brought down.
        assert (found.starts(tasks[0], 0.1) <= cheap).all()

    def test_one_checkpoint_gives_none(self):
        request = SearchRequest([task_of(1)], [FakeAccount(task_of(1).evaluator, 12)])
        single = make_agent("ppo", SETTINGS).search(request)
        assert single.policy.plan_memory is None

    def test_stay_out_where_they_do_not_apply(self, portable):
        plain = Task(FakeEvaluator(GROUPS, 3), 0.35)  # tells nothing of its logits
        own = plain.space.project(portable.distribution(plain, 0.35), 0.35)
        assert portable.widths(plain, 0.35).tolist() == own.tolist()
        assert can_build(task_of(1)) and not can_build(plain)
        assert not can_build(Task(Checkpoint(1), (0.3, 0.5))), "of a range there is no one plan"

    def test_the_rules_take_their_place_on_another_architecture(self, portable, monkeypatch):
        other = task_of(19)
        rules = other.widths(np.random.default_rng(0).uniform(-1, 1, size=(5, GROUPS)), 0.35)
        monkeypatch.setattr(Task, "rule_plans", lambda task, budget: rules)
        assert not any((rules == plan).all(axis=1).any() for plan in portable.plan_memory.starts(other, 0.35))
        renamed = replace(portable.plan_memory, fingerprint="another")
        assert renamed.starts(other, 0.35).tolist() == rules.tolist()
        assert renamed.starts(other, 0.35, 8).tolist() == rules[:2].tolist(), "a quarter of the builds"
        plan = PortablePolicy(portable.network, portable.meta, renamed).widths(other, 0.35)
        assert builds(other)[0] == PROBES * GROUPS
        assert score(other, plan) > max(score(other, rule) for rule in rules)


def test_evaluations_on_the_new_checkpoint_correct_the_expectation(portable):
    task = task_of(20)
    portable.widths(task, 0.35)
    plans = task.widths(np.random.default_rng(0).uniform(-1, 1, size=(60, GROUPS)), 0.35)
    truth = np.array([score(task, p) for p in plans])
    prior, after = ProbedModel(task), ProbedModel(task)
    after.fit(plans[:20], truth[:20])
    wanted = -np.log(-truth[20:])
    errors = [np.abs(model.predict(plans[20:])[0] - wanted).mean() for model in (prior, after)]
    assert errors[1] < errors[0]
    mean, std = after.predict(plans)
    joint_mean, joint = after.covariance(plans)
    assert joint_mean == pytest.approx(mean) and np.sqrt(np.diag(joint)) == pytest.approx(std, rel=1e-3)
    assert std[:20].mean() < std[20:].mean(), "what was scored is known best"


def test_a_plan_is_chosen_by_all_images_and_not_by_the_luck_of_a_few():
    task = task_of(7)
    checkpoint = task.evaluator
    plans = [
        tuple(int(w) for w in plan)
        for plan in neighbours(task, task.uniform_widths(0.35)[None], 0.35, 30, RNG)
    ]
    scored = {(plan,): replace(checkpoint.evaluate(np.array(plan)), samples=200) for plan in plans}
    both = torch.cat([checkpoint.validation, checkpoint.unlabelled])
    found = agreed(task, scored)
    assert found == min(scored, key=lambda history: checkpoint.divergence(np.array(history[-1]), both))
    assert builds(task)[0] == 1 + len(scored), "what has not been built is built, and the dense model"
    # One image decides nothing, however good its score is.
    lucky = max(scored, key=lambda history: checkpoint.divergence(np.array(history[-1]), both))
    assert agreed(task, scored | {lucky: replace(scored[lucky], score=0.0, samples=1)}) != lucky


def test_refining_starts_from_the_plan_and_resumes_to_the_same(portable, tmp_path):
    def refine(state, stop=None):
        task = task_of(21)
        account = FakeAccount(task.evaluator, 12, stop_after=stop)
        settings = SearchConfig(ppo=SETTINGS.ppo, batch=4)
        request = SearchRequest([task], [account], seed=0, state=state, policy=portable)
        found = make_agent("ppo", settings).search(request)
        return task, list(account.seen), found

    task, plans, found = refine(None)
    assert plans[0] == tuple(portable.widths(task, 0.35)) and len(plans) == 12
    assert score(task, found.widths()) > score(task, plans[0])
    assert PROBES * GROUPS < builds(task)[0] < PROBES * GROUPS + 12, "what is evaluated is built once more"
    assert tuple(portable.widths(task, 0.35)) == plans[0], "what is evaluated later does not change the plan"
    state = StateDir(tmp_path, "refine")
    with pytest.raises(KeyboardInterrupt):
        refine(state, stop=7)
    assert refine(state)[1] == plans


@pytest.mark.parametrize(
    "damage",
    [
        lambda tensors, meta: tensors.pop("experience.targets"),
        lambda tensors, meta: tensors.update({"experience.ratios": torch.zeros(3)}),
        lambda tensors, meta: tensors.update({"experience.ratios": torch.full((1, GROUPS), torch.nan)}),
        lambda tensors, meta: meta.update(experience={}),
        lambda tensors, meta: meta.update(experience=7),
        lambda tensors, meta: meta.update(reach=-1),
    ],
)
def test_damaged_experience_is_refused(policy, damage):
    tensors, meta = portable_state(policy)
    damage(tensors, meta)
    with pytest.raises(ArtifactError, match="policy: (its experience is damaged|reach)"):
        PortablePolicy.from_state(tensors, meta)


def test_the_file_gives_the_same_experience_back(policy, portable):
    tensors, meta = policy.plan_memory.state()
    again = PlanMemory.from_state(tensors, meta)
    for name in ("ratios", "targets", "tasks"):
        assert torch.equal(getattr(again, name), getattr(portable.plan_memory, name))
    assert again.fingerprint == portable.plan_memory.fingerprint


def test_a_file_of_the_first_version_is_read(policy, portable):
    tensors, meta = policy.plan_memory.state()
    ratios = tensors.pop("ratios")
    old = tensors | {"inputs": torch.hstack([ratios, torch.zeros(len(ratios), 3 + GROUPS)])}
    old["scales"] = torch.zeros(8 + 2 * GROUPS)
    again = PlanMemory.from_state(old, meta | {"bounds": [0.1, 2.0]})
    assert torch.equal(again.ratios, portable.plan_memory.ratios)
