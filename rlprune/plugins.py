"""Rules, agents and all else that is registered from outside of the package.

A plugin is Python that registers with ``@rlprune.rule``, ``@rlprune.agent`` and so on when it is imported. Only
``--plugin``, :func:`load` and the entry points of installed packages (group ``rlprune.plugins``) name one; no config,
policy or run on disk does, since a plugin is code that runs.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from .agents import AGENTS
from .config.config import Config
from .config.names import COST_METRICS, DATA_SETS, RECOVERY_STEPS, SCORE_KINDS
from .errors import ConfigError, RlpruneError, near_miss
from .execution import in_every_worker
from .importance.importance import IMPORTANCES
from .language import families
from .rules import RULES
from .utils import registry
from .utils.named_objects import named_object
from .utils.registry import Registry, is_foreign
from .workloads.adapter import adapters

_PACKAGE = __name__.partition(".")[0]
_METHODS = (RULES.kind, AGENTS.kind)
_FAMILY = "language family"


@dataclass(frozen=True)
class Plugin:
    """A loaded plugin: what was typed, what it registered, and a hash of the source that did.

    ``methods`` are its rules and agents, ``others`` the rest, as "kind name".
    """

    name: str
    methods: tuple[str, ...]
    digest: str
    others: tuple[str, ...] = ()


_LOADED: dict[str, Plugin] = {}
_read: set[metadata.EntryPoint] = set()


def load(names: Sequence[str] = ()) -> list[Plugin]:
    """Import plugins, so that what they register can be named like all else; loaded ones stay as they are.

    Those of installed packages are loaded before them.

    Args:
        names: paths of ``.py`` files, or importable modules (the current folder is searched too).

    Raises:
        ConfigError: nothing of that name, an error inside of it, nothing registered, or a name that is taken;
            then nothing of that plugin stays registered.
    """
    load_installed()
    paths = (_absolute(name) for name in names)
    return [_LOADED.get(name) or _load(name, "--plugin") for name in paths]


def load_installed() -> None:
    """Load the plugins of installed packages (entry points of the group ``rlprune.plugins``), each once.

    Raises:
        ConfigError: as :func:`load`, naming the distribution.
    """
    for point in registry.installed():
        if point in _read:
            continue
        _read.add(point)  # before it is imported: it may ask for names itself
        if point.module not in _LOADED:
            owner = point.dist.name if point.dist is not None else "an unknown distribution"
            try:
                _load(point.module, f"the plugin {point.name!r} of {owner}")
            except BaseException:
                _read.discard(point)
                raise


def loaded() -> list[str]:
    """Names for :func:`load` that give another process the plugins of this one, in the same order."""
    load_installed()
    return list(_LOADED)


def _preparation() -> Callable[[], object]:
    return partial(load, loaded())


in_every_worker(_preparation)


def fingerprint(method: str) -> str | None:
    """Hash of the source that a rule or an agent from outside comes from; None for a shipped or unknown one.

    Code that keeps results of a method has to keep them under this as well: its name says nothing of its code.
    That of a plugin is what was loaded, whatever happened to its file since.
    """
    load_installed()
    return _source_digest(RULES if method in RULES else AGENTS, method)


def fingerprint_of_settings(config: Config) -> dict[str, str]:
    """{kind and name: hash of its source} of all else from outside that the settings name, and of all families."""
    named: list[tuple[Registry[Any], str]] = [
        (IMPORTANCES, config.prune.importance),
        *((RECOVERY_STEPS, step) for step in config.recovery.steps),
        (COST_METRICS, config.budget.metric),
        (SCORE_KINDS, config.score.kind),
        (DATA_SETS, config.data.name),
    ]
    found = {f"{kind.kind} {name}": _source_digest(kind, name) for kind, name in named}
    for field in ("transform", "train_transform"):
        if (given := getattr(config.data, field)) is not None:
            function = named_object(given, f"data.{field}")
            found[f"data.{field} {given}"] = _digest(sys.modules[given.partition(":")[0]], function)
    for own in families.OTHERS:  # a family is nothing but data
        found[f"{_FAMILY} {own}"] = hashlib.sha256(repr(families.FAMILIES[own]).encode()).hexdigest()
    return {label: digest for label, digest in found.items() if digest is not None}


def _source_digest(kind: Registry[Any], name: str) -> str | None:
    """Hash of the source that registered a name; None for a shipped or unknown one."""
    function = kind.source(name)
    if function is None or not is_foreign(function):
        return None
    found = _plugin_digest(name if kind.kind in _METHODS else f"{kind.kind} {name}")
    return found or _digest(sys.modules.get(function.__module__), function)


def _plugin_digest(registered: str) -> str | None:
    for plugin in _LOADED.values():
        if registered in (*plugin.methods, *plugin.others):
            return plugin.digest
    return None


def _absolute(name: str) -> str:
    """A file as its real path, so that it is one plugin however it is named; a module as it is."""
    if name.endswith(".py") or os.sep in name:
        return str(Path(name).expanduser().resolve())
    return name


def _load(name: str, who: str) -> Plugin:
    """Import one plugin; ``who`` opens the error for what is wrong with it."""
    adapters()  # the wings register importances of their own
    before = _foreign()
    try:
        module = _import(name, who)
        every = _foreign()
        # A module that was imported before it was named as a plugin has registered already.
        found = set(every) - set(before) or {key for key in every if _is_of(every[key], module.__name__)}
        _check(f"{who}: {name}", {own for _, own in found})
    except BaseException:
        _forget(set(_foreign()) - set(before))
        raise
    methods = sorted(own for kind, own in found if kind in _METHODS)
    others = sorted(f"{kind} {own}" for kind, own in found if kind not in _METHODS)
    _LOADED[name] = Plugin(name, tuple(methods), _digest(module), tuple(others))
    return _LOADED[name]


def _foreign() -> dict[tuple[str, str], str]:
    """{(kind, name): module that registered it} of everything that does not come with rlprune."""
    found = {
        (kind.kind, own): str(kind.source(own).__module__)
        for kind in registry.registries()
        for own in kind.foreign()
    }
    return found | {(_FAMILY, own): module for own, module in families.OTHERS.items()}


def _forget(registered: set[tuple[str, str]]) -> None:
    kinds = {kind.kind: kind for kind in registry.registries()}
    for kind, own in registered:
        if kind == _FAMILY:
            families.unregister(own)
        else:
            del kinds[kind][own]


def _check(where: str, found: set[str]) -> None:
    if not found:
        raise ConfigError(
            f"{where}: registers nothing; it needs @rlprune.rule or @rlprune.agent, or another of "
            "docs/write-your-own.md"
        )
    both = sorted(found & {*RULES} & {*AGENTS})
    if both:
        raise ConfigError(f"{where}: the name {both[0]!r} is that of a rule and of an agent")


def _is_of(home: str, module: str) -> bool:
    """Whether a module is another, or lies below it where that is a package."""
    return f"{home}.".startswith(f"{module}.")


def _import(name: str, who: str) -> ModuleType:
    """The imported module; whatever is raised inside of it becomes one line with the place."""
    if os.sep not in name and not all(part.isidentifier() for part in name.split(".")):
        raise ConfigError(f"{who}: {name!r}: neither a .py file nor a module")
    typed = who == "--plugin"  # the current folder must not stand in for what is installed
    with _current_folder_first() if typed else contextlib.nullcontext():
        try:
            return _import_file(Path(name)) if os.sep in name else importlib.import_module(name)
        except RlpruneError as error:  # of a decorator: a taken name, a missing summary
            raise ConfigError(f"{who}: {name}: {error}") from None
        except ModuleNotFoundError as error:
            if error.name is not None and name.startswith(error.name):
                raise ConfigError(f"{who}: {name!r}: no such module; a file ends in .py") from None
            raise ConfigError(_failure(name, who, error)) from error
        except (Exception, SystemExit) as error:
            raise ConfigError(_failure(name, who, error)) from error


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


def _failure(name: str, who: str, error: BaseException) -> str:
    """One line: the plugin, the line in its file where it failed, and the error."""
    frames = traceback.extract_tb(error.__traceback__)
    stem = Path(name).name if os.sep in name else name.rpartition(".")[2] + ".py"
    lines = [frame.lineno for frame in frames if Path(frame.filename).name == stem]
    line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
    place = f" line {line}:" if line else ""
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    return " ".join(f"{who}: {name}:{place} {type(error).__name__}: {text}".split())


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
