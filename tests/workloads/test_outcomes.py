"""The quality of each test sample: it adds up to that of the split, or there is none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import rlprune
from helpers.tasks import Made, made
from rlprune.workloads.outcomes import Outcomes, SampleMeter

KINDS = {
    "classification": "metric", "multilabel": "metric", "embedding": "metric",
    "regression": "loss", "segmentation": "loss", "sequence": "loss",
}  # fmt: skip


def quality_of(workload: Made, split: str = "test") -> Any:
    with workload.test_opened():
        return workload.evaluate(workload.model, split)


@pytest.mark.parametrize(("name", "kind"), KINDS.items())
def test_samples_add_up_to_the_split(name: str, kind: str) -> None:
    workload = made(name)
    quality = quality_of(workload)
    found = quality.outcomes
    assert found is not None and found.kind == kind
    assert len(found.values) == quality.count == workload.size("test")
    assert found.mean == pytest.approx(quality.metric if kind == "metric" else quality.loss, rel=1e-4)
    again = Outcomes.from_dict(found.to_dict())
    assert torch.equal(again.values, found.values) and torch.equal(again.weights, found.weights)
    assert quality_of(workload, "validation").outcomes is None


def test_each_sample_is_what_it_is_alone() -> None:
    workload = made("classification")
    found = quality_of(workload).outcomes
    with workload.test_opened(), torch.no_grad():
        alone = [
            float(workload.model(inputs[i : i + 1]).argmax(1) == targets[i : i + 1])
            for inputs, targets in workload.batches("test")
            for i in range(len(targets))
        ]
    assert found.values.tolist() == alone


def test_a_detector_and_functions_of_whole_batches_have_none() -> None:
    meter = SampleMeter(made("detection"), None)
    meter.update([{}], [{}], 1)
    assert meter.outcomes(1.0, 1.0) is None

    class NeedsTwo(Made):
        def metric(self, outputs: Any, targets: Any) -> Tensor:
            if len(targets) < 2:
                raise ValueError("a batch, please")
            return (outputs.argmax(1) == targets).sum()

    class NoMean(Made):
        def metric(self, outputs: Any, targets: Any) -> Tensor:
            return (outputs.argmax(1) == targets).float().mean() ** 2 * len(targets)

    for kind in (NeedsTwo, NoMean):
        workload = made("classification")
        workload.__class__ = kind
        assert quality_of(workload).outcomes is None


def test_the_better_direction_is_known() -> None:
    assert made("classification").higher_is_better and made("regression").higher_is_better
    pytest.importorskip("torchmetrics")
    assert not made("regression", split_metric="torchmetrics:MeanAbsoluteError").higher_is_better

    class Mine(Made):
        higher_is_better = False

    workload = made("classification")
    workload.__class__ = Mine
    assert not workload.higher_is_better
    assert issubclass(Mine, rlprune.Workload)
