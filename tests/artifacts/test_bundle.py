"""Functions of the package as one file: what they use comes along, and what cannot be taken out is refused."""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from rlprune.artifacts.bundle import bundle

FILES = {
    "__init__": "",
    "low": '''
from __future__ import annotations
import reprlib
from typing import TYPE_CHECKING, Any
if TYPE_CHECKING:
    from .high import Never

SHORT = reprlib.Repr()
SHORT.maxlist = 2
UNUSED = 1 / 0 if False else 2

class Base(Exception):
    """The base."""

class Kind(Base):
    """Needs its base."""

def cyclic(n: int) -> int:
    """Uses the other."""
    return 0 if n < 1 else other(n - 1)

_LIMIT = 50

def _inner(n: int) -> int:
    """_inner adds."""
    return n + _LIMIT

def private(n: int) -> int:
    return _inner(n)

def other(n: int) -> int:
    return 1 if n < 1 else cyclic(n - 1)

def unused() -> None:
    raise SystemExit
''',
    "high": '''
from __future__ import annotations
import functools
import json as js
import os.path
from .low import SHORT, Kind, cyclic
from .typed import Shape

class Never: ...

@functools.cache
def top(n: int, shape: Shape | None = None) -> str:
    """What is asked for."""
    from .deep import inner
    try:
        inner(n)
    except Kind as error:
        return f"{SHORT.repr([1, 2, 3])} {js.dumps(cyclic(n))} {error} {os.path.basename('a/b')}"
    return ""

def replaced() -> int:
    return 0

def asks() -> int:
    return replaced()
''',
    "twin": '''
from .low import cyclic, private
_LIMIT = 5
def _inner(n):
    return n + _LIMIT
def both(n):
    return _inner(n), private(n)
''',
    "typed": "class Shape: ...\n",
    "deep": '''
from .low import Kind
def inner(n):
    raise Kind(n)
''',
    "clash": '''
from .low import cyclic
from .high import top
def other():
    return top(cyclic(1))
''',
    "object": '''
from . import low
def ask():
    return low.cyclic(1)
''',
    "renames": '''
from .low import cyclic as turning
def use():
    return turning(1)
''',
}  # fmt: skip


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    folder = tmp_path / "bundled_package"
    folder.mkdir()
    for name, text in FILES.items():
        (folder / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    yield "bundled_package"
    for name in [name for name in sys.modules if name.startswith("bundled_package")]:
        del sys.modules[name]


def module(package: str, name: str) -> ModuleType:
    return importlib.import_module(f"{package}.{name}")


def test_what_a_function_uses_comes_along_and_nothing_else(package: str) -> None:
    top = module(package, "high").top
    text = bundle([top], '"""The head."""', "if True:\n    DONE = top(3)")
    assert ast.get_docstring(ast.parse(text)) == "The head." and "from ." not in text
    assert "unused" not in text and "UNUSED" not in text and "TYPE_CHECKING" not in text
    assert "Shape = Any" in text  # an annotation's only
    exec(text, found := {"__name__": "alone"})
    assert found["DONE"] == top(3) == "[1, 2, ...] 1 3 b"


def test_a_definition_can_be_written_in_another_way(package: str) -> None:
    text = bundle([module(package, "high").asks], "# head", instead={"replaced": "lambda: 7"})
    exec(text, found := {"__name__": "alone"})
    assert found["asks"]() == 7


def test_private_names_of_two_files_are_told_apart(package: str) -> None:
    text = bundle([module(package, "twin").both], "# head")
    exec(text, found := {"__name__": "alone"})
    assert found["both"](1) == (6, 51)


@pytest.mark.parametrize(
    ("name", "function", "words"),
    [
        ("object", "ask", "does not define 'low'; a bundle cannot use modules"),
        ("clash", "other", "'other' is defined in"),
        ("renames", "use", "imports 'cyclic' as 'turning'"),
    ],
)
def test_what_cannot_be_taken_out_is_refused(package: str, name: str, function: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        bundle([getattr(module(package, name), function)], "# head")
