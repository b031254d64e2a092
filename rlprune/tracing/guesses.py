"""Which guesses of sizes in attributes are followed: none that is not needed, and none that the proof refutes."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from .graph import Size

_NONE = -1


class Guesses:
    """The sizes of a model of which some are guesses, each with several classes that it may count.

    A guess is left out until a cut of these classes fails; then its first choice is taken, then the next one, and at
    last it is left out again. Those that the forward pass is known to read are taken from the beginning, and all are
    where nothing is ``proved``.
    """

    def __init__(self, sizes: Sequence[Size], proved: bool) -> None:
        self._known = [size for size in sizes if size.known]
        self._guesses = [size for size in sizes if not size.known]
        self._choice = [0 if size.read or not proved else _NONE for size in self._guesses]

    def sizes(self) -> list[Size]:
        """The sizes that are followed now."""
        chosen = [
            Size(guess.module, guess.path, guess.choices[choice], True)
            for guess, choice in zip(self._guesses, self._choice, strict=True)
            if 0 <= choice < len(guess.choices)
        ]
        return self._known + chosen

    def change(self, refuted: Collection[int]) -> bool:
        """Go to the next choice of those guesses that may count one of the classes; False where there is none left."""
        changed = False
        classes = np.fromiter(refuted, dtype=np.int64)
        for i, guess in enumerate(self._guesses):
            touches = any(np.isin(choice, classes).any() for choice in guess.choices)
            if touches and self._choice[i] < len(guess.choices):
                self._choice[i] += 1
                changed = True
        return changed
