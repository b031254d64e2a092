"""Plans as plain numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from rlprune.pruning.history import all_final_widths, as_history, as_widths, final_widths


@pytest.mark.parametrize(
    ("plan", "history"),
    [
        ([3, 4], ((3, 4),)),
        (np.array([3, 4]), ((3, 4),)),
        (torch.tensor([3, 4]), ((3, 4),)),
        (([5, 6], [3, 4]), ((5, 6), (3, 4))),
        (np.array([[5, 6], [3, 4]]), ((5, 6), (3, 4))),
        ((np.array([5, 6]),), ((5, 6),)),
        ((), ((),)),
    ],
)
def test_a_plan_of_one_stage_or_several_is_a_history_of_plain_numbers(plan: Any, history: Any) -> None:
    found = as_history(plan)
    assert found == history and as_history(found) == found
    assert all(type(width) is int for stage in found for width in stage)


@pytest.mark.parametrize("plan", [[3, None], ["x"], [[3], [float("nan")]]])
def test_what_is_no_number_is_refused(plan: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        as_history(plan)


def test_final_widths() -> None:
    histories = [((5, 6), (3, 4)), ((7, 8),)]
    assert as_widths(np.array([3.0, 4.0])) == (3, 4)
    assert final_widths(histories[0]).tolist() == [3, 4] and final_widths(histories[0]).dtype == np.int64
    assert all_final_widths(histories).tolist() == [[3, 4], [7, 8]]
