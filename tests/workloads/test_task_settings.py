"""What a user may say of a task: the outputs that are meant, whole-split scores and metrics, and what is refused."""

from __future__ import annotations

import dataclasses
import sys
from collections import OrderedDict, namedtuple
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers.modeling_outputs import ImageClassifierOutput

import rlprune
from helpers.registries import forgotten
from helpers.tasks import EXAMPLE, Head, Made, Maps, classification, labelled, made
from rlprune.config.config import ScoreConfig
from rlprune.config.training import FinishConfig, RecoveryConfig
from rlprune.errors import ConfigError, DataError
from rlprune.evaluation.evaluator import Evaluator
from rlprune.workloads.adapter import TuneJob
from rlprune.workloads.checks import check_workload
from rlprune.workloads.loaders import LoaderWorkload
from rlprune.workloads.tasks import find_output, find_task

Pair = namedtuple("Pair", "logits aux_logits")


@dataclasses.dataclass
class Answer:
    scores: Tensor
    note: str = "no tensor"


class TestOutputs:
    @pytest.mark.parametrize(
        "outputs",
        [
            torch.zeros(2, 3),
            (torch.zeros(2, 3),),
            [torch.zeros(2, 3), None],
            {"anything": torch.zeros(2, 3), "loss": torch.tensor(0.0)},
            OrderedDict(out=torch.zeros(2, 3), aux=torch.ones(2, 3)),
            ImageClassifierOutput(logits=torch.zeros(2, 3), hidden_states=(torch.ones(2, 3),)),
            Pair(torch.zeros(2, 3), torch.ones(2, 3)),
            Answer(torch.zeros(2, 3)),
        ],
        ids=lambda value: type(value).__name__,
    )
    def test_the_answer_is_found(self, outputs: Any) -> None:
        assert torch.equal(find_output(outputs), torch.zeros(2, 3))

    def test_a_choice_is_taken(self) -> None:
        assert find_output({"out": torch.zeros(1, 2), "aux": torch.ones(1, 2)}, "aux").sum() == 2
        assert find_output((torch.zeros(1, 2), torch.ones(1, 2)), 1).sum() == 2

    def test_doubt_names_the_choices_and_the_setting(self) -> None:
        with pytest.raises(DataError, match=r"output=.*0: \(2, 3\), 1: \(2, 5\)"):
            find_output((torch.zeros(2, 3), torch.zeros(2, 5)))
        with pytest.raises(DataError, match=r"output='hea'.*did you mean 'head'.*head: \(2, 3\)"):
            find_output({"head": torch.zeros(2, 3), "tail": torch.zeros(2, 5)}, "hea")
        with pytest.raises(DataError, match="state task: detection"):
            find_output([{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0), "scores": torch.zeros(0)}])
        with pytest.raises(DataError, match="holds no tensor"):
            find_output("text")

    def test_a_workload_chooses(self) -> None:
        plain, other = made("segmentation"), made("segmentation", output="aux")
        scores = [w.judge("loss")(w.model).loss for w in (plain, other)]
        assert scores[0] != scores[1]


def single(targets: Any, outputs: int = 1, **settings: Any) -> Made:
    torch.manual_seed(0)
    return Made(Head(outputs), EXAMPLE, labelled(targets), **settings)


def floats(x: Tensor, generator: torch.Generator) -> Tensor:
    return x.mean((1, 2, 3))


