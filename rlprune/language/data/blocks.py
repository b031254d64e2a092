"""Examples as sequences of one length: one a sequence, or several packed into it."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .answers import Tokens


@dataclass(frozen=True)
class Blocks:
    """Sequences of one length: ``tokens`` and ``scored``, each (N * length,).

    A sequence ends in the beginning of another example, of which nothing is scored and which nothing scored can see:
    what comes later. An example's first token is never scored, for it follows on another one or on nothing.
    """

    tokens: Tensor
    scored: Tensor
    length: int
    examples: int
    dropped: int = 0
    """Examples with no answer in their first ``length`` tokens."""
    shortened: int = 0
    """Examples that were cut at ``length`` tokens."""

    def __len__(self) -> int:
        return len(self.tokens) // self.length


def make_blocks(examples: Sequence[Tokens], length: int, packing: bool, limit: int | None = None) -> Blocks:
    """Whole examples in sequences of ``length`` tokens; longer ones are cut, those without an answer left out.

    With ``packing`` by best fit, longest first (Ding et al. 2024, arXiv 2404.10830): a sequence may hold several
    examples, and a later one sees the earlier ones. ``limit`` is the most sequences that are made, in order.
    """
    kept: list[Tokens] = []
    shortened = seen = 0
    for example in examples:
        if limit is not None and not packing and len(kept) == limit:
            break
        seen += 1
        part = Tokens(example.ids[:length], example.answer[:length].clone())
        part.answer[:1] = False
        if part.answer.any():
            kept.append(part)
            shortened += len(example.ids) > length
    groups = _packed([len(part.ids) for part in kept], length) if packing else [[i] for i in range(len(kept))]
    made = [_block([kept[i] for i in group], kept, group[-1], length) for group in groups[:limit]]
    empty = torch.zeros(0, dtype=torch.int64)
    return Blocks(
        torch.cat([ids for ids, _ in made]) if made else empty,
        torch.cat([scored for _, scored in made]) if made else empty.bool(),
        length,
        sum(len(group) for group in groups[:limit]),
        seen - len(kept),
        shortened,
    )


def _packed(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Which examples share a sequence: the longest first, each where the least room is left over."""
    groups: list[list[int]] = []
    left: list[tuple[int, int]] = []  # (room left, group), sorted
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = bisect.bisect_left(left, (lengths[index], -1))
        if place == len(left):
            groups.append([])
            group, space = len(groups) - 1, room
        else:
            space, group = left.pop(place)
        groups[group].append(index)
        bisect.insort(left, (space - lengths[index], group))
    return groups


def _block(parts: Sequence[Tokens], every: Sequence[Tokens], last: int, length: int) -> tuple[Tensor, Tensor]:
    ids, scored = [part.ids for part in parts], [part.answer for part in parts]
    missing = length - sum(len(part.ids) for part in parts)
    while missing:
        last = (last + 1) % len(every)
        filling = every[last].ids[:missing]
        ids.append(filling)
        scored.append(torch.zeros(len(filling), dtype=torch.bool))
        missing -= len(filling)
    return torch.cat(ids), torch.cat(scored)
