"""Which guesses of sizes in attributes are followed: none that is not needed, and none that the proof refutes."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence

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

    def change(self, refuted: Collection[int], reasons: Iterable[str] = ()) -> bool:
        """Go to the next choice of a guess that may count one of the classes; False where there is none left.

        A shape that did not fit names the number that was still the old one: of these guesses first, then those that
        were left out so far, then all.
        """
        classes = np.fromiter(refuted, dtype=np.int64)
        open_ones = [
            i
            for i, guess in enumerate(self._guesses)
            if self._choice[i] < len(guess.choices)
            and any(np.isin(choice, classes).any() for choice in guess.choices)
        ]
        named = set().union(*map(_shape, reasons))
        left_out = [i for i in open_ones if self._choice[i] == _NONE]
        ways = [
            [i for i in left_out if len(self._guesses[i].choices[0]) in named],
            left_out,
            [i for i in open_ones if len(self._guesses[i].choices[0]) in named],
            open_ones,
        ]
        chosen = next((way for way in ways if way), [])
        for i in chosen:
            self._choice[i] += 1
        return bool(chosen)


def _shape(reason: str) -> set[int]:
    """The sizes in "shape '[1, 17, 192]' is invalid for input of size 1088"."""
    found = re.search(r"shape '\[([-\d, ]+)\]' is invalid", reason)
    return set() if found is None else {int(size) for size in found[1].split(",")} - {-1, 1}
