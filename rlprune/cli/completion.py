"""Shell completion: a script that shtab (https://docs.iterative.ai/shtab) makes from the parser.

The script is made once and knows all commands and options; a press of TAB starts no Python.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

SHELLS = ("bash", "zsh", "fish", "tcsh", "powershell")


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """The script for a shell, to be written where that shell looks for completions."""
    import shtab

    for action in _actions(parser):
        if action.metavar in ("DIR", "RUN", "RUN_OR_POLICY"):
            action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
        elif action.metavar in ("CONFIG", "FILE", "PATH", "FILE.py", "FILE,FILE"):
            action.complete = shtab.FILE  # type: ignore[attr-defined]
    return str(shtab.complete(parser, shell=shell))


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for sub in action.choices.values():
                yield from _actions(sub)
