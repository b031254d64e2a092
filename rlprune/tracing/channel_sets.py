"""Sets of channels that grow together: which channels have to be cut with which."""

from __future__ import annotations

import numpy as np

from ..utils.arrays import Ints

CONSTANT = 0
"""The label of what no channel stands behind: zeros and padding, which take the size of what they meet."""


class ChannelSets:
    """Numbered labels that are joined again and again (union-find over arrays)."""

    def __init__(self) -> None:
        self._parent: Ints = np.zeros(1, dtype=np.int64)
        self._count = 1

    def __len__(self) -> int:
        return self._count

    def new(self, count: int) -> Ints:
        """``count`` new labels, each in a set of its own."""
        if self._count + count > len(self._parent):
            grown = np.arange(2 * (self._count + count), dtype=np.int64)
            grown[: self._count] = self._parent[: self._count]
            self._parent = grown
        start = self._count
        self._count += count
        return np.arange(start, start + count, dtype=np.int64)

    def find(self, labels: Ints) -> Ints:
        """The lowest label of the set of each label; any shape."""
        found: Ints = self._parent[labels]
        while True:
            above: Ints = self._parent[found]
            if np.array_equal(above, found):
                return found
            found = above

    def join(self, one: Ints, other: Ints) -> None:
        """Make one set of the sets of each pair of labels; a pair with CONSTANT is left alone. Shapes are equal."""
        both = (one != CONSTANT) & (other != CONSTANT)
        touched = np.concatenate([one[both], other[both]])
        a, b = self.find(one[both]), self.find(other[both])
        while len(a) and not np.array_equal(a, b):
            low, high = np.minimum(a, b), np.maximum(a, b)
            # Where several pairs meet in one label the lowest wins; the others are seen again in the next round.
            np.minimum.at(self._parent, high, low)
            a, b = self.find(low), self.find(high)
            unequal = a != b
            a, b = a[unequal], b[unequal]
        self._parent[touched] = self.find(touched)  # short paths for the next question

    def roots(self) -> Ints:
        """The lowest label of the set of every label, (labels,); compresses all paths."""
        self._parent[: self._count] = self.find(np.arange(self._count, dtype=np.int64))
        return self._parent[: self._count].copy()
