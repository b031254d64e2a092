"""The agents of published methods: their formulas, what they keep to, and their resumption."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers.language_workload import Sentences
from helpers.lm import tiny_lm
from helpers.synthetic import FakeAccount, make_synthetic_task
from rlprune.agents import Round, SearchRequest, StateDir, make_agent
from rlprune.agents.baselines import bypass_published, rl_pruner_published
from rlprune.api import trace
from rlprune.config.search import (
    BypassPublishedConfig,
    EagleEyeConfig,
    EvoPressDropConfig,
    RLPrunerPublishedConfig,
    SearchConfig,
)
from rlprune.config.training import RecoveryConfig
from rlprune.envs.task import Task
from rlprune.errors import BudgetError, ConfigError
from rlprune.evaluation.evaluator import Evaluator
from rlprune.language.calibration.masks import MaskedUnits
from rlprune.pruning.plan import Plan
from rlprune.pruning.surgery import prune


def test_one_rule_scores_its_plan_and_nothing_else() -> None:
    task = make_synthetic_task(5, budget=0.5)
    account = FakeAccount(task.evaluator, 10)
    found = make_agent("rule").search(SearchRequest([task], [account]))
    assert account.spent == 1
    assert found.best[0][0] == tuple(task.uniform_widths(0.5))


def test_eagleeye_draws_costs_near_the_budget() -> None:
    task = make_synthetic_task(6, budget=0.5)
    account = FakeAccount(task.evaluator, 20)
    found = make_agent("eagleeye").search(SearchRequest([task], [account], seed=2))
    dense, target = task.space.dense_cost(), task.space.target(0.5)
    costs = np.array([c.cost for c in account.history])
    assert account.spent == 20 and (costs <= target).all() and (costs >= target - 0.01 * dense).all()
    assert account.seen[found.best[0][0]].score == max(c.score for c in account.history)
    low = SearchConfig(eagleeye=EagleEyeConfig(max_rate=0.05))
    with pytest.raises(
        BudgetError, match=r"search\.eagleeye: .* allowed: another search\.eagleeye\.max_rate"
    ):
        make_agent("eagleeye", low).search(SearchRequest([task], [FakeAccount(task.evaluator, 5)]))


def parts_task() -> Any:
    """A synthetic task of four blocks whose attentions and feed-forward parts may be dropped."""
    task = make_synthetic_task(8, budget=0.6)
    groups = [
        replace(g, kind=("attention", "ffn")[i % 2], block=i // 2, minimum=0)
        for i, g in enumerate(task.space.groups)
    ]
    task.evaluator.space = replace(task.space, groups=tuple(groups))
    return task


@pytest.mark.filterwarnings("ignore:divide by zero")
def test_evopress_drops_as_many_attentions_as_feed_forward_parts() -> None:
    task = parts_task()
    settings = SearchConfig(evopress_drop=EvoPressDropConfig(initial=4, offspring=3))
    account = FakeAccount(task.evaluator, 16)
    found = make_agent("evopress_drop", settings).search(SearchRequest([task], [account], seed=1))
    gone = [np.array(plan) == 0 for plan in account.seen]
    counts = {(int(g[0::2].sum()), int(g[1::2].sum())) for g in gone}
    assert len(counts) == 1 and len({*counts.pop()}) == 1, "always the same number of both"
    assert all(
        (np.array(plan)[~g] == task.space.widths[~g]).all()
        for plan, g in zip(account.seen, gone, strict=True)
    )
    assert account.seen[found.best[0][0]].score == max(c.score for c in account.history)
    # Offspring are few exchanges away from the best before them.
    whole = make_synthetic_task(4, budget=0.6)
    with pytest.raises(ConfigError, match="give prune.drop=true"):
        make_agent("evopress_drop").search(SearchRequest([whole], [FakeAccount(whole.evaluator, 5)]))


def test_rl_pruner_moves_as_the_code_does() -> None:
    """The update of the probability vector, recomputed layer by layer as compress.py and RL_Pruner have it."""
    layers, generator = np.array([1, 3, 2]), np.random.default_rng(0)
    start, best = generator.random(3), generator.random(3)
    start, best = (p / (p * layers).sum() for p in (start, best))
    each = [np.repeat(p, layers) for p in (start, best)]
    updated = np.maximum(each[0] + 0.1 * (each[1] - each[0]), 1e-5)
    updated /= updated.sum()
    clipped = np.maximum(np.clip(updated / each[0], 0.75, 1.25) * each[0], 1e-5)
    clipped /= clipped.sum()
    moved = rl_pruner_published._towards(start, best, layers, 0.1, 0.25)
    assert np.allclose(np.repeat(moved, layers), clipped)
    noisy = rl_pruner_published._noisy(start, layers, 0.04, 500, generator)
    assert np.allclose((noisy * layers).sum(axis=1), 1.0) and (noisy > 0).all()


def test_rl_pruner_explores_in_the_first_tenth_of_the_stages_only() -> None:
    settings = SearchConfig(rl_pruner_published=RLPrunerPublishedConfig(epsilon=1.0))
    agent = make_agent("rl_pruner_published", settings)
    buffer = rl_pruner_published._Buffer(10)
    for i in range(10):
        buffer.add(float(i), np.array([i]), np.array([1.0]))
    buffer.add(-1.0, np.array([99]), np.array([1.0]))
    assert buffer.best[1] == 9 and 99 not in [int(w[0]) for _, w, _ in buffer.entries]

    def ends(number: int) -> set[int]:
        at = Round(number, 50)
        return {int(agent._choice(buffer, at, np.random.default_rng(i))[0]) for i in range(40)}  # type: ignore[attr-defined]

    assert len(ends(1)) > 3 and ends(7) == {9} and ends(50) == {9}


def test_rl_pruner_goes_on_from_the_round_before() -> None:
    task = make_synthetic_task(5, budget=0.9)
    settings = SearchConfig(rl_pruner_published=RLPrunerPublishedConfig(batches=3, samples=4))

    def stage(at: Round, limit: int = 24) -> Any:
        account = FakeAccount(task.evaluator, limit)
        found = make_agent("rl_pruner_published", settings).search(SearchRequest([task], [account], round=at))
        return found, account

    first, account = stage(Round(1, 10))
    assert account.spent <= 24
    kept = first.memory["probabilities"]
    again, _ = stage(Round(2, 10, first.memory))
    assert again.memory["probabilities"] != kept
    same, _ = stage(Round(2, 10, dict(first.memory)))
    assert same.best == again.best and same.memory == again.memory
    # A fall of more than a tenth: the vector begins anew, and the stage is sampled once more.
    _, twice = stage(Round(2, 10, {"probabilities": kept, "score": 1e9}))
    _, once = stage(Round(2, 10, {"probabilities": kept, "score": 0.0}))
    assert twice.calls > once.calls


def test_a_mask_is_the_cut_model() -> None:
    model = tiny_lm("llama", seed=3).double().eval()
    ids = torch.randint(2, 30, (2, 9), generator=torch.Generator().manual_seed(0))
    space = trace(model, ids[:1])
    generator = np.random.default_rng(1)
    kept = tuple(np.flatnonzero(generator.random(g.units) < 0.6) for g in space.groups)
    kept = tuple(k if len(k) else np.array([0]) for k in kept)
    slim = prune(model, Plan(space, space.widths_of(kept), kept))
    masked = MaskedUnits(model, space, "test")
    for group in masked.groups:
        masked.mask[group] = torch.zeros(space.groups[group].units, dtype=torch.float64)
        masked.mask[group][kept[group]] = 1.0
    with torch.no_grad():
        before = model(ids).logits
        with masked:
            found = model(ids).logits
        assert torch.equal(model(ids).logits, before)
        assert torch.allclose(found, slim(ids).logits, atol=1e-9)


def test_bypass_starts_and_shifts_as_the_code_does() -> None:
    scores = np.random.default_rng(0).random(40)
    keep = bypass_published._first(scores, 0.7)
    values = torch.from_numpy(scores).float()
    expected = torch.sigmoid((values - values.mean()) / (values.std() + 1e-8))
    assert torch.allclose(keep, (expected + 0.7 - expected.mean()).clamp(0, 1))
    shifted = bypass_published._shifted(keep + 0.2, 0.7)
    assert abs(float(shifted.sum()) - 0.7 * 40) < 1e-3
    low = torch.full((10,), 0.1)
    assert torch.equal(bypass_published._shifted(low, 0.7), low), "nothing is shifted upwards"


def learned(state: StateDir | None = None, steps: int = 12) -> tuple[Any, Any]:
    evaluator = Evaluator(
        Sentences(tiny_lm("llama", seed=1)),
        importance="wanda_sp",
        recovery=RecoveryConfig(steps=("none",)),
        metric="block_params",
    )
    task = Task(evaluator, 0.6, "block_params")
    account = FakeAccount(evaluator, 3)
    settings = SearchConfig(bypass_published=BypassPublishedConfig(steps=steps, batch_size=2, lr=0.1))
    found = make_agent("bypass_published", settings).search(
        SearchRequest([task], [account], seed=1, state=state)
    )
    return evaluator, found


def test_bypass_keeps_the_units_that_it_learned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bypass_published, "_SAVED", 1)
    evaluator, found = learned()
    plan = evaluator.plan(found.widths())
    assert evaluator.space.cost(plan.widths, "block_params") <= evaluator.space.target(0.6, "block_params")
    for scores, kept in zip(evaluator.importance, plan.kept, strict=True):
        gone = np.setdiff1d(np.arange(len(scores)), kept)
        assert not len(gone) or not len(kept) or scores[kept].min() >= scores[gone].max()

    class Killed(Exception):
        pass

    steps = bypass_published._Learner._update

    def dying(self: Any, drawn: Any) -> None:
        if self._step == 7:
            raise Killed
        steps(self, drawn)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(bypass_published._Learner, "_update", dying)
        learned(StateDir(tmp_path))
    resumed, again = learned(StateDir(tmp_path))
    assert again.best == found.best
    assert all(np.array_equal(a, b) for a, b in zip(resumed.importance, evaluator.importance, strict=True))
