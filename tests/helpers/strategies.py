"""What property tests of projections draw."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from rlprune.pruning.budget import Limits
from rlprune.pruning.cost import AxisSize, CostFormula, FormulaBuilder


@st.composite
def limits(draw: st.DrawFn, most_groups: int, most_units: int) -> Limits:
    """Widths, one step for all groups, and one minimum that is a multiple of it where the width allows."""
    groups = draw(st.integers(1, most_groups))
    dense = np.array(draw(st.lists(st.integers(1, most_units), min_size=groups, max_size=groups)))
    step = np.minimum(draw(st.sampled_from([1, 1, 2, 8])), dense)
    lowest = draw(st.integers(1, 9))
    return Limits(dense, np.minimum(-(-lowest // step) * step, dense), step)


@st.composite
def spaces(draw: st.DrawFn) -> tuple[CostFormula, Limits]:
    """A chain of layers with random widths, steps and minimums; some axes carry fixed slots."""
    own = draw(limits(6, 70))
    groups = len(own.dense)
    builder = FormulaBuilder(groups)
    builder.add(draw(st.integers(0, 50)))
    eye = np.eye(groups)
    for i in range(groups):
        here = AxisSize(draw(st.integers(0, 3)), eye[i] * draw(st.integers(1, 3)))
        there = AxisSize(draw(st.integers(0, 3)), eye[(i + 1) % groups] * draw(st.integers(0, 3)))
        builder.add(draw(st.integers(1, 40)), here, there)
        builder.add(draw(st.integers(1, 5)), here)
    return builder.build(), own


def distributions(groups: int) -> st.SearchStrategy[list[float]]:
    """Numbers of 0 and more, not all of them 0, of very different sizes."""
    value = st.one_of(st.just(0.0), st.floats(0.0, 1.0), st.floats(1e-300, 1e300))
    return st.lists(value, min_size=groups, max_size=groups).filter(any)
