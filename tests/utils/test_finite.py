"""Whether all values are finite, against torch's own question of each."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlprune.utils.finite import all_finite

TYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2]


@given(
    st.lists(st.floats(width=16, allow_nan=True, allow_infinity=True), max_size=9),
    st.sampled_from(TYPES),
)
def test_it_says_what_every_value_says(values: list[float], dtype: torch.dtype) -> None:
    tensor = torch.tensor(values, dtype=torch.float64).to(dtype)
    assert all_finite(tensor) == bool(torch.isfinite(tensor.double()).all())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_value_of_a_large_table_is_found(bad: float) -> None:
    table = torch.randn(300, 41)
    assert all_finite(table.T)
    table[299, 40] = bad
    assert not all_finite(table) and not all_finite(table.T)
