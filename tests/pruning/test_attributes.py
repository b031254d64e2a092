"""Sizes at paths of a module: read, replaced, and nothing else touched."""

from __future__ import annotations

from collections import namedtuple
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from rlprune.pruning.attributes import get_size, set_size

Pair = namedtuple("Pair", "first second")


def module() -> Any:
    made: Any = nn.Identity()
    made.width = 8
    made.splits = [4, 6]
    made.fixed = (4, 6)
    made.one = (5,)
    made.named = Pair(1, (2, 3))
    made.info = [{"num_chs": 3, "sizes": (7, [8, 9])}]
    made.holder = SimpleNamespace(info=[{"n": 1}])
    made.flag = True
    made.text = "8"
    return made


@pytest.mark.parametrize(
    ("path", "old"),
    [
        ("width", 8),
        ("splits[1]", 6),
        ("fixed[0]", 4),
        ("one", 5),
        ("one[0]", 5),
        ("named[1][0]", 2),
        ("info[0].num_chs", 3),
        ("info[0].sizes[0]", 7),
        ("info[0].sizes[1][1]", 9),
        ("holder.info[0].n", 1),
    ],
)
def test_a_size_is_replaced_and_nothing_else(path: str, old: int) -> None:
    owner, before = module(), module()
    assert get_size(owner, path) == old
    set_size(owner, path, 17)
    assert get_size(owner, path) == 17
    set_size(owner, path, old)
    names = [n for n in vars(before) if not n.startswith("_")]
    assert {n: getattr(owner, n) for n in names} == {n: getattr(before, n) for n in names}
    assert type(owner.named) is Pair and type(owner.named.second) is tuple


@pytest.mark.parametrize(
    "path",
    ["height", "splits[2]", "splits", "flag", "text", "fixed", "info[0]", "info[0].other", "_forward_hooks", "",
     "width.real", "splits[-1]", "info[0]['num_chs']", "__class__", "forward", "holder.info[0].n.x", "width "],
)  # fmt: skip
def test_what_is_no_size_is_refused(path: str) -> None:
    owner = module()
    with pytest.raises(LookupError):
        set_size(owner, path, 1)
