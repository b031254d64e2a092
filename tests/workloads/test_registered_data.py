"""Registered data sets of images and texts: split like every other, and refused in one line where they are none."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import rlprune
from helpers.registries import forgotten
from rlprune.errors import ConfigError, DataError
from rlprune.language.text import TextRequest, load_text, read_text
from rlprune.vision.data import Request, load_data


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    with forgotten():
        yield


def images(count: int = 100, channels: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    pixels = torch.randint(0, 256, (count, channels, 6, 6), dtype=torch.uint8)
    pixels[:, 0, 0, 0] = torch.arange(count) % 256  # tells them apart
    return pixels, torch.arange(count) % 4


def test_what_is_left_open_is_filled_in() -> None:
    rlprune.data_set("some images", name="some")(lambda request: rlprune.ImageSource(images()))
    data = load_data("some", Request(image_size=12))
    sizes = {name: len(split.labels) for name, split in data.splits.items()}
    assert sizes == {"train": 60, "calibration": 10, "validation": 10, "test": 20}
    assert data.shape == (3, 12, 12) and data.classes == ("0", "1", "2", "3")
    assert all(0.3 < mean < 0.7 for mean in data.mean) and len(data.std) == 3
    plain = load_data("some")
    marks = torch.cat([split.images[:, 0, 0, 0] for split in plain.splits.values()])
    assert sorted(marks.tolist()) == list(range(100)), "four disjoint splits"


def test_an_official_test_part_stays_one() -> None:
    test = images(30)
    rlprune.data_set("with a test part", name="official")(
        lambda request: rlprune.ImageSource(images(), test, classes=("a", "b", "c", "d"))
    )
    data = load_data("official", Request(sizes=(None, 20, 30, None)))
    assert {name: len(split.labels) for name, split in data.splits.items()} == {
        "train": 50, "calibration": 20, "validation": 30, "test": 30,
    }  # fmt: skip
    assert data.classes == ("a", "b", "c", "d")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "data_set 'odd': must return a rlprune.ImageSource, got NoneType"),
        (
            rlprune.ImageSource((torch.zeros(4, 3, 6, 6), torch.arange(4))),
            r"of torch\.uint8 .* got \(4, 3, 6, 6\)",
        ),
        (rlprune.ImageSource((images()[0], torch.arange(3))), r"with labels \(N,\), got .* with \(3,\)"),
        (rlprune.ImageSource((images()[0], torch.rand(100))), "labels of train must be whole numbers from 0"),
        (rlprune.ImageSource((images()[0], images()[1] - 1)), "labels of train must be whole numbers from 0"),
        (rlprune.ImageSource(images(), classes=("a", "b")), "holds label 3, but only 2 classes"),
        (rlprune.ImageSource(images(), images(10, 1)), "test must have images of the shape"),
        (ZeroDivisionError("no"), "data_set 'odd': ZeroDivisionError: no"),
    ],
)
def test_what_is_no_data_set_is_named(given: Any, message: str) -> None:
    def odd(request: Request) -> Any:
        if isinstance(given, Exception):
            raise given
        return given

    rlprune.data_set("odd")(odd)
    with pytest.raises((DataError, ConfigError), match=message):
        load_data("odd")


def test_texts_are_split_or_come_in_splits() -> None:
    def encode(text: str) -> list[int]:
        return [ord(letter) for letter in text]

    rlprune.text_data("one text", name="one")(lambda request: "abcdefgh" * 400)
    shared = load_text("one", TextRequest(length=8), encode)
    assert {split.source for split in shared.splits.values()} == {"one"}

    own = {name: name[-1] * 400 for name in shared.splits}
    rlprune.text_data("four texts", name="four")(lambda request: own)
    apart = load_text("four", TextRequest(length=8), encode)
    assert {chr(int(split.tokens[0])) for split in apart.splits.values()} == {"n", "t"}
    assert [split.source for split in apart.splits.values()].count("four test") == 1


@pytest.mark.parametrize("given", [None, "", {"train": "x"}, 3])
def test_what_is_no_text_is_named(given: Any) -> None:
    rlprune.text_data("odd", name="odd_text")(lambda request: given)
    with pytest.raises(DataError, match="text_data 'odd_text': must return a text, or {split: text}"):
        read_text("odd_text", TextRequest())
