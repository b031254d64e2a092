"""Damage to a file that somebody else may have written: other values in its JSON, or other bytes."""

from __future__ import annotations

import copy
import json
from typing import Any

from hypothesis import strategies as st

_LIMITLESS = "@1e999@"  # json.dumps writes no number that is too large for a float
JUNK: list[Any] = [
    None, True, False, 0, 1, -1, 3, 2**31, 2**63, 10**30, 10**400, -(10**18), 0.5, -0.0, 1e308, -1e308, 5e-324,
    float("nan"), float("inf"), float("-inf"), _LIMITLESS, "", "x", "0", "1e9", "../../evil", "/dev/zero", "\0",
    "\ud800", "a" * 5000, "a\nb", "\u202e", [], {}, [[]], [{}], {"": {}}, {"x": 1}, [0], ["x"], [None], [1, 2, 3],
    [1e308, float("nan")], list(range(2000)), {"a": {"b": {"c": [1]}}}, [-1], [2**63], [10**400], "macs", "latency",
]  # fmt: skip


def paths(value: Any, before: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where the nodes of a JSON value are, the value itself first; of a long list the ends."""
    found = [before]
    if isinstance(value, dict):
        for key, item in value.items():
            found += paths(item, (*before, key))
    elif isinstance(value, list):
        for index in sorted({0, 1, len(value) // 2, len(value) - 1} & set(range(len(value)))):
            found += paths(value[index], (*before, index))
    return found


def nested(depth: int) -> Any:
    value: Any = 1
    for level in range(depth):
        value = [value] if level % 2 else {"a": value}
    return value


@st.composite
def edits(draw: st.DrawFn, value: Any) -> bytes:
    """The JSON text of a value of which one to three nodes are replaced, removed, renamed or wrapped."""
    changed = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(paths(changed)))
        junk = copy.deepcopy(draw(st.sampled_from(JUNK) | st.just(nested(60))))
        if not path:
            if draw(st.booleans()):
                changed = junk
            continue
        owner = changed
        for key in path[:-1]:
            owner = owner[key]
        kind = draw(st.sampled_from(["replace", "replace", "replace", "remove", "wrap", "double", "rename"]))
        if kind == "remove":
            del owner[path[-1]]
        elif kind == "wrap":
            owner[path[-1]] = [owner[path[-1]]]
        elif kind == "double" and isinstance(owner, list):
            owner.append(copy.deepcopy(owner[path[-1]]))
        elif kind == "rename" and isinstance(owner, dict):
            owner[draw(st.sampled_from(["", "x", "\0", "\ud800", "9", "a.b"]))] = owner.pop(path[-1])
        else:
            owner[path[-1]] = junk
    return text_of(changed)


def text_of(value: Any) -> bytes:
    return json.dumps(value).replace(f'"{_LIMITLESS}"', "1e999").encode()


@st.composite
def bytes_of(draw: st.DrawFn, whole: bytes) -> bytes:
    """The bytes of a file, damaged."""
    place = draw(st.integers(0, len(whole)))
    kinds = [
        b"",
        whole[:place],
        b"\xef\xbb\xbf" + whole,
        whole[:place] + draw(st.sampled_from([b"\xff", b"\0", b"\xed\xa0\x80", b"{", b"]", b'"', b"9" * 5000]))
        + whole[place:],
        whole.decode(errors="replace").encode("utf-16"),
        b"[" * 100_000,
        b'{"a":' * 50_000,
        whole + whole,
        b"null",
        b"NaN",
    ]  # fmt: skip
    return draw(st.sampled_from(kinds))


def damaged(whole: bytes) -> st.SearchStrategy[bytes]:
    """A JSON file's bytes with other values three times out of four, other bytes else."""
    value = json.loads(whole)
    return st.one_of(edits(value), edits(value), edits(value), bytes_of(whole))


@st.composite
def damaged_lines(draw: st.DrawFn, whole: bytes) -> bytes:
    """The bytes of a JSON Lines file of which a line is damaged."""
    lines = whole.splitlines()
    place = draw(st.integers(0, len(lines) - 1))
    lines[place] = draw(damaged(lines[place]))
    return b"\n".join(lines) + draw(st.sampled_from([b"\n", b""]))
