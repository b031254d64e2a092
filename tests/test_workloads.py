"""Data sets, their splits, the closed test split, image workloads, and building them from settings."""

import gzip
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from rlprune.config import Config
from rlprune.errors import ArtifactError, ConfigError, DataError, GraphError, RlpruneError
from rlprune.workloads import SPLITS, VisionWorkload, Workload, build_model, build_workload, load_data
from rlprune.workloads.base import check_workload
from rlprune.workloads.data import Request, VisionData
from rlprune.workloads.vision import crop_and_flip


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RLPRUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def rows(data: VisionData, split: str) -> list[bytes]:
    return [image.numpy().tobytes() for image in data.splits[split].images]


def digits_workload(**options: object) -> VisionWorkload:
    model = build_model("cifar_resnet20", channels=1, arguments={"width": 4})
    return VisionWorkload(model, load_data("digits"), **options)  # type: ignore[arg-type]


# Splits


def test_digits_are_split_once_and_disjointly() -> None:
    data = load_data("digits")
    assert data.shape == (1, 8, 8)
    sizes = {s: len(data.splits[s].labels) for s in SPLITS}
    assert sizes == {"train": 800, "calibration": 200, "validation": 400, "test": 397}
    # The digits hold no two equal images, so equal images would be the same sample.
    everything = [row for s in SPLITS for row in rows(data, s)]
    assert len(set(everything)) == len(everything) == 1797
    flat = torch.cat([data.splits[s].images for s in SPLITS]).float() / 255
    assert flat.mean() == pytest.approx(data.mean[0], abs=1e-3)
    assert flat.std() == pytest.approx(data.std[0], abs=1e-3)


