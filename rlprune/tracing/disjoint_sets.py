"""Sets that grow together: which channels have to be cut with which."""

from __future__ import annotations


class DisjointSets:
    """Sets of numbered elements that are joined again and again (union-find with path halving)."""

    def __init__(self) -> None:
        self.parent: list[int] = []

    def new(self) -> int:
        """The number of a new element, in a set of its own."""
        self.parent.append(len(self.parent))
        return len(self.parent) - 1

    def find(self, a: int) -> int:
        """The lowest element of the set that an element is in."""
        parent = self.parent
        while parent[a] != a:
            parent[a] = parent[parent[a]]
            a = parent[a]
        return a

    def join(self, a: int, b: int) -> None:
        """Make one set of the sets of two elements."""
        a, b = self.find(a), self.find(b)
        if a != b:
            self.parent[max(a, b)] = min(a, b)
