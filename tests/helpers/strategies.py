"""What property tests of projections draw."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from rlprune.pruning.budget import Limits


@st.composite
def limits(draw: st.DrawFn, most_groups: int, most_units: int) -> Limits:
    """Widths, one step for all groups, and one minimum that is a multiple of it where the width allows."""
    groups = draw(st.integers(1, most_groups))
    dense = np.array(draw(st.lists(st.integers(1, most_units), min_size=groups, max_size=groups)))
    step = np.minimum(draw(st.sampled_from([1, 1, 2, 8])), dense)
    lowest = draw(st.integers(1, 9))
    return Limits(dense, np.minimum(-(-lowest // step) * step, dense), step)
