"""Costs count attention, whichever kernel torch would run it with."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from rlprune.tracing.counting import flop_counter


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("trained", [True, False])
def test_attention_is_counted_as_two_products_of_whole_squares(dtype: torch.dtype, trained: bool) -> None:
    heads, length, size = 4, 16, 8
    queries = torch.randn(1, heads, length, size, dtype=dtype, requires_grad=trained)
    with flop_counter() as counter:
        found = F.scaled_dot_product_attention(queries, queries, queries, is_causal=True)
    assert counter.get_total_flops() == 2 * (2 * heads * length**2 * size)
    assert torch.allclose(
        found, F.scaled_dot_product_attention(queries, queries, queries, is_causal=True), atol=1e-5
    )
