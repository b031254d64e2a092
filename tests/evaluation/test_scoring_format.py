"""In which format candidates are scored, and who decides it."""

from __future__ import annotations

import gc
import json
import weakref

import numpy as np
import pytest
import torch
from torch import nn

from helpers.nets import build
from helpers.workloads import Images
from rlprune.config.config import ScoreConfig
from rlprune.config.training import RecoveryConfig
from rlprune.errors import ConfigError
from rlprune.evaluation import evaluator as evaluators
from rlprune.evaluation import format_trial
from rlprune.evaluation.evaluator import Evaluator
from rlprune.evaluation.format_trial import FormatTrial, try_format
from rlprune.vision import scoring
from rlprune.workloads.scoring_format import ScoringFormat

BF16 = ScoringFormat(autocast=torch.bfloat16, channels_last=True)
SURE = ScoringFormat(channels_last=True, folded=True)


def evaluator_of(dtype="auto", model=None, weights=torch.float32):
    workload = Images(build("cifar_resnet20") if model is None else model, dtype=weights)
    return Evaluator(workload, importance="l2", score=ScoreConfig(dtype=dtype))


def plans(evaluator, count, seed=0):
    rng = np.random.default_rng(seed)
    return list(evaluator.space.project(rng.random((count, len(evaluator.space.groups))), 0.5))


class TestWhichFormats:
    def test_a_small_model_is_scored_as_it_is(self):
        for dtype in ("auto", "float32"):
            evaluator = evaluator_of(dtype)
            assert evaluator.scoring_format == ScoringFormat()
            assert evaluator.settle_format(0.5) is None
            assert evaluator.scoring_facts == {"format": "float32", "trial": None, "unlabelled": 0}
            kept = evaluator.build(plans(evaluator, 1)[0])
            scored = evaluator.build(plans(evaluator, 1)[0], scoring=True)
            assert all(torch.equal(a, b) for a, b in zip(kept.parameters(), scored.parameters(), strict=True))

    def test_a_large_one_lies_channels_last_until_a_trial(self, monkeypatch):
        monkeypatch.setattr(scoring, "LEAST_MACS", 1.0)
        evaluator = evaluator_of()
        assert evaluator.scoring_format == SURE and evaluator._formats == [BF16, SURE]
        assert evaluator_of("float32")._formats == [SURE]
        assert evaluator_of("bfloat16")._formats == [BF16]
        name = "float32, channels last, batch norms folded"
        assert evaluator.scoring_facts == {"format": name, "trial": None, "unlabelled": 0}

    def test_a_model_that_has_no_bfloat16(self, monkeypatch):
        monkeypatch.setattr(scoring, "LEAST_MACS", 1.0)
        with pytest.raises(ConfigError, match=r"score\.dtype: no bfloat16 for a model with float64 weights"):
            evaluator_of("bfloat16", weights=torch.float64)
        assert evaluator_of(weights=torch.float64)._formats == [ScoringFormat()]


