"""Training samples that are scored without their labels: what is added, when, and what is refused."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.nets import build
from helpers.tasks import made
from helpers.workloads import Images
from rlprune import load_config
from rlprune.config.config import ScoreConfig
from rlprune.errors import ConfigError, DataError
from rlprune.evaluation import training_samples
from rlprune.evaluation.evaluator import Evaluator
from rlprune.experiments import prepare_experiment
from rlprune.experiments.usage import check_usage
from rlprune.workloads.loaders import LoaderWorkload

SIZE = 24


class Steady(Images):
    """Images whose training split says that it repeats."""

    repeats_training = True


def workload(kind=Steady):
    return kind(build("Residual"), SIZE)


def evaluator(data, **score):
    return Evaluator(data, importance="l2", score=ScoreConfig(**score))


def plan(found, seed=0):
    shares = np.random.default_rng(seed).random(len(found.space.groups))
    return found.space.project(shares, 0.5)


def divergence(found, widths, images):
    with torch.no_grad():
        dense, cut = found.workload.model(images), found.build(widths)(images)
    return F.kl_div(cut.log_softmax(-1), dense.log_softmax(-1), log_target=True, reduction="none").sum(1)


class TestScores:
    @given(count=st.integers(1, 2 * SIZE), seed=st.integers(0, 3))
    @settings(max_examples=8, deadline=None)
    def test_mean_over_validation_and_the_first_training_samples(self, count, seed):
        found = evaluator(workload(), unlabelled=count)
        widths = plan(found, seed)
        candidate = found.evaluate(widths)
        parts = found.workload.parts
        images = torch.cat([parts["validation"][0], parts["train"][0][:count]])
        each = divergence(found, widths, images).double()
        assert candidate.samples == SIZE + min(count, SIZE)
        assert candidate.score == pytest.approx(-float(each.mean()), rel=1e-4, abs=1e-8)
        assert candidate.error == pytest.approx(float(each.std(unbiased=False)) / len(each) ** 0.5, rel=1e-3)

    def test_loss_and_metric_are_those_of_the_validation_split_and_no_training_label_is_read(self):
        with_labels, without = workload(), workload()
        images, labels = without.parts["train"]
        without.parts["train"] = images, torch.full_like(labels, -1)  # what cross-entropy would refuse
        plain, one, other = (
            evaluator(with_labels),
            evaluator(with_labels, unlabelled=16),
            evaluator(without, unlabelled=16),
        )
        widths = plan(plain)
        a, b, c = (each.evaluate(widths) for each in (plain, one, other))
        assert (b.loss, b.metric) == (a.loss, a.metric)
        assert b.score == c.score != a.score

    def test_limited_samples_and_the_whole_split_both_have_them(self):
        found = evaluator(workload(), samples=8, unlabelled=16)
        widths = plan(found)
        assert found.evaluate(widths).samples == 8 + 16
        assert found.evaluate_full(widths).samples == SIZE + 16

    def test_what_a_surrogate_reads_covers_all_of_them(self):
        found = evaluator(workload(), unlabelled=16)
        cache = found.logit_cache()
        assert len(cache.dense) == SIZE + 16
        widths = plan(found)
        found.evaluate(widths)
        with torch.no_grad():
            parts = found.workload.parts
            images = torch.cat([parts["validation"][0], parts["train"][0][:16]])
            expected = found.build(widths)(images)
        assert torch.allclose(cache.take((tuple(int(w) for w in widths),)), expected, atol=1e-4)

    def test_another_process_scores_the_same(self):
        found = evaluator(workload(), unlabelled=16)
        other = pickle.loads(pickle.dumps(found.bare()))
        widths = plan(found)
        assert other.evaluate(widths).score == found.evaluate(widths).score

    def test_dense_model_has_no_divergence(self):
        found = evaluator(workload(), unlabelled=16)
        assert found._judging.of(False)(found.workload.model).scores.abs().max() < 1e-6

    def test_an_empty_training_split_is_named(self):
        data = workload()
        data.parts["train"] = tuple(part[:0] for part in data.parts["train"])
        with pytest.raises(DataError, match=r"score\.unlabelled: the split 'train' is empty; give 0"):
            evaluator(data, unlabelled=4)

    def test_around_a_later_model_they_are_still_compared_with_the_dense_one(self):
        found = evaluator(workload(), unlabelled=16)
        widths = plan(found)
        cut = found.build(widths)
        later = found.workload.around(cut)
        assert later.reference is found.workload.model
        score = evaluator(later, unlabelled=16).score_of(cut)
        assert score == pytest.approx(found.evaluate(widths).score, rel=1e-4) and score < 0

    def test_a_scale_is_that_of_the_validation_split(self):
        data = made("regression")
        data.repeats_training = True
        found = Evaluator(data, importance="l2", score=ScoreConfig(unlabelled=1))
        slim = found.build(plan(found))
        validation, training = (next(iter(data.batches(split)))[0] for split in ("validation", "train"))
        images = torch.cat([batch[0] for batch in data.batches("validation")] + [training[:1]])
        task = data.task_type
        with torch.no_grad():
            dense, cut = (task.read(task.forward(m, images), data.output) for m in (data.model, slim))
        scale = task.scale([task.kept(task.part(dense, slice(0, len(images) - 1)))])
        expected = -task.divergence(task.kept(dense), cut, scale)
        assert len(validation) and found.evaluate(plan(found)).score == pytest.approx(
            float(expected.mean()), rel=1e-4
        )


class TestHowMany:
    def test_auto_makes_a_thousand_with_a_small_validation_split(self):
        data = workload()
        assert training_samples.wanted(data, ScoreConfig()) == SIZE  # all that there are
        assert evaluator(data).evaluate(plan(evaluator(data))).samples == 2 * SIZE

    @pytest.mark.parametrize(
        "score", [{"samples": 8}, {"kind": "loss"}, {"kind": "accuracy"}, {"unlabelled": 0}], ids=str
    )
    def test_auto_adds_none(self, score):
        found = evaluator(workload(), **score)
        assert found.scoring_facts["unlabelled"] == 0
        assert found.evaluate(plan(found)).samples == min(score.get("samples", SIZE), SIZE)

    def test_auto_adds_none_to_a_large_validation_split(self, monkeypatch):
        monkeypatch.setattr(training_samples, "SAMPLES", SIZE)
        assert training_samples.wanted(workload(), ScoreConfig()) == 0

    def test_auto_adds_none_where_the_training_split_may_differ_each_time(self):
        assert training_samples.wanted(workload(Images), ScoreConfig()) == 0

    def test_auto_adds_none_where_an_output_is_a_map(self):
        data = made("segmentation")
        data.repeats_training = True
        assert training_samples.wanted(data, ScoreConfig()) == 0
        assert training_samples.wanted(data, ScoreConfig(unlabelled=3)) == 3

    def test_digits_have_them_and_say_so(self):
        sizes = ["data.calibration=32", "data.validation=40", "model.train.epochs=0", "threads=1"]
        found = prepare_experiment(load_config("digits", [*sizes, "prune.importance=l2"]), name="d").evaluator
        count = found.workload.size("train")
        assert found.scoring_facts["unlabelled"] == min(count, 960)
        assert found.dense.samples == 40 + min(count, 960)


class TestRefused:
    def refused(self, data, **score):
        with pytest.raises(ConfigError) as error:
            evaluator(data, **score)
        message = str(error.value)
        assert message.startswith("score.unlabelled: ") and "\n" not in message
        assert message.endswith("allowed here: 0, auto")
        return message

    def test_scores_that_need_labels(self):
        assert "of score.kind 'loss' it is not known" in self.refused(workload(), kind="loss", unlabelled=4)

    def test_a_function_that_judges_a_model_as_a_whole(self):
        data = workload()
        data.score_fn = lambda model: 0.0
        assert "as a whole" in self.refused(data, unlabelled=4)

    def test_training_splits_that_may_differ(self):
        assert "(repeats_training)" in self.refused(workload(Images), unlabelled=4)
        batches = [(torch.zeros(2, 3, 16, 16), torch.zeros(2, dtype=torch.int64))]
        loaders = dict.fromkeys(("train", "calibration", "validation", "test"), batches)
        model = build("cifar_resnet20", torch.float32)
        assert "(repeats_training)" in self.refused(
            LoaderWorkload(model, torch.zeros(1, 3, 16, 16), loaders), unlabelled=4
        )

    @pytest.mark.parametrize("text", ["some", "-1", "1.5"])
    def test_what_is_no_number(self, text):
        with pytest.raises(ConfigError, match=r"^score\.unlabelled: "):
            load_config("digits", [f"score.unlabelled={text}"])

    @pytest.mark.parametrize(
        ("command", "config", "override", "reason"),
        [
            ("train", "digits", "score.kind=loss", "only of score.kind kl"),
            ("fidelity", "digits", "seed=0", "compares halves"),
            ("train", "tiny_llama", "seed=0", "is a language model"),
        ],
    )
    def test_commands_and_models_without_a_use_for_it(self, command, config, override, reason):
        given = ["score.unlabelled=8", override]
        with pytest.raises(ConfigError, match=reason):
            check_usage(load_config(config, given), command, given)