def labels(x: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randint(2, (len(x),), generator=generator)


class TestMisfits:
    """Each of them had a score of 0.0000 for every plan, or one over the wrong axis, without a word."""

    @pytest.mark.parametrize(
        ("workload", "line"),
        [
            (lambda: single(floats), "softmax over 1 output.*state task: regression"),
            (lambda: single(floats, 3), "whole numbers as targets, got floats; state task: regression"),
            (lambda: single(lambda x, g: (x.mean((2, 3)) > 0).float(), 3), "state task: multilabel"),
            (
                lambda: Made(Maps(), EXAMPLE, labelled(lambda x, g: (x[:, 0] > 0).long())),
                "state task: segmentation",
            ),
            (lambda: single(floats, 2, task="regression"), "targets of the outputs' shape"),
            (lambda: single(labels, 3, task="segmentation"), "state task: classification"),
            (lambda: single(labels, 1, task="embedding"), "state task: regression"),
            (lambda: single(labels, 3, task="multilabel"), "state task: classification"),
            (lambda: single(labels, 3, task="detection"), "list of dicts"),
            (lambda: single(labels, 3, task="clasification"), "did you mean 'classification'"),
            (lambda: single(labels, 3, task=3), "a name or a rlprune.TaskType"),
        ],
    )
    def test_they_are_one_line_with_the_task_that_it_looks_like(self, workload: Any, line: str) -> None:
        with pytest.raises(DataError, match=line) as raised:
            check_workload(workload())
        assert "\n" not in str(raised.value)

    def test_a_wider_target_is_never_broadcast(self) -> None:
        torch.manual_seed(0)
        workload = check_workload(single(floats, task="regression"))
        x, y = next(iter(workload.batches("train")))
        outputs = workload.model(x)
        assert outputs.shape == (5, 1) and y.shape == (5,)
        assert torch.isclose(workload.loss(outputs, y), F.mse_loss(outputs[:, 0], y))


class OwnLoss(Made):
    """A loss of the user's, and nothing said about the outputs."""

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        first = outputs["out"] if isinstance(outputs, dict) else outputs
        if targets.is_floating_point():
            return F.mse_loss(first[:, 0], targets)
        return F.cross_entropy(
            first.movedim(-1, 1) if first.shape[-1] != 8 and first.ndim == 3 else first, targets
        )

    def metric(self, outputs: Any, targets: Any) -> Tensor:
        return torch.tensor(float(len(targets)))


class Distances(Made):
    """Outputs that no task knows: complex numbers."""

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        return (outputs["z"].abs() - targets).square().mean()

    def metric(self, outputs: Any, targets: Any) -> Tensor:
        return -(outputs["z"].abs() - targets).abs().sum()


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = Head(2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"z": torch.view_as_complex(self.head(x))}


def own() -> Made:
    """A workload of task `own` whose score is how little the distances have changed."""
    torch.manual_seed(0)
    workload = Distances(Complex(), EXAMPLE, labelled(lambda x, g: x.abs().mean((1, 2, 3))), task="own")
    x = workload.parts["validation"][0]
    with torch.no_grad():
        dense = workload.model(x)["z"].abs()

    def score(model: nn.Module) -> float:
        return -float((model(x)["z"].abs() - dense).abs().mean())

    workload.score_fn = score
    return workload


class TestOwnLoss:
    def test_what_the_data_can_only_mean_is_found(self) -> None:
        torch.manual_seed(0)
        maps = OwnLoss(Maps(), EXAMPLE, labelled(lambda x, g: (x[:, 0] > 0).long()))
        assert check_workload(maps).task_type.name == "segmentation"
        classes = OwnLoss(Head(3), EXAMPLE, labelled(labels))
        assert check_workload(classes).task_type.name == "classification"

    def test_doubt_is_no_score_by_guessing(self) -> None:
        torch.manual_seed(0)
        workload = check_workload(OwnLoss(Head(1), EXAMPLE, labelled(floats)))
        with pytest.raises(
            DataError, match=r"does not say what its outputs mean.*regression.*score\.kind=loss"
        ):
            Evaluator(workload)
        assert workload.judge("loss")(workload.model).scores.mean() < 0
        tuned = workload.fine_tune(workload.model, FinishConfig(epochs=1, lr=1e-3), TuneJob(0))
        assert "without distillation" in tuned.note


class TestWholeSplit:
    def test_a_score_fn_is_the_score(self) -> None:
        def score(model: nn.Module) -> float:
            return -float(sum(p.detach().square().sum() for p in model.parameters()))

        workload = check_workload(made("classification", score_fn=score))
        evaluator = Evaluator(workload)
        found = evaluator.evaluate(np.maximum(evaluator.space.widths // 2, 1))
        assert found.score != evaluator.dense.score == pytest.approx(score(workload.model), rel=1e-6)
        assert evaluator.logit_cache() is None and found.error == 0

    @pytest.mark.parametrize(
        ("given", "line"),
        [
            ({"rungs": (4,)}, "score.rungs: score_fn judges"),
            ({"samples": 4}, "score.samples: score_fn judges"),
            ({"kind": "loss"}, "score.kind: 'loss' is given, but the workload has a score_fn"),
        ],
    )
    def test_what_does_nothing_beside_it_is_refused(self, given: dict[str, Any], line: str) -> None:
        with pytest.raises(ConfigError, match=line):
            Evaluator(made("classification", score_fn=lambda model: 1.0), score=ScoreConfig(**given))

    def test_a_score_fn_that_gives_no_number(self) -> None:
        workload = made("classification", score_fn=lambda model: "good")
        with pytest.raises(DataError, match="score_fn: must return a number, got str"):
            workload.judge()(workload.model)

    def test_a_metric_fn_is_the_metric_of_a_split(self) -> None:
        asked = []

        def metric(model: nn.Module, split: str) -> float:
            asked.append(split)
            return 0.25

        workload = made("regression", metric_fn=metric)
        assert workload.evaluate(workload.model, "train").metric == 0.25
        assert workload.judge()(workload.model).metric == 0.25 and asked == ["train", "validation"]

    def test_a_task_of_ones_own_takes_what_it_is_given(self) -> None:
        workload = check_workload(own())
        evaluator = Evaluator(workload, recovery=RecoveryConfig(steps=("none",)))
        less = evaluator.evaluate(np.maximum(evaluator.space.widths // 2, 1))
        assert less.score < evaluator.dense.score == 0 and np.isfinite(less.loss)
        model = evaluator.build(less.widths)
        before = workload.evaluate(model, "train").loss
        tuned = workload.fine_tune(model, FinishConfig(epochs=8, lr=0.01), TuneJob(0))
        assert "without distillation, which task 'own' has none of" in tuned.note
        assert workload.evaluate(model, "train").loss < before
        with pytest.raises(ConfigError, match="recovery.distill: the task 'own'"):
            Evaluator(own(), recovery=RecoveryConfig(steps=("finetune",), finetune_steps=1, distill=True))
        unscored = own()
        unscored.score_fn = None
        with pytest.raises(DataError, match=r"task 'own'.*score_fn\(model\), or set score.kind=loss"):
            Evaluator(unscored)

    def test_a_task_of_ones_own_needs_only_functions(self) -> None:
        workload = made("classification", task="own", score_fn=lambda model: float(model.head.weight.sum()))
        with pytest.raises(DataError, match="task 'own'.*give the workload a loss"):
            check_workload(workload)


class TestTorchmetrics:
    @pytest.mark.parametrize(
        ("kind", "metric"),
        [
            ("classification", "F1"),
            ("classification", "AUROC"),
            ("multilabel", "AUROC"),
            ("multilabel", "F1"),
            ("segmentation", "mIoU"),
            ("detection", "mAP"),
            ("regression", "torchmetrics:MeanAbsoluteError"),
            ("regression", rlprune.TorchMetric("torchmetrics:MinkowskiDistance", {"p": 3})),
        ],
    )
    def test_by_name(self, kind: str, metric: Any) -> None:
        workload = made(kind, split_metric=metric)
        quality = workload.evaluate(workload.model, "validation")
        judge = workload.judge()
        parts = [judge(workload.model, 0, 4), judge(workload.model, 4)]
        assert 0 <= quality.metric and judge.merge(parts).metric == pytest.approx(quality.metric, rel=1e-5)
        assert workload.metric_name == getattr(metric, "name", metric).removeprefix("torchmetrics:")

    def test_the_own_miou_is_that_of_torchmetrics(self) -> None:
        from torchmetrics import JaccardIndex

        own = made("segmentation")
        given = made("segmentation", split_metric=JaccardIndex(task="multiclass", num_classes=3))
        assert given.metric_name == "MulticlassJaccardIndex"
        values = [w.evaluate(w.model, "validation").metric for w in (own, given)]
        assert values[0] == pytest.approx(values[1], rel=1e-6)

    @pytest.mark.parametrize(
        ("metric", "line"),
        [
            ("mIOU", "unknown name 'mIOU'.*did you mean 'mIoU'"),
            ("torchmetrics:Jaccard", "torchmetrics has no Jaccard.*did you mean 'JaccardIndex'"),
            (rlprune.TorchMetric("F1", {"nmu_labels": 3}), "F1.*nmu_labels"),
            (rlprune.TorchMetric("F1", {"average": "none"}), "returns 4 values, one is needed"),
        ],
    )
    def test_wrong_names_and_arguments_are_one_line(self, metric: Any, line: str) -> None:
        workload = made("classification", split_metric=metric)
        with pytest.raises(DataError, match=line) as raised:
            workload.evaluate(workload.model, "validation")
        assert "\n" not in str(raised.value)

    def test_a_metric_of_which_less_is_better_is_no_score(self) -> None:
        workload = made("regression", split_metric="torchmetrics:MeanAbsoluteError")
        with pytest.raises(ConfigError, match="score.kind: 'accuracy'.*of MeanAbsoluteError less is better"):
            Evaluator(workload, score=ScoreConfig(kind="accuracy"))
        best = made("multilabel", split_metric="AUROC")
        with pytest.raises(ConfigError, match="score.rungs: the metric judges"):
            Evaluator(best, score=ScoreConfig(kind="accuracy", rungs=(4,)))
        dense = Evaluator(best, score=ScoreConfig(kind="accuracy")).dense
        assert dense.score == dense.metric > 0

    def test_two_metrics_are_one_too_many(self) -> None:
        workload = made(
            "regression", split_metric="torchmetrics:MeanAbsoluteError", metric_fn=lambda m, s: 1.0
        )
        with pytest.raises(DataError, match="metric_fn and split_metric are given"):
            check_workload(workload)
        with pytest.raises(DataError, match="output='boxes'.*leave it out"):
            check_workload(made("detection", output="boxes"))

    def test_a_missing_package_is_one_line(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "torchmetrics", None)
        workload = made("classification", split_metric="F1")
        with pytest.raises(DataError, match=r"needs torchmetrics.*pip install 'rlprune\[metrics\]'"):
            workload.evaluate(workload.model, "validation")


class TestEqualScores:
    def test_they_are_refused_with_the_reason(self) -> None:
        evaluator = Evaluator(made("classification", score_fn=lambda model: 0.5))
        with pytest.raises(
            DataError, match="every one of 6 different plans scored 0.5000.*the same number for"
        ):
            for width in range(1, 8):
                evaluator.evaluate([width, 8])

    def test_a_softmax_over_one_output_is_named(self) -> None:
        torch.manual_seed(0)
        evaluator = Evaluator(OwnLoss(Head(1), EXAMPLE, labelled(floats), task="classification"))
        with pytest.raises(DataError, match="scored 0.0000.*task 'classification'.*softmax over 1 output"):
            for width in range(1, 8):
                evaluator.evaluate([width, 8])

    def test_a_few_different_plans_may_be_equal(self) -> None:
        evaluator = Evaluator(made("classification", score_fn=lambda model: 0.5))
        for width in range(1, 6):
            evaluator.evaluate([width, 8])
        with pytest.raises(DataError, match="5 different plans"):
            evaluator.refuse_equal_scores(least=3)


def test_a_loader_gives_several_inputs_as_its_data_set_does() -> None:
    workload = made("two inputs")
    x, y = workload.parts["train"]
    pairs = [((a, b), c) for a, b, c in zip(*x, y, strict=True)]
    loaders = {split: DataLoader(pairs, batch_size=5) for split in ("train", "validation", "test")}
    found = check_workload(LoaderWorkload(workload.model, workload.example_inputs, loaders))
    assert found.evaluate(found.model, "train").count == 12
    first, _ = next(iter(found.batches("calibration", 3)))
    assert isinstance(first, tuple) and [part.shape[0] for part in first] == [3, 3]
    with pytest.raises(DataError, match=r"must be \(inputs, targets\).*several inputs are a tuple"):
        broken = loaders | {"train": [(x[0], x[1], y)]}
        check_workload(LoaderWorkload(workload.model, workload.example_inputs, broken))


def test_loaders_take_all_that_a_workload_may_say() -> None:
    x, y = made("multilabel").parts["train"]
    loaders = {split: [(x, y)] for split in ("train", "validation", "test")}
    workload = LoaderWorkload(Head(5), EXAMPLE, loaders, task="multilabel", metric="AUROC")
    assert check_workload(workload).metric_name == "AUROC"
    own = LoaderWorkload(
        Head(5), EXAMPLE, loaders, task="multilabel", metric_fn=lambda m, s: 0.5, score_fn=lambda m: 1.0
    )
    assert check_workload(own).evaluate(own.model, "train").metric == 0.5
    assert own.judge()(own.model).scores.mean() == 1.0


def test_a_task_type_of_ones_own() -> None:
    with forgotten():

        @rlprune.task_type("outputs whose order counts", name="ranking")
        class Ranking(rlprune.TaskType):
            metric_name = "pairs"

            def loss(self, read: Any, targets: Any) -> Tensor:
                return F.mse_loss(read[:, 0], targets)

            def metric(self, read: Any, targets: Any) -> Tensor:
                return (read[:, 0].argsort() == targets.argsort()).float().sum()

            def divergence(self, dense: Any, read: Any, scale: Any = None) -> Tensor:
                return (dense - read)[:, 0].abs()

            def distillation(self, read: Any, teacher: Any, temperature: float) -> Tensor:
                return (teacher - read).abs().mean()

        workload = check_workload(single(floats, task="ranking"))
        assert isinstance(find_task("ranking"), Ranking) and workload.metric_name == "pairs"
        evaluator = Evaluator(workload)
        assert evaluator.evaluate([4, 4]).score < 0
        with pytest.raises(ConfigError, match="subclass of rlprune.TaskType"):
            rlprune.task_type("no class", name="wrong")(lambda: None)  # type: ignore[type-var]


def test_classification_has_the_bits_that_it_had() -> None:
    workload = classification()
    other = Head(4)
    judged = workload.judge()(other.eval())
    with torch.no_grad():
        dense, ours = (
            torch.cat([m(x) for x, _ in workload.batches("validation")]) for m in (workload.model, other)
        )
        logs = F.log_softmax(dense, dim=-1)
        wanted = (logs.exp() * (logs - F.log_softmax(ours, dim=-1))).sum(dim=-1)
    assert torch.equal(judged.scores, -wanted.double()) and torch.equal(judged.outputs, ours)