class TestScoring:
    def test_what_is_kept_is_float32_and_as_it_always_was(self, monkeypatch):
        plain = evaluator_of()
        monkeypatch.setattr(scoring, "LEAST_MACS", 1.0)
        widths = plans(plain, 1)[0]
        before = plain.build(widths)
        for dtype in ("float32", "bfloat16"):
            evaluator = evaluator_of(dtype)
            evaluator.evaluate(widths)
            kept = evaluator.build(widths)
            assert all(torch.equal(a, b) for a, b in zip(before.parameters(), kept.parameters(), strict=True))
            assert all(torch.equal(a, b) for a, b in zip(before.buffers(), kept.buffers(), strict=True))
            assert not kept._forward_pre_hooks and not kept._forward_hooks

    @pytest.mark.parametrize("name", ["cifar_resnet20", "Concatenation", "Grouped", "Transposed"])
    def test_scores_are_those_of_the_plain_format(self, name, monkeypatch):
        plain = evaluator_of(model=build(name))
        monkeypatch.setattr(scoring, "LEAST_MACS", 1.0)
        sure, rough = evaluator_of("float32", build(name)), evaluator_of("bfloat16", build(name))
        every = plans(plain, 4)
        wanted = np.array([plain.evaluate(w).score for w in every])
        same = np.array([sure.evaluate(w).score for w in every])
        np.testing.assert_allclose(same, wanted, rtol=2e-4, atol=2e-6)
        near = np.array([rough.evaluate(w).score for w in every])
        assert (near != wanted).all()  # the setting does something
        np.testing.assert_allclose(near, wanted, rtol=0.1, atol=2e-3)

    def test_passes_of_a_candidate_run_in_bfloat16_and_answer_in_float32(self, monkeypatch):
        monkeypatch.setattr(scoring, "LEAST_MACS", 1.0)
        evaluator = evaluator_of("bfloat16")
        slim = evaluator.build(plans(evaluator, 1)[0], scoring=True)
        assert {p.dtype for p in slim.parameters()} == {torch.float32}
        assert slim.conv1.weight.is_contiguous(memory_format=torch.channels_last)
        seen = []
        slim.conv1.register_forward_hook(lambda layer, inputs, output: seen.append(output.dtype))
        out = slim(torch.randn(2, 3, 16, 16))
        assert seen == [torch.bfloat16] and out.dtype == torch.float32
        assert not torch.is_autocast_enabled("cpu")
        with pytest.raises(RuntimeError):
            slim(torch.randn(2, 5, 16, 16))
        assert not torch.is_autocast_enabled("cpu")  # whatever happens inside

    def test_a_candidate_is_freed_when_it_is_let_go(self):
        model = BF16.put_on(nn.Sequential(nn.Conv2d(3, 4, 3)))
        gone = weakref.ref(model)
        gc.disable()
        try:
            model(torch.randn(1, 3, 8, 8))
            del model
            assert gone() is None
        finally:
            gc.enable()

    def test_one_stage_after_another(self, monkeypatch):
        monkeypatch.setattr(scoring, "LEAST_MACS", 1.0)
        plain, evaluator = evaluator_of("float32"), evaluator_of("bfloat16")
        ones = np.ones(len(plain.space.groups))
        history = tuple(plain.space.project(ones, share) for share in (0.7, 0.4))
        near = evaluator.evaluate_staged(history).score
        assert near == pytest.approx(plain.evaluate_staged(history).score, rel=0.1)

    def test_the_settled_settings_give_the_same_format_without_a_trial(self, monkeypatch):
        monkeypatch.setattr(scoring, "LEAST_MACS", 1.0)
        evaluator = evaluator_of()
        evaluator.format_trial = None
        for chosen, name in ((evaluator._formats[0], "bfloat16"), (evaluator._formats[1], "float32")):
            evaluator._format = chosen
            assert evaluator.settled.dtype == name
            assert evaluator_of(name).scoring_format == chosen


def trial_of(scores, speed=3.0):
    """What a trial says where the first format gives ``scores``, the second the plan's number, and takes that long."""
    asked = []

    def trial(widths, chosen, calibration, validation):
        asked.append((tuple(widths), chosen, calibration))
        number = list(dict.fromkeys(plan for plan, *_ in asked)).index(tuple(widths))
        ours = chosen == BF16
        return (scores(number) if ours else float(number)), (1.0 if ours else speed)

    return trial, asked


class TestTrial:
    names = ("bfloat16", "float32")

    def tried(self, trial):
        space = evaluator_of().space
        return try_format(trial, space, 0.5, "macs", [BF16, SURE], self.names, (28, 84))

    def test_faster_and_alike_is_taken(self):
        trial, asked = trial_of(lambda number: 0.9 * number - 5)
        found = self.tried(trial)
        assert found.taken and found.speed == 3.0 and found.spearman == 1.0 and found.plans == 12
        assert "3.0 times as fast as float32, Spearman 1.000 over 12 plans" in str(found)
        assert [c for _, c, _ in asked[4:8]] == [SURE, BF16, BF16, SURE]  # in turns
        assert {n for *_, n in asked[4:]} == {28}  # and all of the samples

    def test_one_pair_of_neighbours_may_change_places_and_two_may_not(self):
        one = self.tried(trial_of(lambda n: {3: 4.0, 4: 3.0}.get(n, float(n)))[0])
        two = self.tried(trial_of(lambda n: {3: 4.0, 4: 3.0, 7: 8.0, 8: 7.0}.get(n, float(n)))[0])
        assert one.taken and one.spearman == pytest.approx(0.993)
        assert not two.taken and "ranks plans otherwise" in str(two)

    def test_what_is_not_faster_is_not_looked_at_further(self):
        trial, asked = trial_of(float, speed=0.9)
        found = self.tried(trial)
        assert not found.taken and found.spearman is None and len(asked) == 4
        assert "scoring in float32" in str(found) and "slower on a few samples" in str(found)

    def test_what_is_hardly_faster_is_not_taken(self):
        found = self.tried(trial_of(float, speed=1.2)[0])
        assert not found.taken and found.spearman == 1.0 and "less than 1.3 times as fast" in str(found)

    def test_samples_have_the_proportion_of_a_whole_candidate(self):
        space = evaluator_of().space
        assert format_trial.trial_samples(space, 512, 2000) == (512, 2000)  # a small model: all of them
        for macs, wanted in ((1e6, (23, 89)), (1e8, (23, 89)), (3e8, (61, 239))):
            format_trial_macs = macs * space.dense_cost("macs") / 1e6
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(format_trial, "MACS", format_trial_macs)
                assert format_trial.trial_samples(space, 512, 2000) == wanted
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(format_trial, "MACS", 0.0)
            assert format_trial.trial_samples(space, 10, 2000) == (16, 96)
            assert format_trial.trial_samples(space, 8, 8) == (1, 15)

    def test_a_model_that_does_not_run_in_it(self):
        def trial(widths, chosen, calibration, validation):
            if chosen == BF16:
                raise RuntimeError("not implemented for 'BFloat16'")
            return 0.0, 1.0

        found = self.tried(trial)
        assert not found.taken and "does not run in it (RuntimeError)" in found.reason

    def test_scores_that_are_not_finite(self):
        found = self.tried(trial_of(lambda number: float("nan"))[0])
        assert not found.taken and "finite" in found.reason


