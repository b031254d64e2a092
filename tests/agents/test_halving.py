"""Successive halving in the searches: a batch loses its worse half at every rung, on a real tiny language model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers.language_workload import evaluator_of, workload_of
from helpers.lm import tiny_lm
from rlprune.agents import SearchRequest, StateDir, make_agent
from rlprune.config.search import GPConfig, PPOConfig, SearchConfig
from rlprune.envs.task import Task
from rlprune.evaluation.ledger import EvaluationBudget, EvaluationLog
from rlprune.language.workload import LanguageWorkload
from rlprune.report.results import learning_curves

SMALL = PPOConfig(hidden=8, n_steps=8, batch_size=8, n_epochs=1, surrogate_steps=256, surrogate_envs=32)
AGENTS = {
    "ppo": SearchConfig(ppo=SMALL, batch=6),
    # Fits of the process take their time; its batches come from the startup's random plans here.
    "gp": SearchConfig(gp=GPConfig(startup=12)),
    **{name: SearchConfig() for name in ("random", "cma_es", "tpe", "evopress", "rl_pruner")},
}
RUNGS = (2, 4)
LIMIT, SAMPLES, BUDGET = 14, 8, 0.7


@pytest.fixture(scope="module")
def workload() -> LanguageWorkload:
    return workload_of(tiny_lm("llama"), sizes=(4, 6, SAMPLES, 5))


@pytest.fixture(scope="module", params=AGENTS)
def agent(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Run:
    """One search with everything that it leaves behind; ``die_after`` new scores it is killed."""

    def __init__(
        self, workload: Any, agent: str, rungs: tuple[int, ...] = RUNGS, folder: Path | None = None,
        die_after: int | None = None, seed: int = 0,
    ) -> None:  # fmt: skip
        self.evaluator = evaluator_of(workload, rungs=rungs)
        self.ledger = EvaluationLog(None if folder is None else folder / "ledger.jsonl")
        self.account = EvaluationBudget(self.evaluator, self.ledger, method=agent, seed=seed, limit=LIMIT)
        self.task = Task(self.evaluator, BUDGET, "block_params", base_rule="uniform")
        self.new = 0
        self._agent, self._seed, self._die_after = agent, seed, die_after
        self._state = None if folder is None else StateDir(folder / "state")

    def search(self) -> Run:
        scored = self.evaluator._scored

        def counted(*args: Any, **options: Any) -> Any:
            if self.new == self._die_after:
                raise KeyboardInterrupt
            self.new += 1
            return scored(*args, **options)

        _ = self.evaluator.dense
        self.evaluator._scored = counted  # type: ignore[method-assign]
        request = SearchRequest(
            [self.task], [self.account], starts=[[self.task.uniform_widths(BUDGET)]],
            seed=self._seed, state=self._state,
        )  # fmt: skip
        self.result = make_agent(self._agent, AGENTS[self._agent]).search(request)
        return self

    @property
    def rows(self) -> list[tuple[Any, ...]]:
        return [(tuple(r["widths"]), r["samples"], r["score"], r["loss"]) for r in self.ledger.rows]


@pytest.fixture(scope="module")
def whole(workload: LanguageWorkload, agent: str) -> Run:
    return Run(workload, agent).search()


def test_the_account_is_spent_exactly(whole: Run) -> None:
    account = whole.account
    assert account.spent == LIMIT == len(account.plans) + len(account.dropped)
    assert not set(account.plans) & set(account.dropped)
    assert len({row[0] for row in whole.rows}) == LIMIT, (
        "every plan is charged once, however many rows it has"
    )
    assert account.dropped, "halving dropped something"
    assert len(account.history) == len(account.plans)


def test_the_ledger_tells_the_rungs(whole: Run) -> None:
    samples: dict[Any, list[int]] = {}
    for widths, count, *_ in whole.rows:
        samples.setdefault(widths, []).append(count)
    climbs = {tuple(counts) for counts in samples.values()}
    assert climbs <= {(SAMPLES,), RUNGS[:1], RUNGS, (*RUNGS, SAMPLES)}
    assert RUNGS[:1] in climbs and (*RUNGS, SAMPLES) in climbs
    assert samples[tuple(whole.task.uniform_widths(BUDGET))] == [SAMPLES], "starts are scored whole"
    assert whole.account.samples == sum(counts[-1] for counts in samples.values())
    for widths, counts in samples.items():
        final = whole.account.plans if counts[-1] == SAMPLES else whole.account.dropped
        assert final[(widths,)].samples == counts[-1]


def test_it_reads_fewer_samples_than_without_rungs(
    whole: Run, workload: LanguageWorkload, agent: str
) -> None:
    plain = Run(workload, agent, rungs=()).search()
    assert plain.account.samples == LIMIT * SAMPLES and not plain.account.dropped
    assert whole.account.samples < 0.7 * plain.account.samples


def test_the_best_plan_was_scored_on_all_samples(whole: Run, workload: LanguageWorkload) -> None:
    space = whole.task.space
    costs = space.cost(np.array([c.widths for c in whole.account.history]), "block_params")
    keeps = costs <= space.target(BUDGET, "block_params")  # RL-Pruner's earlier stages exceed it
    within = [c for c, fits in zip(whole.account.history, keeps, strict=True) if fits]
    best = max(within, key=lambda c: c.score)
    assert best.samples == SAMPLES
    (widths,) = whole.result.best[0]
    assert whole.account.plans[(widths,)] == best
    again = Run(workload, "random", rungs=()).evaluator.evaluate(widths)
    assert again.score == pytest.approx(best.score, abs=1e-9), "in parts as at once"


@pytest.mark.parametrize("share", [0.02, 0.3, 0.55, 0.8, 0.97])
def test_killed_and_resumed_is_the_same_search(
    share: float, whole: Run, workload: LanguageWorkload, agent: str, tmp_path: Path
) -> None:
    stop = int(share * whole.new)
    torch.manual_seed(stop)  # what the process did before must not matter
    killed = Run(workload, agent, folder=tmp_path, die_after=stop)
    with pytest.raises(KeyboardInterrupt):
        killed.search()
    assert len(killed.rows) == stop and killed.rows == whole.rows[:stop]
    resumed = Run(workload, agent, folder=tmp_path).search()
    assert resumed.rows == whole.rows == Run(workload, agent, folder=tmp_path).rows
    assert resumed.new == whole.new - stop, "nothing is scored twice"
    assert resumed.result.best == whole.result.best
    assert resumed.account.samples == whole.account.samples
    if whole.result.policy is not None:
        pairs = zip(whole.result.policy.parameters(), resumed.result.policy.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_the_learning_curve_counts_plans_and_not_rungs(whole: Run, agent: str) -> None:
    results = {"rows": [{"method": agent, "kind": "agent"}], "budget": {}}
    (curve,) = learning_curves(results, whole.ledger.rows)[agent]
    scores = {row[0]: row[2] if row[1] == SAMPLES else np.nan for row in whole.rows}
    np.testing.assert_array_equal(curve, list(scores.values()))
    assert len(curve) == LIMIT and np.nanmax(curve) == whole.account.best.score  # type: ignore[union-attr]
