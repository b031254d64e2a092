"""Nests of tensors: what models take and return."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from transformers.modeling_outputs import ImageClassifierOutput

from rlprune.errors import DataError
from rlprune.utils.pytrees import (
    batch_size,
    call,
    map_tensors,
    repeat,
    sample_count,
    take,
    tensors,
    to_double,
)

Pair = namedtuple("Pair", "image mask")


@dataclass
class Sample:
    image: Tensor
    name: str


def nests() -> list[object]:
    image, mask = torch.ones(3, 2), torch.zeros(3, 4)
    return [
        image,
        (image, mask),
        {"image": image, "mask": mask},
        Pair(image, mask),
        [torch.ones(2), torch.ones(5), torch.ones(1)],
        ([torch.ones(2), torch.ones(5), torch.ones(1)],),
        Sample(image, "a"),
        ImageClassifierOutput(logits=image),
    ]


@pytest.mark.parametrize("nest", nests(), ids=lambda nest: type(nest).__name__)
def test_samples_are_counted_and_taken(nest):
    assert batch_size(nest) == 3
    part = take(nest, slice(0, 2))
    assert type(part) is type(nest) and batch_size(part) == 2
    assert all(t.dtype == torch.float64 for t in tensors(to_double(nest)))
    assert len(list(tensors(map_tensors(lambda t: t + 1, nest)))) == len(list(tensors(nest)))


def test_what_has_no_sample_axis_stays_whole():
    images, boxes, scale = torch.ones(4, 3), [{"boxes": torch.ones(7, 4)}] * 4, torch.tensor(2.0)
    part = take((images, boxes, scale), slice(1, 3))
    assert part[0].shape == (2, 3) and len(part[1]) == 2 and part[2] is scale
    assert part[1][0]["boxes"].shape == (7, 4)


def test_a_list_is_one_argument_and_a_tuple_several():
    def model(*args: object, **named: object) -> tuple[int, list[str]]:
        return len(args), sorted(named)

    image = torch.ones(1)
    assert call(model, image) == (1, []) and call(model, [image, image]) == (1, [])
    assert call(model, (image, image)) == (2, []) and call(model, {"x": image}) == (0, ["x"])


def test_nothing_to_count_is_named():
    with pytest.raises(DataError, match="batches: holds no tensor with a batch dimension"):
        batch_size({"a": 1}, "batches")


def test_a_sample_is_repeated_in_every_part() -> None:
    nest = {"x": torch.arange(6).reshape(2, 3), "size": torch.tensor(4), "more": (torch.ones(2, 1), [1, 2])}
    found = repeat(nest, 3)
    assert found["x"].tolist() == [[0, 1, 2]] * 3 and found["more"][0].shape == (3, 1)
    assert found["more"][1] == [1, 1, 1] and found["size"] is nest["size"]
    pictures = [torch.zeros(3, 4, 5)]
    assert [p.shape for p in repeat((pictures,), 2)[0]] == [(3, 4, 5)] * 2


def test_samples_are_counted_by_the_targets() -> None:
    assert sample_count(torch.zeros(7, 2, 3), torch.zeros(2)) == 2
    assert sample_count([torch.zeros(3, 4, 4)] * 5, [{"boxes": torch.zeros(0, 4)}] * 5) == 5
    assert sample_count(torch.zeros(7, 2), None) == 7