class TestSettling:
    @pytest.fixture
    def large(self, monkeypatch, own_cache):
        monkeypatch.setattr(scoring, "LEAST_MACS", 1.0)
        return own_cache

    def answer(self, monkeypatch, taken):
        def made(trial, space, budget, metric, formats, names, samples):
            score, seconds = trial(space.widths, formats[0], 8, 8)
            assert np.isfinite(score) and seconds > 0
            return FormatTrial(*names, 2.0, 1.0, 0.01, 12, taken, "" if taken else "slow")

        monkeypatch.setattr(evaluators, "try_format", made)

    def test_the_first_decision_stands_for_whoever_comes_later(self, large, monkeypatch):
        self.answer(monkeypatch, taken=True)
        evaluator = evaluator_of()
        assert evaluator.settle_format(0.5).taken and evaluator.scoring_format == BF16
        self.answer(monkeypatch, taken=False)
        again = evaluator_of()
        assert again.settle_format(0.5).taken and again.scoring_format == BF16
        assert again.scoring_facts["trial"]["speed"] == 2.0
        (path,) = (large / "scoring").glob("*.json")
        assert json.loads(path.read_text())["taken"] is True
        path.write_text("torn")
        assert not evaluator_of().settle_format(0.5).taken
        # Another budget, model or score is another question.
        assert not evaluator_of().settle_format(0.3).taken
        other = evaluator_of(model=build("Concatenation"))
        assert not other.settle_format(0.5).taken and other.scoring_format == SURE

    def test_it_comes_before_the_first_score_and_leaves_none(self, large, monkeypatch):
        self.answer(monkeypatch, taken=True)
        evaluator = evaluator_of()
        evaluator.settle_format(0.5)
        assert not evaluator._bank and not evaluator._memo
        assert evaluator.fork().scoring_format == BF16
        late = evaluator_of()
        late.evaluate(plans(late, 1)[0])
        with pytest.raises(ConfigError, match="before the first score"):
            late.settle_format(0.5)

    def test_a_real_trial(self, large, monkeypatch):
        """Whatever this machine says, the decision follows from what it measured."""
        monkeypatch.setattr(format_trial, "PLANS", 5)
        evaluator = evaluator_of()
        found = evaluator.settle_format(0.5)
        assert found.taken == (found.reason == "")
        assert found.taken == (evaluator.scoring_format == BF16)
        if found.spearman is not None:
            assert found.plans == 5 and -1 <= found.spearman <= 1


def test_a_rough_candidate_reads_fewer_calibration_samples(monkeypatch):
    seen = []
    for samples in (None, 4):
        evaluator = Evaluator(
            Images(build("cifar_resnet20")), importance="l2", recovery=RecoveryConfig(samples=samples)
        )
        original = evaluator.calibration.batches
        monkeypatch.setattr(
            evaluator.calibration,
            "batches",
            lambda limit=None, original=original: seen.append(limit) or original(limit),
        )
        widths = plans(evaluator, 1)[0]
        evaluator.evaluate(widths)
        evaluator._trial(widths, ScoringFormat(), 8, 8)
    # The first time that so many are read, they pass the dense model as well: as it is, and as batch norms normalise.
    assert seen == [None, None, None, 8, 8, 8, 4, 4, 4, 4]
