"""The evaluator on a language model: what is scored, what candidates share, and in which number format."""

from __future__ import annotations

import gc
import math
import weakref

import numpy as np
import pytest
import torch

import rlprune
from helpers.language_workload import evaluator_of, plans, workload_of
from helpers.lm import tiny_lm
from rlprune.config.config import ScoreConfig
from rlprune.config.training import RecoveryConfig
from rlprune.errors import BudgetError
from rlprune.evaluation.evaluator import Evaluator
from rlprune.language.dtype import scoring_dtype
from rlprune.language.workload import LanguageWorkload


@pytest.fixture(scope="module")
def workload() -> LanguageWorkload:
    return workload_of(tiny_lm("llama"))


class TestEvaluator:
    @pytest.mark.parametrize("steps", [("none",), ("reconstruct",), ("bias", "reconstruct")])
    def test_scores_what_it_builds(self, workload, steps):
        evaluator = evaluator_of(workload, steps=steps)
        widths = plans(evaluator, 1)[0]
        candidate = evaluator.evaluate(widths)
        slim = evaluator.build(widths)
        quality = workload.evaluate(slim, "validation")
        assert candidate.loss == pytest.approx(quality.loss, rel=1e-5)
        assert candidate.metric == pytest.approx(quality.metric, rel=1e-4)
        assert candidate.score == pytest.approx(
            float(workload.judge("kl", top_k=20)(slim).scores.mean()), rel=1e-3
        )
        assert candidate.cost == evaluator.space.cost(widths, "params") and candidate.samples == 8
        assert candidate.cost == sum(
            p.numel() for p in rlprune.prune(workload.model, evaluator.plan(widths)).parameters()
        )

    @pytest.mark.parametrize("importance", ["l2", "wanda_sp", "obs"])
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_scoring_never_touches_the_dense_model_or_what_is_built_for_keeps(
        self, workload, dtype, importance
    ):
        before = {k: v.clone() for k, v in workload.model.state_dict().items()}
        evaluator = evaluator_of(workload, dtype=dtype, importance=importance, steps=("bias", "reconstruct"))
        widths = plans(evaluator, 2)
        for w in [*widths, evaluator.space.widths]:
            evaluator.evaluate(w)
        slim = evaluator.build(widths[0])
        assert {p.dtype for p in slim.parameters()} == {torch.float32}
        own = {p.data_ptr() for p in workload.model.parameters()}
        assert not own & {p.data_ptr() for p in slim.parameters()}
        assert all(torch.equal(v, before[k]) for k, v in workload.model.state_dict().items())
        assert {p.dtype for p in workload.model.parameters()} == {torch.float32}

    def test_candidates_share_what_no_plan_cuts(self, workload):
        evaluator = evaluator_of(workload, dtype="bfloat16")
        one, two = (evaluator.build(w, scoring=True) for w in plans(evaluator, 2))
        assert one.model.embed_tokens.weight.data_ptr() == two.model.embed_tokens.weight.data_ptr()
        assert one.model.embed_tokens.weight.dtype == torch.bfloat16
        assert set(evaluator._builder.dense.shared) == {"model.embed_tokens.weight", "lm_head.weight"}

    def test_a_candidate_that_is_trained_shares_nothing(self, workload):
        before = {k: v.clone() for k, v in workload.model.state_dict().items()}
        evaluator = Evaluator(
            workload,
            importance="l2",
            recovery=RecoveryConfig(steps=("finetune",), finetune_steps=2, finetune_lr=0.01),
            score=ScoreConfig(dtype="float32"),
        )
        evaluator.evaluate(plans(evaluator, 1)[0])
        assert all(torch.equal(v, before[k]) for k, v in workload.model.state_dict().items())

    @pytest.mark.parametrize("importance", ["obs", "obs_fisher", "l2"])
    def test_gram_matrices_are_made_once_and_one_block_at_a_time(self, workload, monkeypatch, importance):
        from rlprune.language.calibration import grams

        made: dict[str, int] = {}
        alive: list[weakref.ref[torch.Tensor]] = []
        collected = grams._collected

        def collect(*args):
            gc.collect()
            assert not [ref for ref in alive if ref() is not None], "the block before is still in memory"
            found = collected(*args)
            for name, gram in found.items():
                made[name] = made.get(name, 0) + 1
                alive.append(weakref.ref(gram.product))
            return found

        monkeypatch.setattr(grams, "_collected", collect)
        evaluator = evaluator_of(workload, importance=importance, steps=("reconstruct",))
        names = [c.module for c in grams.unit_consumers(evaluator.space)]
        assert list(made) == names and set(made.values()) == {1}
        assert evaluator.recovery.nbytes > 0

    def test_candidates_hold_no_copy_of_an_uncut_matrix(self, workload):
        """By address: all matrices that a plan leaves whole are the dense model's own."""
        evaluator = evaluator_of(workload, steps=("reconstruct",))
        widths = evaluator.space.widths.copy()
        widths[1] //= 2
        slim = evaluator.build(widths, scoring=True)
        dense = dict(workload.model.named_parameters())
        cut = {name for name, p in slim.named_parameters() if p.shape != dense[name].shape}
        assert len(cut) == 3  # gate, up and down of one block
        for name, parameter in slim.named_parameters():
            same = parameter.data_ptr() == dense[name].data_ptr()
            assert same == (name not in cut and parameter.ndim > 1), name
        evaluator.evaluate(widths)
        kept = evaluator.build(widths)  # for keeps: all its own
        assert not {p.data_ptr() for p in kept.parameters()} & {p.data_ptr() for p in dense.values()}

    def test_the_dense_model_is_asked_before_a_candidate_is_in_memory(self, workload, monkeypatch):
        fresh = workload_of(tiny_lm("llama"))
        evaluator = evaluator_of(fresh, rungs=(3, 5))
        judge, built, known = evaluator._judging.of(False), evaluator._builder, []
        monkeypatch.setattr(
            evaluator, "_builder", lambda *a, **k: (known.append(judge._answers._known), built(*a, **k))[1]
        )
        first, second = plans(evaluator, 2)
        evaluator.evaluate_partial(first, 3)
        evaluator.evaluate(first)
        evaluator.evaluate(second)
        assert known == [3, 8, 8]
        asked = evaluator_of(fresh, rungs=(3, 5), kind="loss")  # no dense answers in it
        assert asked.evaluate(first).samples == 8

    def test_statistics_are_shared_by_importance_and_rules(self, workload, monkeypatch):
        evaluator = evaluator_of(workload, importance="wanda_sp")
        monkeypatch.setattr("rlprune.language.calibration.cache.collect_statistics", None)
        contexts = [evaluator.context(0.7, "block_params") for _ in range(2)]
        assert contexts[0].statistics() is contexts[1].statistics()

    def test_stages_of_incremental_pruning(self, workload):
        evaluator = evaluator_of(workload, importance="wanda_sp", steps=("reconstruct",))
        first = evaluator.space.project(np.ones(len(evaluator.space.groups)), 0.8, "block_params")
        last = evaluator.space.project(np.ones(len(evaluator.space.groups)), 0.6, "block_params")
        staged = evaluator.evaluate_staged((first, last))
        assert staged.cost == evaluator.evaluate(last).cost and math.isfinite(staged.score)
        plan = evaluator.staged_plan((first, last))
        shapes = {k: v.shape for k, v in rlprune.prune(workload.model, plan).state_dict().items()}
        assert {k: v.shape for k, v in evaluator.build((first, last)).state_dict().items()} == shapes
        with pytest.raises(BudgetError, match="do not fit"):
            evaluator.evaluate_staged((last, first))

    def test_fewer_sequences_in_the_search_than_for_the_choice(self, workload):
        evaluator = evaluator_of(workload, samples=3)
        widths = plans(evaluator, 1)[0]
        assert evaluator.evaluate(widths).samples == 3 and evaluator.evaluate_full(widths).samples == 8

    def test_the_number_format_of_scores(self, workload, tmp_path, monkeypatch):
        assert scoring_dtype(workload.model, "float32") == torch.float32
        assert scoring_dtype(workload.model, "bfloat16") == torch.bfloat16
        monkeypatch.setenv("RLPRUNE_CACHE", str(tmp_path))
        clock = {"faster": torch.bfloat16}
        monkeypatch.setattr(
            "rlprune.language.dtype._product_seconds", lambda w, d: 1.0 if d == clock["faster"] else 3.0
        )
        assert scoring_dtype(workload.model, "auto") == torch.bfloat16
        clock["faster"] = torch.float32  # decided once: a resumed run scores as the first one did
        assert scoring_dtype(workload.model, "auto") == torch.bfloat16
        monkeypatch.setenv("RLPRUNE_CACHE", str(tmp_path / "other"))
        assert scoring_dtype(workload.model, "auto") == torch.float32
