"""The contract of a task, over a user's own workload of each: scores, training, what may be a batch."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from helpers.tasks import TASKS, Made, detection, faster_rcnn, fcos, made, retinanet, seen
from rlprune.config.training import FinishConfig, RecoveryConfig
from rlprune.evaluation.evaluator import Evaluator
from rlprune.importance import taylor, taylor_param_second
from rlprune.utils.timing import measure
from rlprune.workloads.adapter import TuneJob
from rlprune.workloads.checks import check_workload

KINDS = [*TASKS]


def damaged(model: nn.Module, size: float, seed: int = 0) -> nn.Module:
    """A copy whose weights are off by noise of a size."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(size * noise * parameter.abs().mean())
    return other


@pytest.fixture(params=KINDS)
def workload(request: pytest.FixtureRequest) -> Made:
    return made(request.param)


class TestScore:
    def test_the_dense_model_has_the_highest(self, workload: Made) -> None:
        judge = workload.judge()
        dense, off = judge(workload.model).scores, judge(damaged(workload.model, 0.5)).scores
        assert dense.shape == off.shape == (12,)
        assert dense.abs().max() < 1e-5
        assert (off < -1e-5).all()

    def test_it_falls_with_the_damage(self, workload: Made) -> None:
        judge = workload.judge()
        means = [float(judge(damaged(workload.model, size)).scores.mean()) for size in (0.03, 0.2, 1.0)]
        assert means[0] > means[1] > means[2]

    def test_it_does_not_depend_on_the_batches(self, workload: Made) -> None:
        other = damaged(workload.model, 0.3)
        first = workload.judge()(other)
        workload.batch = 12
        second = workload.judge()(other)
        assert torch.allclose(first.scores, second.scores, rtol=1e-4, atol=1e-6)
        assert first.metric == pytest.approx(second.metric, rel=1e-4, abs=1e-6)

    def test_a_prefix_is_scored_as_in_the_whole(self, workload: Made) -> None:
        other, judge = damaged(workload.model, 0.3), workload.judge()
        whole, parts = judge(other), [judge(other, 0, 3), judge(other, 3, 8), judge(other, 8)]
        joint = judge.merge(parts)
        assert [len(part.scores) for part in parts] == [3, 5, 4] and joint.count == 12
        assert torch.allclose(joint.scores, whole.scores, rtol=1e-4, atol=1e-6)
        assert joint.metric == pytest.approx(whole.metric, rel=1e-5, abs=1e-7)
        assert torch.allclose(
            workload.judge(limit=7)(workload.model).scores, torch.zeros(7).double(), atol=1e-5
        )

    def test_loss_and_metric_are_those_of_evaluate(self, workload: Made) -> None:
        other = damaged(workload.model, 0.3)
        judged, quality = workload.judge("loss")(other), workload.evaluate(other, "validation")
        assert judged.loss == pytest.approx(quality.loss, rel=1e-5)
        assert judged.metric == pytest.approx(quality.metric, rel=1e-6)
        assert float(judged.scores.mean()) == pytest.approx(-quality.loss, rel=1e-5)
        assert (judged.count, quality.count) == (12, 12)
        assert workload.judge("accuracy")(other).scores.mean() == pytest.approx(
            quality.metric, rel=1e-6, abs=1e-9
        )


class TestTraining:
    def test_imitating_the_dense_model_it_has_no_gradient(self, workload: Made) -> None:
        inputs, targets = next(iter(workload.batches("train")))
        model = copy.deepcopy(workload.model)
        with torch.no_grad():
            teacher = workload.outputs_for_loss(workload.model, inputs, targets)
        student = workload.outputs_for_loss(model, inputs, targets, teacher)
        loss = workload.distillation(student, teacher, 2.0)
        loss.backward()
        assert loss.ndim == 0 and loss.detach() == pytest.approx(0.0, abs=1e-5)
        assert max(float(p.grad.abs().max()) for p in model.parameters() if p.grad is not None) < 1e-4
        off = damaged(workload.model, 0.3)
        workload.distillation(
            workload.outputs_for_loss(off, inputs, targets, teacher), teacher, 2.0
        ).backward()
        assert max(float(p.grad.abs().max()) for p in off.parameters() if p.grad is not None) > 1e-4

    def test_the_fine_tune_brings_the_loss_down(self, workload: Made) -> None:
        model = damaged(workload.model, 0.3)
        before = workload.evaluate(model, "train").loss
        rate = {"regression": 1e-4}.get(workload.task_type.name, 0.01)
        workload.fine_tune(model, FinishConfig(epochs=12, lr=rate, distill=False), TuneJob(0))
        assert workload.evaluate(model, "train").loss < before
        score = float(workload.judge()(model).scores.mean())
        note = workload.fine_tune(model, FinishConfig(epochs=12, lr=rate / 10), TuneJob(0)).note
        assert "without distillation" not in note
        assert np.isfinite(score)

    def test_importances_are_gradients_of_its_loss(self, workload: Made) -> None:
        space = workload.adapter.trace(workload.model, workload.example_inputs, options())
        for importance in (taylor, taylor_param_second):
            found = importance(
                workload.model,
                space,
                workload.batches("calibration"),
                workload.loss_of,
                workload.outputs_for_loss,
            )
            assert all(np.isfinite(scores).all() for scores in found) and sum(s.sum() for s in found) > 0
        assert not workload.model.training


