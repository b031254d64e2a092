"""Registries: everything of a kind that can be named, what rlprune ships and what plugins add alike."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from typing import Any, TypeVar

from ..errors import ConfigError, RlpruneError, described

Entry = TypeVar("Entry")
Function = TypeVar("Function", bound=Callable[..., object])

GROUP = "rlprune.plugins"
"""The group of entry points whose modules are plugins."""
_PACKAGE = __name__.partition(".")[0]


class Registry(dict[str, Entry]):
    """{name: what is registered under it}, for one kind of things.

    Args:
        kind: what one of them is called, in the singular.
        source: the attribute of an entry that holds the registered function or class.
        entries: what is there without an import, by name.
        home: the module below rlprune that registers what else is shipped; imported when a name is not known.
        reserved: names that a setting takes in place of one of these, so that none may be registered under them.
    """

    def __init__(
        self,
        kind: str,
        *,
        source: str = "function",
        entries: Iterable[tuple[str, Entry]] = (),
        home: str | None = None,
        reserved: tuple[str, ...] = (),
    ) -> None:
        super().__init__(entries)
        self.kind, self._source, self._home, self.reserved = kind, source, home, reserved
        _ALL.append(self)

    def knows(self, name: object) -> bool:
        """Whether a name is registered; an unknown one is looked for in installed plugins too."""
        if name not in self:
            self.complete()
        return name in self

    def complete(self) -> None:
        """Import what registers further names: the package's own module of such things, and installed plugins."""
        if self._home is not None:
            importlib.import_module(f"{_PACKAGE}.{self._home}")
        if installed():
            importlib.import_module(f"{_PACKAGE}.plugins").load_installed()

    def source(self, name: str) -> Any:
        """The function or class that was registered; None for what the package does by itself, or an unknown name."""
        return getattr(self[name], self._source, None) if name in self else None

    def foreign(self) -> set[str]:
        """The names that do not come with rlprune."""
        return {name for name in self if is_foreign(self.source(name))}

    def decorator(
        self, word: str, summary: str, make: Callable[[str, Function], Entry], name: str | None = None
    ) -> Callable[[Function], Function]:
        """What ``@word("what it does")`` returns: registers ``make(name, function)`` and gives the function back.

        Raises (when applied):
            ConfigError: the name is taken, or the summary is missing.
        """
        if not isinstance(summary, str):
            raise ConfigError(f'{word}: needs a summary, as in @{word}("what it does")')

        def register(function: Function) -> Function:
            own = name or function.__name__
            owner = self.source(own)
            # Only a notebook may define its own function again.
            again = owner is not None and owner.__module__ == function.__module__ == "__main__"
            if own in self.reserved or (own in self and not again):
                raise ConfigError(f"{word}: the name {own!r} is taken; choose another")
            self[own] = make(own, function)
            return function

        return register


_ALL: list[Registry[Any]] = []


def registries() -> list[Registry[Any]]:
    """All registries whose modules have been imported."""
    return list(_ALL)


def is_foreign(function: object) -> bool:
    """Whether a function or class was written outside of the package."""
    module = getattr(function, "__module__", None)
    return module is not None and module.partition(".")[0] != _PACKAGE


@dataclass(frozen=True)
class Named:
    """A registered thing: a line on it, and its function; None where the package does by itself what the name says.

    ``wing`` names the only wing whose models have it (``ModelAdapter.wing``); None for all models.
    """

    name: str
    summary: str
    function: Callable[..., Any] | None = None
    wing: str | None = None


@cache
def installed() -> tuple[metadata.EntryPoint, ...]:
    """The entry points of installed plugins, read once."""
    return tuple(metadata.entry_points(group=GROUP))


@contextlib.contextmanager
def named_errors(word: str, name: str) -> Iterator[None]:
    """Whatever a registered function raises becomes one line that names it; rlprune's own errors pass through."""
    try:
        yield
    except RlpruneError:
        raise
    except Exception as error:
        raise ConfigError(f"{word} {name!r}: {described(error)}") from error
