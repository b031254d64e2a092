"""Images as people have them: 16 bits, turned by EXIF, damaged, of several kinds and sizes; transforms of users."""

from __future__ import annotations

import functools
import io
import os
import struct
import sys
import tempfile
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as settings_of_hypothesis
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from rlprune.config.config import Config
from rlprune.errors import ConfigError, DataError
from rlprune.experiments.build import build_workload
from rlprune.experiments.usage import check_usage
from rlprune.plugins import fingerprint_of_settings
from rlprune.vision.data import DataWarning, Request, VisionData, load_data
from rlprune.vision.image_files import UndecodableImage, open_image
from rlprune.vision.transforms import named_transform, transformed
from rlprune.vision.workload import VisionWorkload
from rlprune.workloads import SPLITS

pytestmark = pytest.mark.usefixtures("own_cache")

RAMP = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4


def pixels(path: Path) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return np.asarray(open_image(path))


# Kinds of files


def save_16_bits(path: Path) -> None:
    Image.fromarray(RAMP.astype(np.uint16) * 257).save(path)


def save_palette(path: Path) -> None:
    image = Image.fromarray(RAMP).convert("P", palette=Image.Palette.ADAPTIVE, colors=64)
    image.save(path, transparency=bytes(range(64)))


def save_pgm_16(path: Path) -> None:
    path.write_bytes(b"P5 8 8 65535\n" + (RAMP.astype(">u2") * 257).tobytes())


def save_frames(path: Path) -> None:
    others = [Image.new("L", (8, 8), value) for value in (0, 255)]
    options = {"lossless": True} if path.suffix.lower() == ".webp" else {}
    Image.fromarray(RAMP).save(path, save_all=True, append_images=others, duration=10, **options)


GREY: dict[str, tuple[str, Callable[[Path], object]]] = {
    "8 bits": ("a.png", lambda path: Image.fromarray(RAMP).save(path)),
    "16 bits, PNG": ("a.png", save_16_bits),
    "16 bits, TIFF": ("a.tiff", save_16_bits),
    "16 bits, big-endian PGM": ("a.pgm", save_pgm_16),
    "whole numbers of 32 bits up to 65535": (
        "a.tiff",
        lambda path: Image.fromarray(RAMP.astype(np.int32) * 257).save(path),
    ),
    "floats from 0 to 1": ("a.tiff", lambda path: Image.fromarray(RAMP.astype(np.float32) / 255).save(path)),
    "grey with transparency": ("a.png", lambda path: Image.fromarray(RAMP).convert("LA").save(path)),
    "colour with transparency": ("a.png", lambda path: Image.fromarray(RAMP).convert("RGBA").save(path)),
    "palette with transparency": ("a.png", save_palette),
    "animated GIF": ("a.GIF", save_frames),
    "animated WebP": ("a.webp", save_frames),
    "animated PNG": ("a.png", save_frames),
}


@pytest.mark.parametrize("kind", GREY)
def test_every_kind_of_file_has_the_same_pixels(kind: str, tmp_path: Path) -> None:
    name, save = GREY[kind]
    save(tmp_path / name)
    found = pixels(tmp_path / name)
    assert found.shape == (8, 8, 3) and found.dtype == np.uint8
    assert np.array_equal(found, np.repeat(RAMP[:, :, None], 3, 2))


def test_one_bit_and_cmyk(tmp_path: Path) -> None:
    Image.fromarray(RAMP > 100).save(tmp_path / "bit.png")
    assert np.array_equal(pixels(tmp_path / "bit.png")[:, :, 0], np.where(RAMP > 100, 255, 0))
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "print.jpg", quality=100)
    red = pixels(tmp_path / "print.jpg").reshape(-1, 3).mean(0)
    assert red[0] > 250 and red[1] < 5 and red[2] < 5


