"""Some functions of this package, and all that they use of it, as one file of plain Python that runs without it.

Code that travels in saved folders is never written a second time: the file is put together from the sources that the
package itself runs. Definitions are copied as they stand, each after those it uses; imports of the package go.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class _Source:
    """One file: its definitions by name, its imports of the package and of others by the name that they bind."""

    lines: list[str]
    definitions: dict[str, list[ast.stmt]] = field(default_factory=lambda: defaultdict(list))
    inside: dict[str, tuple[Path, str]] = field(default_factory=dict)
    outside: dict[str, str] = field(default_factory=dict)


def bundle(
    functions: Sequence[Callable[..., object]],
    head: str,
    tail: str = "",
    instead: Mapping[str, str] | None = None,
) -> str:
    """The text of a file that defines ``functions``.

    Args:
        head, tail: what stands before and after the code: a docstring, what is run.
        instead: definitions that are written in another way, name -> the value that it gets.

    Raises ValueError where the code cannot be taken out: two public definitions of one name, a module of the package
    used as an object, an import under another name.
    """
    collected = _Collected(dict(instead or {}))
    for function in functions:
        collected.add(Path(inspect.getfile(inspect.unwrap(function))), function.__name__)
    changed = [f"{name} = {value}" for name, value in (instead or {}).items()]
    parts = [head.rstrip(), "from __future__ import annotations", collected.header()]
    return (
        "\n\n".join(parts)
        + "\n\n\n"
        + "\n\n\n".join([*collected.code, *changed, *([tail] if tail else [])])
        + "\n"
    )


class _Collected:
    """Definitions in an order in which each stands after what it uses."""

    def __init__(self, instead: Mapping[str, str]) -> None:
        self.code: list[str] = []
        self._instead = instead
        self._imports: dict[str, str] = {}
        self._owners: dict[str, Path] = {}
        self._begun: set[tuple[Path, int]] = set()
        self._types: set[str] = set()

    def header(self) -> str:
        """The imports; rlprune's types that only annotations name become `Any`."""
        types = sorted(self._types - set(self._owners))
        lines: dict[str, list[str]] = {}
        for line in sorted({*self._imports.values(), *(["from typing import Any"] if types else [])}):
            start, _, name = line.rpartition("import ")
            lines.setdefault(start if start else line, []).append(name)
        plain = [start for start in lines if start.startswith("import ")]
        others = [
            f"{start}import {', '.join(n)}" for start, n in lines.items() if not start.startswith("import ")
        ]
        return "\n".join([*plain, *others, *(["", *(f"{name} = Any" for name in types)] if types else [])])

    def add(self, path: Path, name: str) -> str:
        """Take a name that a file binds, with all that its definition uses; returns what it is called here."""
        source = _source(path)
        if name in self._instead:
            return name
        if name in source.inside:
            return self._from(*source.inside[name])
        if name in source.outside:
            if self._imports.setdefault(name, source.outside[name]) != source.outside[name]:
                raise ValueError(f"{path}: {name!r} is imported in two ways")
        elif name in source.definitions:
            given = self._name(path, name)
            for node in source.definitions[name]:
                self._define(path, source, node)
            return given
        return name

    def _from(self, path: Path, name: str) -> str:
        """`add` for a name that another file imports from this one."""
        source = _source(path)
        if name not in {*source.inside, *source.outside, *source.definitions}:
            raise ValueError(f"{path}: does not define {name!r}; a bundle cannot use modules as objects")
        return self.add(path, name)

    def _name(self, path: Path, name: str) -> str:
        """The name itself, or one with its file's name where another file has a private one of that name."""
        owner = self._owners.setdefault(name, path)
        if owner == path:
            return name
        if not name.startswith("_"):
            raise ValueError(f"{name!r} is defined in {path} and in {owner}")
        return self._name(path, f"{name}_{path.stem}")

    def _define(self, path: Path, source: _Source, node: ast.stmt) -> None:
        if (path, node.lineno) in self._begun:  # functions may use each other
            return
        self._begun.add((path, node.lineno))
        text, local = _text(source.lines, node), _imports(path, node)
        names = {name: self._name(path, name) for name in _bound(node)}
        used = {n.id for n in _evaluated(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
        names |= {name: self.add(path, name) for name in sorted(used - set(local))}
        names |= {name: self._from(*local[name]) for name in sorted(local)}
        for name in sorted({n.id for n in ast.walk(node) if isinstance(n, ast.Name)} - used):
            if name in source.outside:
                self.add(path, name)
            elif name in source.inside or name in source.definitions:
                self._types.add(name)
        for name, given in names.items():
            if name != given:
                text = re.sub(rf"(?<![\w.]){name}\b", given, text)
        self.code.append(text)


@functools.cache
def _source(path: Path) -> _Source:
    text = path.read_text(encoding="utf-8")
    source = _Source(text.splitlines())
    for node in ast.parse(text).body:
        if isinstance(node, ast.ImportFrom) and node.level:
            source.inside |= _imports(path, node)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            for alias in node.names:
                line = ast.unparse(node).partition("import ")[0] + "import " + ast.unparse(alias)
                source.outside[alias.asname or alias.name.partition(".")[0]] = line
        else:
            for name in _bound(node):
                source.definitions[name].append(node)
    return source


def _bound(node: ast.stmt) -> set[str]:
    """The names that a statement defines or, as in ``NAME.field = 1``, completes."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return {node.name}
    targets = getattr(node, "targets", None) or [getattr(node, "target", None)]
    return {n.id for t in targets if t is not None for n in ast.walk(t) if isinstance(n, ast.Name)}


def _imports(path: Path, node: ast.AST) -> dict[str, tuple[Path, str]]:
    """What statements below a node import from the package: name -> the file and the name there."""
    found = {}
    for inner in ast.walk(node):
        if isinstance(inner, ast.ImportFrom) and inner.level:
            folder = path.parents[inner.level - 1]
            stem = folder.joinpath(*(inner.module or "").split("."))
            for alias in inner.names:
                file = stem.with_suffix(".py") if stem.with_suffix(".py").is_file() else stem / "__init__.py"
                if alias.asname not in (None, alias.name):
                    raise ValueError(
                        f"{path}: imports {alias.name!r} as {alias.asname!r}; a bundle keeps names"
                    )
                found[alias.name] = (file, alias.name)
    return found


def _text(lines: Sequence[str], node: ast.stmt) -> str:
    """The lines of a definition, its decorators included, imports of the package within it left out."""
    decorators: list[ast.expr] = getattr(node, "decorator_list", [])
    first = min([node.lineno, *(d.lineno for d in decorators)])
    gone = {
        number
        for inner in ast.walk(node)
        if isinstance(inner, ast.ImportFrom) and inner.level
        for number in range(inner.lineno, (inner.end_lineno or inner.lineno) + 1)
    }
    last = node.end_lineno or node.lineno
    return "\n".join(lines[n - 1] for n in range(first, last + 1) if n not in gone)


def _evaluated(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes below a node, without annotations: they are text to Python (PEP 563)."""
    yield node
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from _evaluated(child)