class TestSearching:
    def test_plans_are_built_recovered_and_told_apart(self, workload: Made) -> None:
        steps = RecoveryConfig(
            steps=("reconstruct", "bn", "finetune"), finetune_steps=2, finetune_lr=1e-4, distill=True
        )
        evaluator = Evaluator(workload, recovery=steps)
        less = np.maximum(evaluator.space.widths // 2, 1)
        found = [evaluator.evaluate(w) for w in (less, np.maximum(evaluator.space.widths - 1, 1))]
        assert len({c.score for c in found}) == 2
        assert all(c.score < 0 and np.isfinite(c.loss) and c.samples == 12 for c in found)

    def test_latency_is_measured(self, workload: Made) -> None:
        times = measure({"dense": workload.model}, workload.example_inputs, (1, 3), repeats=3, warmup=1)
        assert set(times["dense"]) == {1, 3}

    def test_it_is_usable(self, workload: Made) -> None:
        assert check_workload(workload).size("validation") == 12
        assert workload.evaluate(workload.model, "validation", 7).count == 7


def options():
    from rlprune.tracing.trace import TraceOptions

    return TraceOptions()


@pytest.mark.parametrize("model", [retinanet, fcos, faster_rcnn], ids=lambda f: f.__name__)
def test_every_detector_of_torchvision_is_compared_by_its_heads(model) -> None:
    torch.manual_seed(0)
    workload = detection(model())
    seen(workload)
    judge = workload.judge()
    assert judge(workload.model).scores.abs().max() < 1e-5
    for name, module in (("backbone", workload.model.backbone), ("heads", heads_of(workload.model))):
        other = copy.deepcopy(workload.model)
        twin = dict(other.named_modules())[next(n for n, m in workload.model.named_modules() if m is module)]
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.mul_(0.5)
        assert (judge(other).scores < -1e-6).all(), name
    inputs, targets = next(iter(workload.batches("train")))
    first, again = (float(workload.batch_loss(workload.model, inputs, targets).detach()) for _ in range(2))
    assert first == again > 0


def heads_of(model: nn.Module) -> nn.Module:
    return model.roi_heads.box_head if hasattr(model, "roi_heads") else model.head


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(["multilabel", "regression", "embedding", "classification"]), st.integers(0, 10**6))
def test_a_divergence_is_0_at_the_dense_outputs_and_above_it_elsewhere(kind: str, seed: int) -> None:
    from rlprune.workloads.tasks import find_task

    generator, task = torch.Generator().manual_seed(seed), find_task(kind)
    dense, other = (3 * torch.randn(6, 4, generator=generator) for _ in range(2))
    kept = task.kept(dense)
    scale = task.scale([kept])
    assert task.divergence(kept, dense, scale).abs().max() < 1e-5
    apart = task.divergence(kept, other, scale)
    assert apart.shape == (6,) and (apart > 0).all()
    each = torch.cat(
        [task.divergence(task.part(kept, slice(i, i + 1)), other[i : i + 1], scale) for i in range(6)]
    )
    assert torch.allclose(apart, each, rtol=1e-5)


@settings(max_examples=20, deadline=None)
@given(st.floats(1e-4, 1e4), st.integers(0, 10**6))
def test_the_size_of_numbers_does_not_matter_to_a_regression(factor: float, seed: int) -> None:
    from rlprune.workloads.tasks import Regression

    generator, task = torch.Generator().manual_seed(seed), Regression()
    dense, other = (torch.randn(20, 3, generator=generator) for _ in range(2))
    plain = task.divergence(dense, other, task.scale([dense]))
    scaled = task.divergence(factor * dense, factor * other, task.scale([factor * dense]))
    assert torch.allclose(plain, scaled, rtol=1e-4)
    mean = dense.double().mean(dim=0).expand_as(dense)
    assert float(task.divergence(dense, mean, task.scale([dense])).mean()) == pytest.approx(1.0, rel=1e-5)