def test_the_seed_decides_the_splits_and_train_size_does_not() -> None:
    first, again, other = (load_data("digits", Request(seed=s)) for s in (1, 1, 2))
    small = load_data("digits", Request(seed=1, sizes=(50, None, None, None)))
    for split in SPLITS:
        assert rows(first, split) == rows(again, split)
        assert rows(first, split) != rows(other, split)
        if split != "train":
            assert rows(first, split) == rows(small, split)
    assert set(rows(small, "train")) < set(rows(first, "train"))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((None, None, None, 2000), r"data\.test: 2000 images asked for, 1797 available"),
        ((None, None, 1500, None), r"data\.validation: 1500 images asked for, 1400 available"),
        ((1201, 100, 100, None), r"data\.train: 1201 images asked for, 1200 available"),
        ((None, 200, 1200, None), r"data\.train: the split is empty"),
        ((None, 0, None, None), r"data\.calibration: the split is empty"),
    ],
)
def test_impossible_sizes_name_the_split_and_what_there_is(sizes: tuple, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_data("digits", Request(sizes=sizes))


def test_unknown_data_is_refused_with_a_hint() -> None:
    with pytest.raises(ConfigError, match="did you mean 'fashion_mnist'"):
        load_data("fashionmnist")
    with pytest.raises(DataError, match="no such folder"):
        load_data("cifar10", Request(root=Path("/no/such/folder")))


# Fashion-MNIST


def write_idx(folder: Path, count: int = 60, packed: bool = True) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    for part, number in (("train", count), ("t10k", count // 2)):
        images = random.integers(0, 256, (number, 28, 28), dtype=np.uint8)
        labels = (np.arange(number) % 10).astype(np.uint8)
        for kind, values in (("images-idx3", images), ("labels-idx1", labels)):
            header = bytes((0, 0, 8, values.ndim)) + np.array(values.shape, ">i4").tobytes()
            content = header + values.tobytes()
            name = f"{part}-{kind}-ubyte"
            if packed:
                (folder / f"{name}.gz").write_bytes(gzip.compress(content))
            else:
                (folder / name).write_bytes(content)


FASHION = Request(sizes=(30, 10, 10, None))


@pytest.mark.parametrize("place", ["", "FashionMNIST/raw"])
@pytest.mark.parametrize("packed", [True, False])
def test_fashion_mnist_reads_the_original_files(tmp_path: Path, place: str, packed: bool) -> None:
    write_idx(tmp_path / place, packed=packed)
    data = load_data("fashion_mnist", Request(root=tmp_path, sizes=FASHION.sizes))
    assert data.shape == (1, 28, 28)
    assert [len(data.splits[s].labels) for s in SPLITS] == [30, 10, 10, 30]
    original = np.random.default_rng(0).integers(0, 256, (60, 28, 28), dtype=np.uint8)
    known = {image.tobytes(): i % 10 for i, image in enumerate(original)}
    for row, label in zip(rows(data, "train"), data.splits["train"].labels, strict=True):
        assert known[row] == label


def test_fashion_mnist_missing_or_broken(tmp_path: Path) -> None:
    root = tmp_path / "fashion"
    root.mkdir()
    with pytest.raises(DataError, match="dataset-fashion-mnist") as caught:
        load_data("fashion_mnist", Request(root=root))
    assert "\n" not in str(caught.value)
    for name, content in (
        ("train-images-idx3-ubyte.gz", b"cut"),
        ("train-labels-idx1-ubyte.gz", gzip.compress(b"\0\0\x08\x01" + b"\0\0\0\x09" + b"123")),
        ("train-labels-idx1-ubyte.gz", gzip.compress(b"GIF89a")),
    ):
        write_idx(root)
        path = root / name
        path.write_bytes(path.read_bytes()[:500] if content == b"cut" else content)
        with pytest.raises(DataError, match=name):
            load_data("fashion_mnist", Request(root=root, sizes=FASHION.sizes))


# Image folders and CIFAR


def write_images(root: Path, count: int, side: int = 8, shape: tuple[int, int] | None = None) -> None:
    for label, name in enumerate(("cat", "dog")):
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            size = shape or (side, side)
            Image.new("RGB", size, (100 * label, i, 7)).save(root / name / f"{i:03}.png")


def test_image_folder_with_an_official_test_part(tmp_path: Path, cache: Path) -> None:
    write_images(tmp_path / "train", 20)
    write_images(tmp_path / "test", 5)
    data = load_data("image_folder", Request(root=tmp_path))
    assert data.classes == ("cat", "dog")
    assert [len(data.splits[s].labels) for s in SPLITS] == [32, 4, 4, 10]
    for split in SPLITS:
        part = data.splits[split]
        assert torch.equal(part.images[:, 0, 0, 0], (100 * part.labels).to(torch.uint8))
        assert (part.images[:, 2] == 7).all()
    kept = sorted((cache / "data").iterdir())
    assert len(kept) == 2
    # The first images of a split are a sample of all classes, although files are read class by class.
    for split in ("train", "test"):
        assert len(data.splits[split].labels[:8].unique()) == 2
    # A second reading comes from the cache: other splits, no decoding, and a broken cache is replaced.
    stamps = [p.stat().st_mtime_ns for p in kept]
    load_data("cifar10", Request(root=tmp_path, seed=3, sizes=(10, 4, 4, 4)))
    assert [p.stat().st_mtime_ns for p in kept] == stamps
    kept[0].write_bytes(b"broken")
    again = load_data("image_folder", Request(root=tmp_path))
    assert rows(again, "train") == rows(data, "train")
    # A changed picture is decoded anew.
    Image.new("RGB", (8, 8), (0, 255, 9)).save(tmp_path / "train" / "cat" / "000.png")
    changed = load_data("image_folder", Request(root=tmp_path))
    pictures = torch.cat([changed.splits[s].images for s in SPLITS])
    assert int((pictures[:, 2] == 9).all(-1).all(-1).sum()) == 1


def test_image_folder_without_parts_and_with_other_sizes(tmp_path: Path) -> None:
    write_images(tmp_path, 20, shape=(12, 8))
    with pytest.raises(DataError, match=r"not square; set data\.image_size"):
        load_data("image_folder", Request(root=tmp_path))
    data = load_data("image_folder", Request(root=tmp_path, image_size=6))
    assert data.shape == (3, 6, 6)
    assert sum(len(data.splits[s].labels) for s in SPLITS) == 40
    assert len({r for s in SPLITS for r in rows(data, s)}) == 40


def test_image_folder_errors_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.root"):
        load_data("image_folder")
    write_images(tmp_path / "train", 12)
    (tmp_path / "train" / "eel").mkdir()
    with pytest.raises(DataError, match="eel: the class has no images"):
        load_data("image_folder", Request(root=tmp_path))
    (tmp_path / "train" / "eel").rmdir()
    (tmp_path / "train" / "cat" / "005.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"005\.png: cannot be decoded"):
        load_data("image_folder", Request(root=tmp_path))
    Image.new("RGB", (9, 9)).save(tmp_path / "train" / "cat" / "005.png")
    with pytest.raises(DataError, match=r"005\.png: 9x9 pixels"):
        load_data("image_folder", Request(root=tmp_path))
    write_images(tmp_path / "test", 2)
    (tmp_path / "test" / "dog").rename(tmp_path / "test" / "wolf")
    with pytest.raises(DataError, match="'dog' is a class of only one"):
        load_data("image_folder", Request(root=tmp_path))


def test_cifar_without_files_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cifar-10-batches-py.*data\.root"):
        load_data("cifar10", Request(root=tmp_path))
    # Pickles whose checksum is not the published one are not opened.
    (tmp_path / "cifar-100-python").mkdir()
    (tmp_path / "cifar-100-python" / "train").write_bytes(b"cos\nsystem\n(S'touch evil'\ntR.")
    with pytest.raises(DataError, match="cifar-100-python"):
        load_data("cifar100", Request(root=tmp_path))


# The workload


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


# From settings


def settings() -> Config:
    values: dict = {
        "model": {
            "name": "cifar_resnet20",
            "arguments": {"width": 4},
            "train": {"epochs": 3, "lr": 0.05, "batch_size": 64},
        },
        "data": {"name": "digits"},
        "device": "cpu",
    }
    return Config.from_dict(values)


def test_dense_training_is_cached_by_content(cache: Path) -> None:
    config = settings()
    calls: list[tuple] = []
    workload = build_workload(config, progress=lambda *a: calls.append(a))
    assert calls[-1][:3] == ("dense training", 36, 36)
    assert workload.evaluate(workload.model, "validation").metric > 0.2  # by chance 0.1
    assert not workload.model.training
    files = list((cache / "dense").iterdir())
    assert [p.suffix for p in files] == [".safetensors"]
    calls.clear()
    again = build_workload(config, progress=lambda *a: calls.append(a))
    assert calls == []
    assert torch.equal(again.model.conv1.weight, workload.model.conv1.weight)
    files[0].write_bytes(b"broken")
    third = build_workload(config)
    assert torch.equal(third.model.conv1.weight, workload.model.conv1.weight)
    seeded = build_workload(config, seed_override=9)
    assert not torch.equal(seeded.model.conv1.weight, workload.model.conv1.weight)
    build_workload(config.override(["model.train.lr=0.04"]))
    assert len(list((cache / "dense").iterdir())) == 3


def test_killed_dense_training_goes_on(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings()
    monkeypatch.setenv("RLPRUNE_CACHE", str(cache / "whole"))
    whole = build_workload(config)
    monkeypatch.setenv("RLPRUNE_CACHE", str(cache / "killed"))
    monkeypatch.setattr("rlprune.pruning.finetune._State.due", lambda self: True)

    original, count = VisionWorkload.train_batches, 0

    def dying(self: VisionWorkload, *arguments: object) -> Iterator:
        nonlocal count
        for batch in original(self, *arguments):  # type: ignore[arg-type]
            count += 1
            if count == 20:
                raise KeyboardInterrupt
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(VisionWorkload, "train_batches", dying)
        with pytest.raises(KeyboardInterrupt):
            build_workload(config)
    resumed = build_workload(config)
    for a, b in zip(whole.model.state_dict().values(), resumed.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert [p.suffix for p in (cache / "killed" / "dense").iterdir()] == [".safetensors"]


def test_checkpoints_are_fine_tuned_or_taken_as_they_are(tmp_path: Path) -> None:
    given = build_model("cifar_resnet20", channels=1, arguments={"width": 4}, seed=42)
    path = tmp_path / "given.safetensors"
    save_file(given.state_dict(), path)
    config = settings()
    finished = build_workload(config, checkpoint=path)
    assert torch.equal(finished.model.conv1.weight, given.conv1.weight)
    tuned_config = config.override(
        [f"model.checkpoint={path}", "model.train.epochs=1", "model.train.lr=0.001"]
    )
    tuned = build_workload(tuned_config)
    distance = (tuned.model.conv1.weight - given.conv1.weight).abs().max()
    assert 0 < distance < 0.1
    plain = build_workload(tuned_config, train=False)
    assert torch.equal(plain.model.conv1.weight, given.conv1.weight)
    assert plain.base == {
        "source": "zoo",
        "name": "cifar_resnet20",
        "arguments": {"classes": 10, "channels": 1, "width": 4},
    }


MODELS = """
import torch
from torch import nn

class Raises(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
    def forward(self, x):
        raise RuntimeError("I refuse\\nwith two lines")

def nan():
    model = good()
    model[0].weight.data[0] = float("nan")
    return model

def good(classes=10):
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(144, classes))

def workload(config):
    from tests_own_workload import Own
    return Own(config.model.seed)
"""

OWN = """
import torch
from rlprune.workloads import Workload

class Own(Workload):
    base = {"source": "given"}
    def __init__(self, seed):
        torch.manual_seed(seed)
        self.model = torch.nn.Linear(3, 2)
        self.example_inputs = torch.zeros(1, 3)
    def batches(self, split, limit=None):
        yield torch.zeros(4, 3), torch.zeros(4).long()
"""


@pytest.fixture
def own_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tests_own_models.py").write_text(MODELS)
    (tmp_path / "tests_own_workload.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)


def own(name: str, *overrides: str) -> Config:
    values = {"model": {"name": f"tests_own_models:{name}"}, "data": {"name": "digits"}, "device": "cpu"}
    return Config.from_dict(values).override(overrides)


@pytest.mark.usefixtures("own_code")
def test_a_users_model_is_checked_before_anything_else() -> None:
    workload = build_workload(own("good", "model.train.epochs=1"))
    assert workload.base["source"] == "function"
    with pytest.raises(GraphError, match=r"forward raises.*\(1, 1, 8, 8\): RuntimeError: I refuse$"):
        build_workload(own("Raises"))
    with pytest.raises(ArtifactError, match=r"'0\.weight' holds NaN"):
        build_workload(own("nan"))
    with pytest.raises(ConfigError, match=r"\(1, 3\) for one image, but the data has 10 classes"):
        build_workload(own("good", "model.arguments.classes=3"))


@pytest.mark.usefixtures("own_code")
def test_a_users_workload_from_settings(tmp_path: Path) -> None:
    config = Config.from_dict({"workload": "tests_own_models:workload"})
    first, again, other = (build_workload(config, seed_override=s) for s in (1, 1, 2))
    assert first.size("validation") == 4
    assert torch.equal(first.model.weight, again.model.weight)
    assert not torch.equal(first.model.weight, other.model.weight)
    path = tmp_path / "linear.safetensors"
    save_file(other.model.state_dict(), path)
    assert torch.equal(build_workload(config, checkpoint=path).model.weight, other.model.weight)
    with pytest.raises(ConfigError, match=r"must return a rlprune\.Workload"):
        build_workload(config.override(["workload=builtins:id"]))


@pytest.mark.usefixtures("own_code")
def test_divergence_and_missing_devices_are_one_line(cache: Path) -> None:
    wild = [f"model.train.{setting}" for setting in ("lr=10.0", "weight_decay=1.0", "epochs=20")]
    with pytest.raises(RlpruneError, match=r"lower model\.train\.lr, now 10\.0"):
        build_workload(own("good", *wild))
    assert list((cache / "dense").glob("*")) == []
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="device: cuda:7"):
            build_workload(settings().override(["device=cuda:7"]))


def test_a_loss_of_guessing_is_about_the_logarithm_of_the_classes() -> None:
    workload = digits_workload()
    nn.init.zeros_(workload.model.linear.weight)
    nn.init.zeros_(workload.model.linear.bias)
    assert workload.evaluate(workload.model, "validation").loss == pytest.approx(math.log(10), rel=1e-5)
