"""Evaluator, ledger and account: what is scored, remembered and charged."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import rlprune
from helpers.nets import build
from helpers.workloads import Images
from rlprune.config.config import ScoreConfig
from rlprune.config.training import RecoveryConfig
from rlprune.errors import ArtifactError, BudgetError, DataError
from rlprune.evaluation.evaluator import Evaluator
from rlprune.evaluation.ledger import BudgetExhausted, EvaluationBudget, EvaluationLog, candidate_of


@pytest.fixture(scope="module")
def evaluator():
    return Evaluator(Images(build("cifar_resnet20")), importance="l2")


def plans(evaluator, count, seed=0):
    rng = np.random.default_rng(seed)
    return list(evaluator.space.project(rng.random((count, len(evaluator.space.groups))), 0.5))


class TestEvaluator:
    def test_score_is_minus_the_divergence_from_the_dense_model(self, evaluator):
        widths = plans(evaluator, 1)[0]
        candidate = evaluator.evaluate(widths)
        slim, workload = evaluator.build(widths), evaluator.workload
        images, labels = workload.parts["validation"]
        with torch.no_grad():
            dense, cut = workload.model(images), slim(images)
        divergence = F.kl_div(
            F.log_softmax(cut, -1), F.log_softmax(dense, -1), log_target=True, reduction="batchmean"
        )
        assert candidate.score == pytest.approx(-float(divergence), rel=1e-4)
        assert candidate.loss == pytest.approx(float(F.cross_entropy(cut, labels)), rel=1e-4)
        assert candidate.metric == pytest.approx(float((cut.argmax(1) == labels).float().mean()))
        assert candidate.cost == evaluator.space.cost(widths) and candidate.error > 0

    def test_same_widths_are_scored_once_and_the_same_from_scratch(self, evaluator):
        widths = plans(evaluator, 1)[0]
        assert evaluator.evaluate(widths) is evaluator.evaluate(tuple(widths))
        other = Evaluator(evaluator.workload, importance="l2").evaluate(widths)
        assert other.score == evaluator.evaluate(widths).score

    def test_dense_is_the_best_there_is_without_recovery(self):
        plain = Evaluator(
            Images(build("Residual")), importance="l1", recovery=RecoveryConfig(steps=("none",))
        )
        assert plain.dense.score == pytest.approx(0.0, abs=1e-6)
        assert all(plain.evaluate(w).score < 0 for w in plans(plain, 5))

    @pytest.mark.parametrize("kind", ["loss", "accuracy"])
    def test_other_scores_on_request(self, kind):
        other = Evaluator(Images(build("Residual")), importance="l1", score=ScoreConfig(kind=kind))
        candidate = other.evaluate(plans(other, 1)[0])
        assert candidate.score == pytest.approx(-candidate.loss if kind == "loss" else candidate.metric)

    def test_a_search_may_look_at_fewer_images_than_the_choice(self):
        few = Evaluator(Images(build("Residual")), importance="l1", score=ScoreConfig(samples=16))
        widths = plans(few, 1)[0]
        whole = Evaluator(few.workload, few.space, importance="l1")
        assert few.evaluate(widths).score != few.evaluate_full(widths).score == whole.evaluate(widths).score

    def test_stages_cut_what_the_stage_before_left(self, evaluator):
        space = evaluator.space
        first, last = space.project(np.ones(12), 0.7), space.project(np.ones(12), 0.4)
        staged = evaluator.evaluate_staged((first, last))
        assert staged.cost == evaluator.evaluate(last).cost and staged.score != evaluator.evaluate(last).score
        plan = evaluator.staged_plan((tuple(first), tuple(last)))
        assert plan.widths.tolist() == last.tolist()
        shapes = {k: v.shape for k, v in rlprune.prune(evaluator.workload.model, plan).state_dict().items()}
        assert {k: v.shape for k, v in evaluator.build((first, last)).state_dict().items()} == shapes
        with pytest.raises(BudgetError, match="do not fit"):
            evaluator.evaluate_staged((last, first))

    def test_the_search_cannot_read_the_test_split(self, evaluator):
        with pytest.raises(DataError, match="test split is closed"):
            evaluator.workload.evaluate(evaluator.workload.model, "test")

    def test_diverged_candidates_are_the_worst_not_a_hole(self):
        workload = Images(build("Residual"))
        judge = Evaluator(workload, importance="l1")
        judge._builder.dense.recovery = lambda slim, plan, limit: slim.head.weight.data.fill_(float("inf"))
        assert judge.evaluate(plans(judge, 1)[0]).score == -1e9


class TestAccount:
    def test_distinct_plans_are_charged_and_repeats_are_free(self, evaluator):
        account = EvaluationBudget(evaluator, EvaluationLog(), method="m", seed=0, limit=3)
        a, b, c, d = plans(evaluator, 4)
        for widths in (a, a, b, a, c, b):
            account.evaluate(widths)
        assert (account.spent, account.left, account.calls) == (3, 0, 6)
        with pytest.raises(BudgetExhausted):
            account.evaluate(d)
        account.evaluate(a)
        account.evaluate(a)
        with pytest.raises(BudgetExhausted):
            account.evaluate(a)
        assert account.best.score == max(x.score for x in account.history)

    def test_what_another_method_has_scored_is_charged_all_the_same(self, evaluator):
        ledger, widths = EvaluationLog(), plans(evaluator, 1)[0]
        for method in ("first", "second"):
            account = EvaluationBudget(evaluator, ledger, method=method, seed=0, limit=5)
            account.evaluate(widths)
            assert account.spent == 1
        assert [r["method"] for r in ledger.rows] == ["first", "second"]

    def test_ledger_is_replayed_and_a_torn_line_dropped(self, evaluator, tmp_path):
        path = tmp_path / "ledger.jsonl"
        many = plans(evaluator, 4)
        account = EvaluationBudget(evaluator, EvaluationLog(path), method="m", seed=0, limit=9)
        for widths in many[:3]:
            account.evaluate(widths)
        whole = path.read_bytes()
        path.write_bytes(whole + b'{"index": 3, "seco')
        fresh = Evaluator(evaluator.workload, evaluator.space, importance=evaluator.importance)
        scored = []
        fresh._scored = lambda history, full: scored.append(history) or evaluator.evaluate_staged(history)
        again = EvaluationBudget(fresh, EvaluationLog(path), method="m", seed=0, limit=9)
        assert path.read_bytes() == whole
        for widths in many:
            again.evaluate(widths)
        assert len(scored) == 1 and again.spent == 4
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        assert [r["index"] for r in rows] == [0, 1, 2, 3]
        assert [candidate_of(r).score for r in rows] == [evaluator.evaluate(w).score for w in many]

    def test_a_ledger_of_other_settings_is_refused(self, evaluator, tmp_path):
        path = tmp_path / "ledger.jsonl"
        a, b = plans(evaluator, 2)
        EvaluationBudget(evaluator, EvaluationLog(path), method="m", seed=0, limit=9).evaluate(a)
        with pytest.raises(ArtifactError, match="other settings"):
            EvaluationBudget(evaluator, EvaluationLog(path), method="m", seed=0, limit=9).evaluate(b)

    def test_damaged_ledgers_name_the_line(self, evaluator, tmp_path):
        path = tmp_path / "ledger.jsonl"
        EvaluationBudget(evaluator, EvaluationLog(path), method="m", seed=0, limit=9).evaluate(
            plans(evaluator, 1)[0]
        )
        path.write_text("not json\n" + path.read_text())
        with pytest.raises(ArtifactError, match="line 1 is damaged"):
            EvaluationLog(path)

    def test_staged_plans_keep_their_history(self, evaluator, tmp_path):
        path = tmp_path / "ledger.jsonl"
        first, last = evaluator.space.project(np.ones(12), 0.7), evaluator.space.project(np.ones(12), 0.4)
        for _ in range(2):
            account = EvaluationBudget(evaluator, EvaluationLog(path), method="m", seed=0, limit=9)
            account.evaluate_staged((first, last))
            account.evaluate(last)
            assert account.spent == 2 and len(EvaluationLog(path).rows) == 2
