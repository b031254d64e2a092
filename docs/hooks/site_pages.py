"""Pages of the site that are written when it is built, from the code: commands, settings, the API.

A hook of mkdocs (https://www.mkdocs.org/user-guide/configuration/#hooks), named in mkdocs.yml; `make docs` runs it.
"""

from __future__ import annotations

import argparse
import inspect
import os
import re
from importlib import import_module
from types import ModuleType
from typing import Any

import rlprune
from rlprune.cli.catalogue import KINDS, rows
from rlprune.cli.main import build_parser
from rlprune.config.config import settings_reference

# What a person looks for first comes first; the other packages follow in the order of their names.
_FIRST = ("rules", "importance", "envs", "agents", "tracking")


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages; see mkdocs."""
    from mkdocs.structure.files import File

    for name, text in pages().items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links that leave docs/ become plain code: the site holds the documents only."""
    return re.sub(r"\[([^\]]+)\]\((\.\./[^)]+)\)", _named, markdown)


def _named(link: re.Match[str]) -> str:
    return f"{link[1]} (`{link[2].removeprefix('../')}`)"


def pages() -> dict[str, str]:
    """{name: Markdown} of what the code says of itself."""
    os.environ["COLUMNS"] = "90"  # argparse wraps help by it
    return {"commands.md": commands(), "settings.md": settings(), "api.md": api()}


def commands() -> str:
    """Every command with its help, as `--help` prints it."""
    parts = ["# Commands\n", "What `rlprune COMMAND --help` prints.\n"]
    for action in build_parser()._actions:
        if isinstance(action, argparse._SubParsersAction):
            summaries = {choice.dest: choice.help or "" for choice in action._choices_actions}
            parts.append("| command | does |\n| --- | --- |")
            parts += [
                f"| [`rlprune {name}`](#rlprune-{name}) | {_cell(text)} |" for name, text in summaries.items()
            ]
            for name, parser in action.choices.items():
                parts.append(f"\n## rlprune {name}\n\n```text\n{parser.format_help().rstrip()}\n```")
    return "\n".join(parts) + "\n"


def settings() -> str:
    """Every setting, a table a section, and what the settings may name."""
    parts = ["# Settings\n", "Keys of a YAML file, of `--set KEY=VALUE`, and of `settings` in Python.\n"]
    section = None
    for entry in settings_reference():
        name = entry.path.rpartition(".")[0] or "top level"
        if name != section:
            section = name
            parts.append(f"\n## {name}\n\n| setting | type | default | |\n| --- | --- | --- | --- |")
        parts.append(
            f"| `{entry.path}` | `{_cell(entry.type)}` | `{_cell(str(entry.default))}` | {_cell(entry.doc)} |"
        )
    parts.append(
        "\n# Names\n\nWhat `rlprune list` knows, but for models and data sets: they depend on what is installed."
    )
    for kind in KINDS:
        if kind not in ("settings", "models", "data"):
            parts.append(f"\n## {kind}\n\n| name | |\n| --- | --- |")
            parts += [f"| `{name}` | {_cell(text)} |" for name, text in rows(kind)]
    return "\n".join(parts) + "\n"


def api() -> str:
    """Directives of mkdocstrings for every public name: those of `rlprune`, then of each public package."""
    parts = [
        "# API\n",
        "Every public name with its docstring. [python.md](python.md) shows them at work.\n",
        "## rlprune\n",
    ]
    seen: set[str] = set()
    parts += _directives("rlprune", seen)
    packages = sorted(
        (name for name in rlprune.__all__ if isinstance(getattr(rlprune, name), ModuleType)),
        key=lambda name: (_FIRST.index(name) if name in _FIRST else len(_FIRST), name),
    )
    for name in packages:
        if new := _directives(f"rlprune.{name}", seen):
            parts += [f"## rlprune.{name}\n", *new]
    return "\n".join(parts)


def _directives(package: str, seen: set[str]) -> list[str]:
    """One for each public class and function of a package, at the place that mkdocstrings finds it; each once."""
    module, found = import_module(package), []
    for name in getattr(module, "__all__", ()):
        value = getattr(module, name)
        place = getattr(value, "__module__", None) or ""
        if not (inspect.isclass(value) or inspect.isfunction(value)) or not place.startswith("rlprune"):
            continue
        where = f"{place}.{value.__qualname__}"
        if where not in seen:
            label = f"{package}.{name}"
            options = f"    options:\n      heading: {label}\n      toc_label: {name}\n"
            found.append(f"::: {where}\n{options}")
        seen.add(where)
    return found


def _cell(text: str) -> str:
    """Text in a cell of a table."""
    return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")
