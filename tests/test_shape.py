"""The shape of the code: arguments have types, functions fit on a screen."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import rlprune

ROOT = Path(rlprune.__file__).parent
MOST_ANY = 0.02
MOST_LINES = 60

Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions() -> Iterator[tuple[str, Function]]:
    for path in sorted(ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, Function):
                yield f"{path.relative_to(ROOT)}:{node.name}", node


def arguments(function: Function) -> list[ast.arg]:
    own = function.args
    every = [*own.posonlyargs, *own.args, *own.kwonlyargs, *(a for a in (own.vararg, own.kwarg) if a)]
    return [a for a in every if a.arg not in ("self", "cls")]


def holds_any(argument: ast.arg) -> bool:
    names = ast.walk(argument.annotation) if argument.annotation is not None else ()
    return any(isinstance(node, ast.Name) and node.id == "Any" for node in names)


def test_any_is_rare_in_arguments() -> None:
    every = [(name, argument) for name, function in functions() for argument in arguments(function)]
    loose = [f"{name}({argument.arg})" for name, argument in every if holds_any(argument)]
    assert len(every) > 3000
    assert len(loose) < MOST_ANY * len(every), f"{len(loose)} of {len(every)}: {', '.join(loose)}"


def test_functions_are_short() -> None:
    lengths = {name: (f.end_lineno or f.lineno) - f.lineno + 1 for name, f in functions()}
    assert not {name: lines for name, lines in lengths.items() if lines > MOST_LINES}


def test_the_checks_see_what_they_look_for() -> None:
    (function,) = ast.parse("def f(self, a: dict[str, Any], *b: int, c: Any = 1): pass").body
    assert isinstance(function, Function)
    assert [holds_any(a) for a in arguments(function)] == [True, True, False]
