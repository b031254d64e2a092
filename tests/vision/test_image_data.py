"""Image data sets and their splits: read from their files, refused where these are missing or broken."""

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rlprune.errors import ConfigError, DataError
from rlprune.vision.data import Request, VisionData, load_data
from rlprune.workloads import SPLITS

pytestmark = pytest.mark.usefixtures("own_cache")


def rows(data: VisionData, split: str) -> list[bytes]:
    return [image.numpy().tobytes() for image in data.splits[split].images]


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


def test_image_folder_with_an_official_test_part(tmp_path: Path, own_cache: Path) -> None:
    write_images(tmp_path / "train", 20)
    write_images(tmp_path / "test", 5)
    data = load_data("image_folder", Request(root=tmp_path))
    assert data.classes == ("cat", "dog")
    assert [len(data.splits[s].labels) for s in SPLITS] == [32, 4, 4, 10]
    for split in SPLITS:
        part = data.splits[split]
        assert torch.equal(part.images[:, 0, 0, 0], (100 * part.labels).to(torch.uint8))
        assert (part.images[:, 2] == 7).all()
    kept = sorted((own_cache / "data").iterdir())
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
    with pytest.raises(DataError, match=r"1 image cannot be decoded: .*cat/005\.png \(cannot identify"):
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
