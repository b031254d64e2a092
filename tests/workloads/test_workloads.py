"""The contract of a workload: the closed test split, batches, evaluation, augmentation, a user's own."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from rlprune.errors import DataError
from rlprune.vision.data import load_data
from rlprune.vision.workload import VisionWorkload, crop_and_flip
from rlprune.vision.zoo import build_model
from rlprune.workloads import SPLITS, Workload
from rlprune.workloads.checks import check_workload


def digits_workload(**options: object) -> VisionWorkload:
    model = build_model("cifar_resnet20", channels=1, arguments={"width": 4})
    return VisionWorkload(model, load_data("digits"), **options)  # type: ignore[arg-type]


def test_the_test_split_is_closed() -> None:
    workload = digits_workload()
    with pytest.raises(DataError, match="test split is closed"):
        workload.batches("test")
    with pytest.raises(DataError, match="test split is closed"):
        workload.evaluate(workload.model, "test")
    with workload.test_opened():
        assert workload.evaluate(workload.model, "test").count == 397
    with pytest.raises(DataError, match="test split is closed"):
        workload.batches("test")
    with pytest.raises(DataError, match="did you mean 'validation'"):
        workload.batches("validtion")
    with pytest.raises(DataError, match="limit"):
        workload.batches("train", 0)
    assert workload.size("test") == 397


@pytest.mark.parametrize("cache_bytes", [None, 0])
def test_batches_are_the_normalised_split_in_order(cache_bytes: int | None) -> None:
    workload = digits_workload(batch_size=90, cache_bytes=cache_bytes)
    workload._batch = 90  # small images are read in larger batches; here several are wanted
    part = workload.data.splits["validation"]
    found = list(workload.batches("validation", 250))
    assert [len(t) for _, t in found] == [90, 90, 70]
    images = torch.cat([x for x, _ in found])
    expected = (part.images[:250].float() / 255 - workload.data.mean[0]) / workload.data.std[0]
    assert torch.allclose(images, expected, atol=1e-5)
    assert torch.equal(torch.cat([y for _, y in found]), part.labels[:250])
    assert workload.example_inputs.shape == (1, 1, 8, 8)


def test_evaluate_is_the_mean_over_samples() -> None:
    workload = digits_workload()
    workload._batch = 64
    quality = workload.evaluate(workload.model, "validation", 100)
    images = torch.cat([x for x, _ in workload.batches("validation", 100)])
    labels = torch.cat([y for _, y in workload.batches("validation", 100)])
    with torch.no_grad():
        outputs = workload.model(images)
    assert quality.count == 100
    assert quality.loss == pytest.approx(float(nn.functional.cross_entropy(outputs, labels)), rel=1e-5)
    assert quality.metric == pytest.approx(float((outputs.argmax(1) == labels).float().mean()))
    model = build_model("cifar_resnet20", channels=1).train()
    workload.evaluate(model, "validation", 10)
    assert model.training


def test_train_batches_shuffle_by_the_generator() -> None:
    workload = digits_workload(augment=False)

    def epoch(seed: int) -> tuple[Tensor, Tensor]:
        found = list(workload.train_batches(torch.Generator().manual_seed(seed), 96))
        assert len(found) == workload.train_steps(96) == 8
        return torch.cat([x for x, _ in found]), torch.cat([y for _, y in found])

    first, again, other = epoch(1), epoch(1), epoch(2)
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], other[0])
    train = {row.numpy().tobytes() for x, _ in workload.batches("train") for row in x}
    seen = {row.numpy().tobytes() for row in first[0]}
    assert len(seen) == 768  # every image once, the incomplete last batch left out
    assert seen < train
    whole = list(workload.train_batches(torch.Generator(), 5000))
    assert [len(y) for _, y in whole] == [800]


def test_augmentation_crops_and_flips_each_image_by_itself() -> None:
    images = torch.randint(1, 256, (6, 2, 5, 4), dtype=torch.uint8)
    down, right = torch.tensor([0, 1, 2, 3, 4, 2]), torch.tensor([2, 0, 4, 1, 3, 2])
    flip = torch.tensor([False, True, False, True, True, False])
    out = crop_and_flip(images, 2, down, right, flip)
    padded = nn.functional.pad(images, (2, 2, 2, 2))
    for i in range(6):
        d, r = int(down[i]), int(right[i])
        expected = padded[i, :, d : d + 5, r : r + 4]
        assert torch.equal(out[i], expected.flip(-1) if flip[i] else expected)
    assert torch.equal(out[5], images[5])


class Tiny(Workload):
    """The least that a user has to write."""

    def __init__(self, count: int = 12) -> None:
        self.model = nn.Linear(3, 2)
        self.example_inputs = torch.zeros(1, 3)
        self.count = count

    def batches(self, split: str, limit: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, min(limit or self.count, self.count), 5):
            end = min(start + 5, limit or self.count, self.count)
            yield torch.arange(start, end).float()[:, None].expand(-1, 3), torch.zeros(end - start).long()


def test_a_users_workload_gets_the_defaults_and_the_guard() -> None:
    workload = check_workload(Tiny())
    assert workload.name == "Tiny"
    assert workload.device == torch.device("cpu")
    with pytest.raises(DataError, match="test split is closed"):
        workload.batches("test")
    assert {s: workload.size(s) for s in SPLITS} == dict.fromkeys(SPLITS, 12)
    assert workload.train_steps() == 3
    seen = torch.cat([x[:, 0] for x, _ in workload.train_batches(torch.Generator().manual_seed(1))])
    assert sorted(seen.tolist()) == list(range(12))
    assert workload.evaluate(workload.model, "validation", 7).count == 7
    with pytest.raises(DataError, match="'train' is empty"):
        check_workload(Tiny(0))
    broken = Tiny()
    del broken.example_inputs
    with pytest.raises(DataError, match="example_inputs"):
        check_workload(broken)
    with pytest.raises(DataError, match=r"rlprune\.Workload"):
        check_workload(nn.Linear(1, 1))
    with pytest.raises(TypeError, match="abstract"):
        type("Empty", (Workload,), {})()


def test_a_loss_of_guessing_is_about_the_logarithm_of_the_classes() -> None:
    workload = digits_workload()
    nn.init.zeros_(workload.model.linear.weight)
    nn.init.zeros_(workload.model.linear.bias)
    assert workload.evaluate(workload.model, "validation").loss == pytest.approx(math.log(10), rel=1e-5)
