"""Weights as whole numbers: how many sequences every document of a mixture gives, and in which order."""

from __future__ import annotations

import math
from collections.abc import Sequence


def apportioned(total: int, weights: Sequence[float]) -> list[int]:
    """``total`` as whole numbers in the proportion of the weights: floors, then the largest remainders, the first of
    equal ones; each is at least 1 where the total allows it."""
    shares = [total * weight / sum(weights) for weight in weights]
    counts = [math.floor(share) for share in shares]
    order = sorted(range(len(weights)), key=lambda i: (counts[i] - shares[i], i))
    for index in order[: total - sum(counts)]:
        counts[index] += 1
    for index in [i for i, count in enumerate(counts) if not count]:
        giver = max(range(len(counts)), key=lambda i: counts[i])
        if counts[giver] > 1:
            counts[giver] -= 1
            counts[index] = 1
    return counts


def largest_total(available: Sequence[int], weights: Sequence[float]) -> int:
    """The largest total of which no document has to give more than it has."""
    if len(available) == 1:
        return available[0]
    whole = sum(weights)
    total = math.floor(
        min(have * whole / weight for have, weight in zip(available, weights, strict=True)) + 1e-9
    )
    while total > 0 and any(
        count > have for count, have in zip(apportioned(total, weights), available, strict=True)
    ):
        total -= 1
    return total


def in_turns(counts: Sequence[int]) -> list[tuple[int, int]]:
    """(document, place in it) of all sequences, each document's at even distances: any beginning is a mixture."""
    places = [
        ((place + 0.5) / count, document, place)
        for document, count in enumerate(counts)
        for place in range(count)
    ]
    return [(document, place) for _, document, place in sorted(places)]
