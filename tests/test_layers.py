"""The floors of the design: a file imports from lower floors, or from its own package without a circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "rlprune"
# Packages of one floor do not import each other.
FLOORS = {
    "errors": 1,
    "utils": 2,
    "config": 2.5,
    "pruning": 3,
    "tracing": 4,
    "importance": 4,
    "artifacts": 4,
    "recovery": 5,
    "workloads": 6,
    "vision": 7,
    "language": 7,
    "rules": 8,
    "latency": 6.5,
    "api": 8,
    "evaluation": 9,
    "envs": 10,
    "report": 10,
    "surrogates": 11,
    "agents": 12,
    "experiments": 13,
    "plugins": 13,
    "benchmark": 14,
    "cli": 15,
    "__main__": 16,
    "__init__": 16,  # the public surface: it may name everything
}


@dataclass(frozen=True)
class Edge:
    """One import: from a file to a module of ours, both as dotted names below rlprune."""

    source: str
    target: str
    line: int
    types_only: bool


def place(module: str) -> str:
    return module.split(".")[0]


def modules() -> dict[str, Path]:
    names = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        names[".".join(parts)] = path
    return names


def resolve(name: str, known: dict[str, Path]) -> str | None:
    """The file that a dotted name below rlprune lives in; None for a name that is no module."""
    for candidate in (name, f"{name}.__init__" if name else "__init__"):
        if candidate in known:
            return candidate
    return None


def edges_of(module: str, path: Path, known: dict[str, Path]) -> Iterator[Edge]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    types_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    # A package's __init__ counts itself as the level that one dot means.
    package = module.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            absolute = [a.name for a in node.names if a.name.split(".")[0] == "rlprune"]
            assert not absolute, f"{path}:{node.lineno}: import {absolute[0]}: use a relative import"
        if not isinstance(node, ast.ImportFrom):
            continue
        outside = node.module is not None and node.module.split(".")[0] == "rlprune"
        assert node.level or not outside, f"{path}:{node.lineno}: use a relative import"
        if not node.level:
            continue
        base = package[: len(package) - (node.level - 1)]
        stem = ".".join([*base, *(node.module.split(".") if node.module else [])])
        for alias in node.names:
            target = resolve(f"{stem}.{alias.name}" if stem else alias.name, known) or resolve(stem, known)
            assert target is not None, f"{path}:{node.lineno}: cannot tell what {alias.name!r} is"
            if target != module:
                yield Edge(module, target, node.lineno, id(node) in types_only)


KNOWN = modules()
EDGES = [edge for name, path in KNOWN.items() for edge in edges_of(name, path, KNOWN)]


def test_every_place_has_a_floor() -> None:
    assert {place(name) for name in KNOWN} <= set(FLOORS)
    assert len(EDGES) > 20


def allowed(edge: Edge) -> bool:
    here, there = place(edge.source), place(edge.target)
    if edge.target == "__init__":  # `from . import __version__`
        return FLOORS[here] >= FLOORS["experiments"]
    return here == there or FLOORS[there] < FLOORS[here]


@pytest.mark.parametrize("module", KNOWN)
def test_no_import_goes_up(module: str) -> None:
    wrong = [
        f"line {edge.line} imports {edge.target} (floor {FLOORS[place(edge.target)]})"
        for edge in EDGES
        if edge.source == module and not allowed(edge)
    ]
    assert not wrong, f"rlprune/{module}.py (floor {FLOORS[place(module)]}): {'; '.join(wrong)}"


def find_circle(graph: dict[str, set[str]]) -> list[str]:
    """One circle of a directed graph as a path, or an empty list."""
    done: set[str] = set()

    def visit(node: str, path: list[str]) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return []
        for target in sorted(graph.get(node, ())):
            circle = visit(target, [*path, node])
            if circle:
                return circle
        done.add(node)
        return []

    for node in sorted(graph):
        circle = visit(node, [])
        if circle:
            return circle
    return []


def test_no_circle() -> None:
    """Imports inside of functions count as well; only those for type checkers do not."""
    graph: dict[str, set[str]] = {}
    for edge in EDGES:
        # The package's root names everything lazily, and `from . import __version__` reads one constant.
        if not edge.types_only and "__init__" not in (edge.source, edge.target):
            graph.setdefault(edge.source, set()).add(edge.target)
    assert find_circle(graph) == []


def test_the_checks_see_a_violation() -> None:
    assert find_circle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a", "b", "c", "a"]
    assert not allowed(Edge("tracing.graph", "envs.task", 1, False))
    assert not allowed(Edge("tracing.graph", "workloads.base", 1, True))
    assert not allowed(Edge("config.config", "artifacts.policy", 1, False))
    assert not allowed(Edge("vision.data", "language.text", 1, False))
    assert allowed(Edge("agents.ppo.agents", "envs.task", 1, False))


def test_torch_pruning_is_imported_by_the_tracer_and_by_the_peer_only() -> None:
    users = [
        name
        for name, path in KNOWN.items()
        if any(
            isinstance(node, (ast.Import, ast.ImportFrom)) and "torch_pruning" in ast.unparse(node)
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        )
    ]
    assert users == ["rules.depgraph", "tracing.graph"]
