"""Scripts and examples of the documentation use the public surface: ``rlprune``, and its packages' ``__all__``."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import string
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import rlprune
from helpers.pages import DOCS, PAGES, blocks

SCRIPTS = sorted((DOCS / "scripts").glob("*.py"))
PACKAGES = [
    name
    for name in rlprune.__all__
    if isinstance(getattr(rlprune, name), ModuleType) and hasattr(getattr(rlprune, name), "__all__")
]


def public(package: str) -> set[str]:
    """The public names of a package of ours; of the root for ''."""
    module = importlib.import_module(f"rlprune.{package}" if package else "rlprune")
    return set(module.__all__) | (set(rlprune.rules.RULES) if package == "rules" else set())


def allowed(package: str, name: str) -> bool:
    return package in ("", *PACKAGES) and name in public(package)


def hidden(tree: ast.AST) -> Iterator[str]:
    """What a script takes from rlprune that is not public, as dotted names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.startswith("rlprune."))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "rlprune":
            package = (node.module or "").partition(".")[2]
            yield from (f"{node.module}.{a.name}" for a in node.names if not allowed(package, a.name))
        elif isinstance(node, ast.Attribute):
            parts = ast.unparse(node).split(".")
            if parts[0] != "rlprune" or not all(part.isidentifier() for part in parts):
                continue
            deeper = parts[1] in PACKAGES and len(parts) > 2
            if not allowed("", parts[1]) or (deeper and not allowed(parts[1], parts[2])):
                yield ".".join(parts)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_uses_public_names_alone(script: Path) -> None:
    assert not sorted(set(hidden(ast.parse(script.read_text(encoding="utf-8")))))


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_an_example_uses_public_names_alone(page: Path) -> None:
    assert not {name for block in blocks(page, "python") for name in hidden(ast.parse(block))}


@pytest.mark.parametrize(
    "line",
    ["import rlprune.envs.task", "from rlprune.envs.task import Task", "from rlprune.envs import base",
     "from rlprune import api", "rlprune.api.trace(model)", "rlprune.config.schema.Section",
     "from rlprune.cli import main"],
)  # fmt: skip
def test_the_check_sees_what_is_not_public(line: str) -> None:
    assert list(hidden(ast.parse(line)))


@pytest.mark.parametrize(
    "line",
    ["import rlprune", "from rlprune import search", "from rlprune.envs import Task", "rlprune.rules.lamp(context)",
     "rlprune.Config.from_dict({})", "from rlprune.report import plots"],
)  # fmt: skip
def test_the_check_lets_pass_what_is_public(line: str) -> None:
    assert not list(hidden(ast.parse(line)))


@pytest.mark.parametrize("name", PACKAGES)
def test_every_public_name_of_a_package_is_there(name: str) -> None:
    """A lazy name that a module of the package has too would turn into that module once it is imported."""
    package = getattr(rlprune, name)
    modules = {found.name for found in pkgutil.iter_modules(package.__path__)}
    assert len(set(package.__all__)) == len(package.__all__)
    for public_name in package.__all__:
        value = getattr(package, public_name)
        assert public_name in dir(package)
        assert isinstance(value, ModuleType) == (public_name in modules)
    with pytest.raises(AttributeError):
        package.no_such_name  # noqa: B018


def fillings(tree: ast.Module) -> Iterator[tuple[str, set[str], set[str]]]:
    """For every ``NAME.format(...)`` of a script's own text: its name, the fields that it has, and what it gets."""
    texts = {
        node.targets[0].id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    }
    for node in ast.walk(tree):
        function = node.func if isinstance(node, ast.Call) else None
        if isinstance(function, ast.Attribute) and function.attr == "format":
            name = ast.unparse(function.value)
            if name in texts:
                fields = {f for _, f, _, _ in string.Formatter().parse(texts[name]) if f}
                given = {keyword.arg or "" for keyword in node.keywords}
                yield name, {field.partition("[")[0] for field in fields}, given


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_page_gets_every_field_that_its_text_has(script: Path) -> None:
    for name, fields, given in fillings(ast.parse(script.read_text(encoding="utf-8"))):
        assert fields == given, name


def test_most_scripts_fill_a_page() -> None:
    assert sum(any(fillings(ast.parse(s.read_text(encoding="utf-8")))) for s in SCRIPTS) > len(SCRIPTS) // 2
