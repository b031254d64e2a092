"""Code that comes with a model is never run, and nobody is asked whether it may be."""

from __future__ import annotations

import ast
from pathlib import Path

import rlprune

ROOT = Path(rlprune.__file__).parent


def loads(tree: ast.AST) -> list[ast.Call]:
    """Calls of transformers' Auto classes that would ask on the standard input whether to run a folder's code."""
    return [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in ("from_pretrained", "from_config")
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id.startswith("Auto")
    ]


def test_every_load_by_an_auto_class_refuses_foreign_code() -> None:
    found = 0
    for path in ROOT.rglob("*.py"):
        for call in loads(ast.parse(path.read_text(encoding="utf-8"))):
            found += 1
            given = {keyword.arg: keyword.value for keyword in call.keywords}
            value = given.get("trust_remote_code")
            assert isinstance(value, ast.Constant) and value.value is False, f"{path}, line {call.lineno}"
    assert found >= 6
