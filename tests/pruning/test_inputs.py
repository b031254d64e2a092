"""Example inputs as JSON: what is recorded comes back, and a record that no sample has is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from rlprune.errors import ArtifactError
from rlprune.pruning.inputs import check_inputs, describe_inputs, inputs_from

IMAGES = torch.rand(2, 3, 8, 9)


def zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(shape)


@pytest.mark.parametrize(
    ("inputs", "wanted"),
    [
        (IMAGES, zeros(1, 3, 8, 9)),
        (IMAGES.double(), zeros(1, 3, 8, 9).double()),
        ((IMAGES, torch.rand(2, 4)), (zeros(1, 3, 8, 9), zeros(1, 4))),
        ([torch.rand(3, 8, 9)], [zeros(3, 8, 9)]),
        ([torch.rand(3, 8, 9), torch.rand(3, 5, 6)], [zeros(3, 8, 9)]),
        ({"x": IMAGES, "flag": True, "none": None}, {"x": zeros(1, 3, 8, 9), "flag": True, "none": None}),
        ((IMAGES, torch.tensor([5, 8])), (zeros(1, 3, 8, 9), torch.tensor([5]))),
        (torch.zeros(2, 99, dtype=torch.long), torch.ones(1, 99, dtype=torch.long)),
        ({"x": (IMAGES, [IMAGES[0].half()] * 2)}, {"x": (zeros(1, 3, 8, 9), [zeros(3, 8, 9).half()])}),
    ],
)
def test_one_sample_comes_back(inputs: Any, wanted: Any) -> None:
    record = json.loads(json.dumps(describe_inputs(inputs)))
    found = inputs_from(record)
    assert repr(found) == repr(wanted)
    assert repr(describe_inputs(found)) == repr(describe_inputs(wanted))


def test_the_record_of_one_image_tensor_is_its_shape() -> None:
    assert describe_inputs(IMAGES) == [2, 3, 8, 9]


@pytest.mark.parametrize(
    "inputs", [object(), (IMAGES, object()), float("nan"), torch.zeros(2, 0, dtype=torch.long)]
)
def test_what_json_cannot_say_is_not_recorded(inputs: Any) -> None:
    assert describe_inputs(inputs) is None


@pytest.mark.parametrize(
    "record",
    [
        "3x32x32", 7, [], [1, 3, "32"], [1, 3, 32.0], [1, 3, -1], [1, 0], [True, 3], [1] * 9, [1, 3, 10**6, 10**6],
        {"shape": [10**12], "dtype": "float32"}, {"shape": [2], "dtype": "object"}, {"shape": [2], "dtype": []},
        {"shape": [2], "dtype": "int64", "values": [1]}, {"shape": [1], "dtype": "int64", "values": ["x"]},
        {"shape": [1], "dtype": "uint8", "values": [10**30]}, {"shape": 3, "dtype": "int64"}, {"tuple": 3},
        {"dict": []}, {"tuple": [[1, 3]]}, {"code": "x"}, {"value": {}},
        {"tuple": [{"shape": [2**28], "dtype": "float32"}] * 2},
        {"tuple": [{"shape": [1], "dtype": "float32"}] * 2000},
    ],
)  # fmt: skip
def test_a_record_that_no_sample_has_is_one_line(record: Any) -> None:
    with pytest.raises(ArtifactError) as caught:
        check_inputs(record, "plan.json")
    text = str(caught.value)
    assert text.startswith("plan.json: input: ") and "\n" not in text and len(text) < 200


def test_a_deep_record_is_refused() -> None:
    record: Any = {"value": 1}
    for _ in range(2000):
        record = {"tuple": [record]}
    with pytest.raises(ArtifactError, match="too deeply"):
        check_inputs(record, "plan.json")