@pytest.mark.parametrize("turn", range(1, 9))
def test_images_stand_as_exif_says(turn: int, tmp_path: Path) -> None:
    wide = Image.new("L", (16, 8))
    wide.paste(255, (0, 0, 8, 8))  # the left half is white
    back = {
        2: [0],
        3: [3],
        4: [1],
        5: [5],
        6: [2],
        7: [6],
        8: [4],
    }  # PIL's transpositions that undo each turn
    stored = wide
    for step in back.get(turn, []):
        stored = stored.transpose(Image.Transpose(step))
    exif = Image.Exif()
    exif[0x0112] = turn
    stored.save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(pixels(tmp_path / "a.png")[:, :, 0], np.asarray(wide))


@pytest.mark.parametrize("values", [np.full((8, 8), 70_000, np.int32), np.full((8, 8), -1.5, np.float32)])
def test_a_scale_that_nobody_knows_is_said(values: np.ndarray, tmp_path: Path) -> None:
    Image.fromarray(values).save(tmp_path / "a.tiff")
    with pytest.raises(DataError, match=r"a\.tiff: cannot be decoded \(it holds .*save it as 8 bits"):
        open_image(tmp_path / "a.tiff")


@functools.cache
def written(kind: str) -> bytes:
    rough = Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    rough.save(buffer, kind)
    return buffer.getvalue()


