"""The command line: reads arguments, calls the code that does the work, turns errors into one line.

Exit codes: 0 done, 2 wrong input or settings, 1 failed run, 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import re
import signal
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from .. import __version__
from ..errors import RlpruneError, RunError, near_miss
from ..utils.exits import own_exits_named
from ..utils.launched import process_count
from ..utils.progress import shown_as
from ..utils.registry import installed
from .commands import COMMANDS
from .options import add_common

OK, FAILED, WRONG_INPUT, INTERRUPTED = 0, 1, 2, 130
LONGEST = 1000
"""Letters of an error's line: what a file says in thousands of them is not repeated."""
# A disk without room or without permission is the user's to mend, like a wrong path.
_USERS_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)


class UsageError(RlpruneError):
    """The command line itself is wrong."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; nothing is raised but SystemExit of --help and --version."""
    words = _separate_sets(sys.argv[1:] if argv is None else list(argv))
    debug = "--debug" in words
    resumable: list[Path] = []
    try:
        with warnings.catch_warnings(), _terminated_as_interrupted():
            _show_warnings(debug)
            parser = build_parser()
            args = parser.parse_args(words)
            args.resumable, args.parser, args.summary = resumable, parser, None
            _refuse_several_processes(args.command)
            if args.threads is not None:
                import torch

                torch.set_num_threads(args.threads)
            if getattr(args, "plugins", None) or installed():
                from .. import plugins

                with own_exits_named():
                    plugins.load(getattr(args, "plugins", ()))
            as_json = getattr(args, "json", False)
            # What a command prints for people goes the way of the progress, so that a program reads JSON alone.
            aside = contextlib.redirect_stdout(sys.stderr if as_json else sys.stdout)
            with own_exits_named(), shown_as(args.progress), aside:
                args.action(args)
            if as_json:
                print(json.dumps(args.summary, indent=1))
            sys.stdout.flush()
        return OK
    except BrokenPipeError:
        # The reader (head, less) has gone: no message, and no second one from the interpreter's last flush.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except KeyboardInterrupt:
        note = (
            f"; state saved in {resumable[0]}, continue with --resume --out {resumable[0]}"
            if resumable
            else ""
        )
        return _stop(INTERRUPTED, f"rlprune: interrupted{note}", debug)
    except RlpruneError as error:
        code = FAILED if isinstance(error, RunError) else WRONG_INPUT
        return _stop(code, f"rlprune: error: {error}", debug)
    except OSError as error:
        code = WRONG_INPUT if error.errno in _USERS_DISK else FAILED
        place = f"{error.filename}: " if error.filename else ""
        return _stop(code, f"rlprune: error: {place}{error.strerror or error}", debug)
    except MemoryError:
        return _stop(FAILED, "rlprune: error: out of memory", debug)
    except Exception as error:
        text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        return _stop(FAILED, f"rlprune: error: {text} (--debug shows where)", debug)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; each sub-parser holds the function that runs it as `action`."""
    parser = _Parser(
        prog="rlprune",
        description="Learn how much to prune from each layer of a network, and prune it.",
        epilog="example: rlprune demo",
    )
    parser.add_argument("--version", action="version", version=f"rlprune {__version__}")
    add_common(parser, None)
    commands = parser.add_subparsers(metavar="COMMAND", dest="command", parser_class=_Parser)
    for add in COMMANDS:
        add(commands)
    parser.set_defaults(action=_no_command)
    return parser


class _Parser(argparse.ArgumentParser):
    """Errors are raised, not printed over several lines; misspelt commands and options get their near miss."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        chosen = re.search(r"invalid choice: '([^']*)'", message)
        unknown = re.search(r"unrecognized arguments: (\S+)", message)
        if chosen:
            name = message.partition(":")[0].removeprefix("argument ").lower()
            allowed = self._allowed(message)
            hint = near_miss(chosen[1], allowed)
            message = f"{name} {chosen[1]!r}: unknown{hint}; allowed: {', '.join(allowed)}"
        elif unknown and unknown[1].startswith("-"):
            option, known = unknown[1].partition("=")[0], _all_options(self)
            message += ", which another command has" if option in known else near_miss(option, known)
        raise UsageError(f"{message}; see {self.prog} --help")

    def _allowed(self, message: str) -> list[str]:
        """The choices of the argument that the message is about."""
        for action in self._actions:
            if action.choices and message.startswith(f"argument {argparse._get_action_name(action)}:"):
                return [str(choice) for choice in action.choices]
        return []


def _all_options(parser: argparse.ArgumentParser) -> list[str]:
    names: list[str] = []
    for action in parser._actions:
        names += action.option_strings
        if isinstance(action, argparse._SubParsersAction):
            for sub in action.choices.values():
                names += _all_options(sub)
    return names


def _no_command(args: argparse.Namespace) -> None:
    raise UsageError("a command is needed, such as `rlprune demo`; see rlprune --help")


def _separate_sets(words: Sequence[str]) -> list[str]:
    """`--set a=1 b=2` as `--set a=1 --set b=2`, so that a CONFIG may stand anywhere."""
    separated: list[str] = []
    after_set = False
    for word in words:
        if after_set and "=" in word and not word.startswith("-") and separated[-1] != "--set":
            separated.append("--set")
        separated.append(word)
        after_set = word == "--set" or (after_set and "=" in word and not word.startswith("-"))
    return separated


def _show_warnings(debug: bool) -> None:
    """Our warnings in one line each; those of the libraries only with --debug."""

    def show(
        message: Warning | str, category: type[Warning], filename: str, *_: object, **__: object
    ) -> None:
        ours = category.__module__.partition(".")[0] == __name__.partition(".")[0]
        if ours or debug:
            print(f"rlprune: warning: {' '.join(str(message).split())}", file=sys.stderr)

    warnings.showwarning = show


def _refuse_several_processes(command: str | None) -> None:
    """Under a launcher every process would run the whole command, into the same folder."""
    count = process_count()
    if command is not None and count > 1:
        raise UsageError(
            f"rlprune {command} runs in one process, but a launcher started {count}; only the fine-tune of a pruned "
            "model runs in several: accelerate launch -m rlprune.experiments.tune RUN/pruned CONFIG --out OUT"
        )


class _terminated_as_interrupted:
    """While active, SIGTERM ends a run as Ctrl-C does: state saved, exit code 130."""

    def __enter__(self) -> None:
        self._old: Any = None
        with contextlib.suppress(ValueError):  # outside of the main thread signals are not ours
            self._old = signal.signal(signal.SIGTERM, self._interrupt)

    def __exit__(self, *_: object) -> None:
        if self._old is not None:
            signal.signal(signal.SIGTERM, self._old)

    @staticmethod
    def _interrupt(*_: object) -> NoReturn:
        raise KeyboardInterrupt


def _stop(code: int, text: str, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    line = " ".join(text.split())
    print(line if len(line) <= LONGEST else f"{line[:LONGEST]}...", file=sys.stderr)
    return code
