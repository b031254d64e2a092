"""Rungs of successive halving in the evaluator and the ledger: pauses, charges, replay."""

from __future__ import annotations

import json

import pytest

from helpers.language_workload import evaluator_of, plans, workload_of
from helpers.lm import tiny_lm
from rlprune.errors import ConfigError
from rlprune.evaluation.ledger import BudgetExhausted, EvaluationBudget, EvaluationLog, candidate_of
from rlprune.language.judge import LanguageJudge
from rlprune.language.workload import LanguageWorkload


@pytest.fixture(scope="module")
def workload() -> LanguageWorkload:
    return workload_of(tiny_lm("llama"))


class TestHalving:
    def test_a_pause_changes_nothing(self, workload):
        at_once, paused = (evaluator_of(workload, rungs=(2, 5)) for _ in range(2))
        widths = plans(at_once, 1)[0]
        steps = [
            paused.evaluate_partial(widths, 2),
            paused.evaluate_partial(widths, 5),
            paused.evaluate(widths),
        ]
        assert [c.samples for c in steps] == [2, 5, 8]
        whole = at_once.evaluate(widths)
        assert (whole.score, whole.loss, whole.error) == (steps[2].score, steps[2].loss, steps[2].error)
        assert steps[0].score != steps[1].score != steps[2].score

    def test_only_what_is_left_is_read(self, workload, monkeypatch):
        evaluator = evaluator_of(workload, rungs=(2, 5))
        widths = plans(evaluator, 1)[0]
        evaluator.evaluate_partial(widths, 5)
        spans, judge = [], LanguageJudge.__call__

        def spy(self, model, start=0, stop=None):
            spans.append((start, stop))
            return judge(self, model, start, stop)

        monkeypatch.setattr(LanguageJudge, "__call__", spy)
        evaluator.evaluate(widths)
        assert spans == [(5, None)]

    def test_unknown_rungs_are_refused(self, workload):
        evaluator = evaluator_of(workload, rungs=(2, 5))
        with pytest.raises(ConfigError, match="no rung of 3 samples; there are: 2, 5"):
            evaluator.evaluate_partial(evaluator.space.widths, 3)
        assert evaluator_of(workload, rungs=(2, 80)).rungs == (2,)

    def test_the_better_half_goes_on_and_every_plan_is_charged_once(self, workload, tmp_path):
        evaluator = evaluator_of(workload, rungs=(2, 5))
        many = plans(evaluator, 7)
        path = tmp_path / "ledger.jsonl"
        account = EvaluationBudget(evaluator, EvaluationLog(path), method="m", seed=0, limit=8)
        found = account.evaluate_many(many)
        first = sorted((evaluator.evaluate_partial(w, 2).score for w in many), reverse=True)
        assert sorted(c.samples for c in found) == [2, 2, 2, 5, 5, 8, 8]
        for widths, candidate in zip(many, found, strict=True):
            partial = evaluator.evaluate_partial(widths, 2).score
            assert (candidate.samples > 2) == (partial >= first[3])
        assert account.spent == 7 and len(account.plans) == 2 and len(account.dropped) == 5
        assert account.samples == 3 * 2 + 2 * 5 + 2 * 8
        assert account.best in found and account.best.samples == 8
        assert [r["samples"] for r in EvaluationLog(path).rows] == [2] * 7 + [5] * 4 + [8] * 2
        assert account.evaluate_many(many) == found and account.spent == 7  # repeats are free
        assert len(account.evaluate_many(plans(evaluator, 3, seed=1))) == 1  # what is left can pay for one
        with pytest.raises(BudgetExhausted):
            account.evaluate_many(plans(evaluator, 1, seed=2))

    def test_a_dropped_plan_may_be_finished_without_another_charge(self, workload):
        evaluator = evaluator_of(workload, rungs=(2,))
        account = EvaluationBudget(evaluator, EvaluationLog(), method="m", seed=0, limit=4)
        many = plans(evaluator, 4)
        found = account.evaluate_many(many)
        dropped = next(w for w, c in zip(many, found, strict=True) if c.samples == 2)
        before = account.samples
        assert account.evaluate(dropped).samples == 8 and account.spent == 4 and not account.left
        assert account.samples == before + 6

    def test_a_ledger_is_replayed(self, workload, tmp_path):
        evaluator = evaluator_of(workload, rungs=(2, 5))
        many, path = plans(evaluator, 6), tmp_path / "ledger.jsonl"
        first = EvaluationBudget(evaluator, EvaluationLog(path), method="m", seed=0, limit=9)
        expected = first.evaluate_many(many)
        whole = path.read_bytes()
        for keep in (3, 7, 11):  # killed in the first rung, in the second one, at the end
            path.write_bytes(b"".join(whole.splitlines(keepends=True)[:keep]))
            fresh = evaluator_of(workload, rungs=(2, 5))
            again = EvaluationBudget(fresh, EvaluationLog(path), method="m", seed=0, limit=9)
            found = again.evaluate_many(many)
            assert [(c.widths, c.score, c.samples) for c in found] == [
                (c.widths, c.score, c.samples) for c in expected
            ]
            assert again.samples == first.samples and again.spent == first.spent
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            assert [(r["widths"], r["score"], r["samples"]) for r in rows] == [
                (r["widths"], r["score"], r["samples"]) for r in map(json.loads, whole.splitlines())
            ]

    def test_ledgers_of_the_first_version_are_read(self, workload, tmp_path):
        evaluator, path = evaluator_of(workload), tmp_path / "ledger.jsonl"
        widths = plans(evaluator, 1)[0]
        EvaluationBudget(evaluator, EvaluationLog(path), method="m", seed=0, limit=9).evaluate(widths)
        row = json.loads(path.read_text())
        assert row.pop("samples") == 8
        path.write_text(json.dumps(row) + "\n")
        again = EvaluationBudget(evaluator_of(workload), EvaluationLog(path), method="m", seed=0, limit=9)
        assert again.evaluate(widths).score == row["score"] and candidate_of(row).samples == 0
        assert len(path.read_text().splitlines()) == 1

    def test_without_rungs_a_batch_is_evaluated_one_by_one(self, workload):
        evaluator = evaluator_of(workload)
        account = EvaluationBudget(evaluator, EvaluationLog(), method="m", seed=0, limit=3)
        found = account.evaluate_many(plans(evaluator, 5))
        assert len(found) == 3 and all(c.samples == 8 for c in found)
        with pytest.raises(BudgetExhausted):
            account.evaluate_many(plans(evaluator, 5)[3:])