@settings_of_hypothesis(max_examples=80, deadline=None)
@given(st.sampled_from(("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "PPM")), st.data())
def test_damaged_images_raise_our_error_only(kind: str, data: st.DataObject) -> None:
    content = bytearray(written(kind))
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(content))) if data.draw(st.booleans()) else len(content)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
        path = Path(folder, f"a.{kind.lower()}")
        path.write_bytes(content[:cut])
        try:
            assert pixels(path).shape[2] == 3
        except DataError as error:
            assert str(error).startswith(f"{path}: cannot be decoded (") and "\n" not in str(error)


# Folders


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    return folder


def fill(root: Path, count: int = 12, names: tuple[str, ...] = ("cat", "dog"), side: int = 8) -> None:
    for label, name in enumerate(names):
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            Image.new("RGB", (side, side), (100 * label, i, 7)).save(root / name / f"{i:03}.png")


def count(data: VisionData) -> int:
    return sum(len(data.splits[s].labels) for s in SPLITS)


def damage(root: Path) -> list[str]:
    """Files that cannot be decoded, each in another way."""
    whole = root / "dog" / "000.png"
    rough = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    rough.save(root / "dog" / "cut.jpg")
    (root / "dog" / "cut.jpg").write_bytes((root / "dog" / "cut.jpg").read_bytes()[:900])
    (root / "cat" / "000.png").write_bytes(whole.read_bytes()[:40])
    (root / "cat" / "empty.png").write_bytes(b"")
    (root / "cat" / "text.jpg").write_text("<html>not found</html>")
    (root / "cat" / "lost.jpg").symlink_to(root / "nowhere.jpg")
    huge = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    content = bytearray(whole.read_bytes())
    content[16:29] = huge
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    (root / "cat" / "huge.png").write_bytes(bytes(content))
    return ["cat/000.png", "cat/empty.png", "cat/huge.png", "cat/lost.jpg", "cat/text.jpg", "dog/cut.jpg"]


def test_all_damaged_files_are_named_at_once_or_left_out(root: Path) -> None:
    fill(root)
    broken = damage(root)
    request = Request(root=root, image_size=8)
    for _ in range(2):  # the second time from the cache
        with pytest.raises(DataError, match=r"6 images cannot be decoded: .* and 1 more \(") as caught:
            load_data("image_folder", request)
        line = str(caught.value)
        assert (
            all(name in line for name in broken[:5]) and "data.skip_corrupt=true" in line and "\n" not in line
        )
    with pytest.warns(DataWarning, match="6 images cannot be decoded, left out: .* and 1 more"):
        data = load_data("image_folder", Request(root=root, image_size=8, skip_corrupt=True))
    assert count(data) == 23
    for split in SPLITS:  # images and labels still belong together
        part = data.splits[split]
        assert torch.equal(part.images[:, 0, 0, 0], (100 * part.labels).to(torch.uint8))


def test_damaged_files_of_a_large_folder(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlprune.vision.image_folder._WHOLE_BYTES", 100)
    fill(root)
    damage(root)
    with pytest.raises(DataError, match="images cannot be decoded"):
        load_data("image_folder", Request(root=root, image_size=8))
    with pytest.warns(DataWarning, match="left out"):
        data = load_data("image_folder", Request(root=root, image_size=8, skip_corrupt=True))
    assert count(data) == 23
    for split in SPLITS:
        part = data.splits[split]
        assert torch.equal(part.images[:, 0, 0, 0], (100 * part.labels).to(torch.uint8))


def test_a_folder_without_one_whole_image(root: Path) -> None:
    for name in ("cat", "dog"):
        (root / name).mkdir()
        for i in range(9):
            (root / name / f"{i}.png").write_bytes(b"no")
    with pytest.raises(DataError, match="none of 18 images can be decoded"):
        load_data("image_folder", Request(root=root, skip_corrupt=True))
    skip = Request(root=root, image_size=8, skip_corrupt=True)
    with (
        pytest.warns(DataWarning, match="18 images"),
        pytest.raises(DataError, match=r"data\.train: none of 13 images can be decoded"),
    ):
        load_data("image_folder", skip)


def test_damage_in_the_official_test_part_is_named_with_the_rest(root: Path) -> None:
    fill(root / "train")
    fill(root / "test", count=3)
    for part in ("train", "test"):
        (root / part / "dog" / "001.png").write_bytes(b"no")
    with pytest.raises(DataError, match=r"2 images .*test/dog/001\.png, .*train/dog/001\.png"):
        load_data("image_folder", Request(root=root))


def test_what_could_not_be_read_for_a_while_is_read_again(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(root)

    def locked(path: Path) -> Image.Image:
        if path.name == "001.png":
            raise UndecodableImage(f"{path}: cannot be decoded (Permission denied)")
        return open_image(path)

    with monkeypatch.context() as patch:
        patch.setattr("rlprune.vision.image_folder.open_image", locked)
        with pytest.warns(DataWarning, match="2 images cannot be decoded, left out"):
            assert count(load_data("image_folder", Request(root=root, skip_corrupt=True))) == 22
    assert count(load_data("image_folder", Request(root=root))) == 24


def test_the_first_file_may_be_damaged_where_sizes_are_kept(root: Path) -> None:
    fill(root)
    (root / "cat" / "000.png").write_bytes(b"no")
    with pytest.warns(DataWarning, match=r"1 image cannot be decoded, left out: .*cat/000\.png"):
        data = load_data("image_folder", Request(root=root, skip_corrupt=True))
    assert data.shape == (3, 8, 8) and count(data) == 23


def test_hidden_files_links_and_suffixes(root: Path, tmp_path: Path) -> None:
    fill(root)
    (root / "cat" / "._000.png").write_bytes(b"macOS")
    (root / "cat" / ".ipynb_checkpoints").mkdir()
    Image.new("RGB", (8, 8)).save(root / "cat" / ".ipynb_checkpoints" / "000-checkpoint.png")
    (root / "__MACOSX").mkdir()
    (root / ".git").mkdir()
    (root / "cat" / "notes.txt").write_text("no image")
    assert count(load_data("image_folder", Request(root=root))) == 24
    Image.new("RGB", (8, 8)).save(root / "cat" / "A.JPG")
    fill(tmp_path / "more", names=("x",), count=3)
    (root / "cat" / "linked").symlink_to(tmp_path / "more" / "x")
    (root / "cat" / "circle").symlink_to(root / "cat")
    assert count(load_data("image_folder", Request(root=root))) == 28
    (tmp_path / "eel").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "eel" / "000.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "eel" / "001.png")
    os.symlink(tmp_path / "eel", root / "eel")
    assert load_data("image_folder", Request(root=root)).classes == ("cat", "dog", "eel")


def test_a_class_with_one_image_is_warned_about(root: Path) -> None:
    fill(root)
    fill(root, count=1, names=("eel",))
    with pytest.warns(
        DataWarning, match="image_folder: the class 'eel' has one image: it is in one split only"
    ):
        load_data("image_folder", Request(root=root))
    fill(root, count=1, names=("emu",))
    with pytest.warns(DataWarning, match="the classes 'eel', 'emu' have one image each"):
        load_data("image_folder", Request(root=root))


def test_resize_then_crop(root: Path) -> None:
    rough = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    for name in ("cat", "dog"):
        (root / name).mkdir()
        for i in range(10):
            Image.fromarray(rough).save(root / name / f"{i}.png")
    data = load_data("image_folder", Request(root=root, image_size=16, resize=20))
    expected = v2.Compose([v2.Resize(20), v2.CenterCrop(16)])(Image.fromarray(rough))
    assert np.array_equal(data.splits["test"].images[0].permute(1, 2, 0).numpy(), np.asarray(expected))
    plain = load_data("image_folder", Request(root=root, image_size=16))
    assert not torch.equal(plain.splits["test"].images[0], data.splits["test"].images[0])
    with pytest.raises(ConfigError, match=r"data\.resize: must be at least data\.image_size, 16"):
        load_data("image_folder", Request(root=root, image_size=16, resize=12))
    with pytest.raises(ConfigError, match=r"data\.resize: only for folders of images"):
        load_data("digits", Request(image_size=16, resize=20))
    with pytest.raises(ConfigError, match=r"data\.skip_corrupt: only for folders of images"):
        load_data("digits", Request(skip_corrupt=True))


# Mean, std and transforms of the user


def settings(*overrides: str) -> Config:
    values: dict = {
        "model": {"name": "cifar_resnet20", "arguments": {"width": 4}},
        "data": {"name": "digits", "train": 64, "calibration": 16, "validation": 16, "test": 16},
        "device": "cpu",
    }
    return Config.from_dict(values).override(overrides)


def built(*overrides: str) -> VisionWorkload:
    workload = build_workload(settings(*overrides))
    assert isinstance(workload, VisionWorkload)
    return workload


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A module of the user's with transforms."""
    (tmp_path / "my_transforms.py").write_text(
        "import random, numpy, torch\n"
        "from torchvision.transforms import v2\n"
        "evaluation = v2.Compose([v2.CenterCrop(6), v2.ToDtype(torch.float32, True), v2.Normalize([0.5], [0.25])])\n"
        "def train():\n"
        "    return v2.Compose([v2.RandomResizedCrop(6), v2.RandomHorizontalFlip()])\n"
        "def noisy(image):\n"
        "    return image.float() + torch.rand(()) + random.random() + numpy.random.rand()\n"
        "def wrong(image):\n"
        "    return image[None]\n"
        "def uneven(image):\n"
        "    return image[:, : 3 + int(image.sum()) % 2]\n"
        "old = v2.Compose([lambda image: 1 / 0])\n"
        "number = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    yield
    sys.modules.pop("my_transforms", None)


def test_mean_and_std_are_the_users() -> None:
    own, theirs = built(), built("data.mean=[0.5]", "data.std=[0.25]")
    raw = own.data.splits["validation"].images.float() / 255
    (given, _), *_ = theirs.batches("validation")
    torch.testing.assert_close(given, (raw - 0.5) / 0.25)
    (default, _), *_ = own.batches("validation")
    torch.testing.assert_close(default, (raw - own.data.mean[0]) / own.data.std[0])
    with pytest.raises(ConfigError, match=r"data\.mean: needs a number for each of the 1 channels of digits"):
        built("data.mean=[0.5, 0.5, 0.5]")
    with pytest.raises(ConfigError, match=r"data\.std\[0\]: must be above 0"):
        settings("data.std=[0.0]")


@pytest.mark.usefixtures("mine")
def test_transforms_of_the_user_see_every_image() -> None:
    workload = built("data.transform=my_transforms:evaluation", "data.train_transform=my_transforms:train")
    assert workload.example_inputs.shape == (1, 1, 6, 6)
    raw = workload.data.splits["validation"].images
    (given, _), *_ = workload.batches("validation")
    torch.testing.assert_close(given, (raw[:, :, 1:7, 1:7].float() / 255 - 0.5) / 0.25)
    first, again = (
        next(iter(workload.train_batches(torch.Generator().manual_seed(3), 64)))[0] for _ in range(2)
    )
    other = next(iter(workload.train_batches(torch.Generator().manual_seed(4), 64)))[0]
    assert first.shape == (64, 1, 6, 6) and torch.equal(first, again) and not torch.equal(first, other)
    assert workload.normalises  # the train transform gives uint8
    torch.testing.assert_close(first.min(), torch.tensor(-workload.data.mean[0] / workload.data.std[0]))


@pytest.mark.usefixtures("mine")
def test_draws_follow_the_seed_and_leave_the_generators_alone() -> None:
    images = torch.zeros(3, 1, 4, 4, dtype=torch.uint8)
    noisy = named_transform("my_transforms:noisy", "data.transform")
    assert noisy is not None
    before = torch.random.get_rng_state(), np.random.get_state()[1].tolist()
    one, same, other = (transformed(noisy, images, seed, "data.transform") for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert len(one.flatten(1).unique(dim=0)) == 3  # each image has draws of its own
    assert (
        torch.equal(before[0], torch.random.get_rng_state())
        and before[1] == np.random.get_state()[1].tolist()
    )


@pytest.mark.usefixtures("mine")
def test_a_killed_training_with_a_transform_goes_on_to_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    options = (
        "data.train_transform=my_transforms:noisy",
        "model.train.epochs=4",
        "model.train.batch_size=16",
    )
    whole = built(*options)
    monkeypatch.setenv("RLPRUNE_CACHE", str(tmp_path / "other"))
    monkeypatch.setattr("rlprune.recovery.finetune._State.due", lambda self: True)
    original, seen = VisionWorkload.train_batches, []

    def dying(self: VisionWorkload, *arguments: object) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in original(self, *arguments):  # type: ignore[arg-type]
            seen.append(batch)
            if len(seen) == 7:
                raise KeyboardInterrupt
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(VisionWorkload, "train_batches", dying)
        with pytest.raises(KeyboardInterrupt):
            built(*options)
    resumed = built(*options)
    for a, b in zip(whole.model.state_dict().values(), resumed.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.usefixtures("mine")
def test_results_are_kept_under_the_code_of_a_transform() -> None:
    config = settings("data.transform=my_transforms:evaluation")
    before = fingerprint_of_settings(config)
    assert fingerprint_of_settings(config) == before
    with Path("my_transforms.py").open("a") as file:
        file.write("evaluation = None\n")
    (label,) = (key for key in before if key.startswith("data.transform"))
    assert fingerprint_of_settings(config)[label] != before[label]


@pytest.mark.usefixtures("mine")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wrong", r"must give a tensor \(1, height, width\) of uint8 or floats .* got \(1, 1, 8, 8\)"),
        ("uneven", r"gives images of several sizes, \(1, 3, 8\) and \(1, 4, 8\)"),
        ("old", r"fails on an image, a uint8 tensor \(1, 8, 8\): ZeroDivisionError"),
        ("number", r"must be a transform of an image"),
        ("evaluations", r"did you mean 'evaluation'"),
    ],
)
def test_wrong_transforms_are_said_in_one_line(name: str, message: str) -> None:
    with pytest.raises((ConfigError, DataError), match=rf"data\.transform.*{message}") as caught:
        list(built(f"data.transform=my_transforms:{name}").batches("train"))
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("mine")
def test_settings_that_a_transform_leaves_without_use_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.mean: the transforms give floats"):
        built("data.transform=my_transforms:evaluation", "data.mean=[0.5]")
    config = settings("data.train_transform=my_transforms:train", "data.augment=false")
    with pytest.raises(ConfigError, match=r"data\.augment: data\.train_transform takes its place"):
        check_usage(config, "train")
