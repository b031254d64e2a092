"""Scoring a candidate must not disturb the random numbers of the caller."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch


@contextlib.contextmanager
def isolated_randomness() -> Iterator[None]:
    """Leave the global generators (torch's on the CPU, numpy's, Python's) as they were found.

    An evaluation may use them; one that is replayed from the ledger does not. Without this a resumed
    search would not be the uninterrupted one.
    """
    kept = torch.random.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        torch.random.set_rng_state(kept[0])
        np.random.set_state(kept[1])
        random.setstate(kept[2])
