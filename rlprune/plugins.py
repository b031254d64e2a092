"""Rules and agents from outside of the package: files and modules that the person at the keyboard names.

A plugin is Python that registers with ``@rlprune.rule`` or ``@rlprune.agent`` when it is imported. Only
``--plugin`` and :func:`load` name one; no config, policy or run on disk does, since a plugin is code that runs.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from .agents import AGENTS
from .errors import ConfigError, RlpruneError, near_miss
from .rules import RULES

_PACKAGE = __name__.partition(".")[0]


@dataclass(frozen=True)
class Plugin:
    """A loaded plugin: what was typed, what it registered, and a hash of the source that did."""

    name: str
    methods: tuple[str, ...]
    digest: str


_LOADED: dict[str, Plugin] = {}


def load(names: Sequence[str]) -> list[Plugin]:
    """Import plugins, so that their rules and agents are methods like all others; loaded ones stay as they are.

    Args:
        names: paths of ``.py`` files, or importable modules (the current folder is searched too).

    Raises:
        ConfigError: nothing of that name, an error inside of it, nothing registered, or a name that is taken;
            then nothing of that plugin stays registered.
    """
    return [_LOADED.get(name) or _load(name) for name in (_absolute(name) for name in names)]


def loaded() -> list[str]:
    """Names for :func:`load` that give another process the plugins of this one, in the same order."""
    return list(_LOADED)


def fingerprint(method: str) -> str | None:
    """Hash of the source that a rule or an agent from outside comes from; None for a shipped or unknown one.

    Whoever keeps results of a method has to keep them under this as well: its name says nothing of its code.
    That of a plugin is what was loaded, whatever happened to its file since.
    """
    for plugin in _LOADED.values():
        if method in plugin.methods:
            return plugin.digest
    function = RULES[method].function if method in RULES else AGENTS[method].own if method in AGENTS else None
    if function is None or function.__module__.partition(".")[0] == _PACKAGE:
        return None
    return _digest(sys.modules.get(function.__module__), function)


def _absolute(name: str) -> str:
    """A file as its real path, so that it is one plugin however it is named; a module as it is."""
    if name.endswith(".py") or os.sep in name:
        return str(Path(name).expanduser().resolve())
    return name


def _load(name: str) -> Plugin:
    before = dict(RULES), dict(AGENTS)
    try:
        module = _import(name)
        new = {*RULES, *AGENTS} - {*before[0], *before[1]}
        # A module that was imported before it was named as a plugin has registered already.
        found = new or {m for m in {*RULES, *AGENTS} if _home(m) == module.__name__}
        _check(name, found)
    except BaseException:
        RULES.clear()
        RULES.update(before[0])
        AGENTS.clear()
        AGENTS.update(before[1])
        raise
    _LOADED[name] = Plugin(name, tuple(sorted(found)), _digest(module))
    return _LOADED[name]


def _check(name: str, found: set[str]) -> None:
    if not found:
        raise ConfigError(f"--plugin: {name}: registers nothing; it needs @rlprune.rule or @rlprune.agent")
    both = sorted(found & {*RULES} & {*AGENTS})
    if both:
        raise ConfigError(f"--plugin: {name}: the name {both[0]!r} is that of a rule and of an agent")


def _home(method: str) -> str:
    own = RULES[method].function if method in RULES else AGENTS[method].own
    return str(getattr(own, "__module__", ""))


def _import(name: str) -> ModuleType:
    """The imported module; whatever is raised inside of it becomes one line with the place."""
    if os.sep not in name and not all(part.isidentifier() for part in name.split(".")):
        raise ConfigError(f"--plugin: {name!r}: neither a .py file nor a module")
    with _current_folder_first():
        try:
            return _import_file(Path(name)) if os.sep in name else importlib.import_module(name)
        except RlpruneError as error:  # of a decorator: a taken name, a missing summary
            raise ConfigError(f"--plugin: {name}: {error}") from None
        except ModuleNotFoundError as error:
            if error.name is not None and name.startswith(error.name):
                raise ConfigError(f"--plugin: {name!r}: no such module; a file ends in .py") from None
            raise ConfigError(_failure(name, error)) from error
        except (Exception, SystemExit) as error:
            raise ConfigError(_failure(name, error)) from error


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        hint = near_miss(path.name, (p.name for p in path.parent.glob("*.py")))
        what = "is a folder, not a .py file" if path.is_dir() else f"no such file{hint}"
        raise ConfigError(what)
    # A name of its own: a plugin called json.py must not stand in for the library's.
    name = f"{_PACKAGE}_plugin_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError("cannot be imported; a file ends in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _failure(name: str, error: BaseException) -> str:
    """One line: the plugin, the line in its file where it failed, and the error."""
    frames = traceback.extract_tb(error.__traceback__)
    stem = Path(name).name if os.sep in name else name.rpartition(".")[2] + ".py"
    lines = [frame.lineno for frame in frames if Path(frame.filename).name == stem]
    line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
    place = f" line {line}:" if line else ""
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    return " ".join(f"--plugin: {name}:{place} {type(error).__name__}: {text}".split())


def _digest(module: ModuleType | None, function: Any = None) -> str:
    """SHA-256 of a module's file, of all files of its package, or, in a notebook, of the function's code."""
    file = getattr(module, "__file__", None)
    if file is None:
        code = getattr(function, "__wrapped__", function).__code__
        return hashlib.sha256(code.co_code + repr(code.co_consts).encode()).hexdigest()
    path, name = Path(file), module.__name__ if module else ""
    # How far the file lies below its top-level package, 0 for a file by itself.
    depth = name.count(".") + hasattr(module, "__path__")
    root = path.parents[depth - 1] if depth else path.parent
    content = hashlib.sha256()
    for part in sorted(root.rglob("*.py")) if depth else [path]:
        content.update(part.relative_to(root).as_posix().encode() if depth else b"")
        content.update(part.read_bytes())
    return content.hexdigest()


@contextlib.contextmanager
def _current_folder_first() -> Iterator[None]:
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # the plugin may have put the path in order itself
            sys.path.remove(here)
