"""What the commands of `rlprune` share: their common options, how these are read, and what is printed."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

from ..config.config import Config, load_config
from ..errors import ConfigError
from ..utils.progress import SHOWN
from .catalogue import check_names, check_wing
from .output import finish, say

_FIELDS = {
    "budget": "budget.target",
    "seed": "seed",
    "threads": "threads",
    "engine": "execution.engine",
    "workers": "execution.workers",
    "address": "execution.address",
}
"""Options that stand for a setting."""
# argparse has no public name for what `add_subparsers` returns.
Subparsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def new_command(commands: Subparsers, name: str, summary: str, example: str) -> argparse.ArgumentParser:
    """The sub-parser of a command, with an example at the end of its help."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=summary, description=summary[0].upper() + summary[1:] + ".", epilog=f"example: {example}"
    )
    add_common(parser, argparse.SUPPRESS)
    return parser


def add_common(parser: argparse.ArgumentParser, default: str | None) -> None:
    """Options that may stand before or after the command; a sub-parser must not overwrite what came before."""
    debug_default = False if default is None else default
    parser.add_argument("--debug", action="store_true", default=debug_default, help="show tracebacks")
    parser.add_argument(
        "--threads", metavar="N", type=whole_number(1), default=default, help="CPU threads of torch"
    )
    parser.add_argument(
        "--progress",
        choices=SHOWN,
        default=default,
        help="how progress is shown on standard error: auto is bars on a terminal, lines elsewhere",
    )


def add_config(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """CONFIG and --set."""
    parser.add_argument(
        "config",
        metavar="CONFIG",
        nargs=None if required else "?",
        help="a YAML file, or the name of a shipped one (`rlprune list configs`)",
    )
    parser.add_argument(
        "--set",
        metavar="KEY=VALUE",
        dest="overrides",
        action="append",
        default=[],
        help="override a setting, as in search.evaluations=200; several may follow (`rlprune list settings`)",
    )
    add_plugin(parser)


def add_plugin(parser: argparse.ArgumentParser) -> None:
    """--plugin; it runs code, so only the command line may name one, no file."""
    parser.add_argument(
        "--plugin",
        metavar="FILE.py",
        dest="plugins",
        action="append",
        default=[],
        help="a Python file or module that registers rules, agents or else of yours; may be repeated",
    )


def add_out(parser: argparse.ArgumentParser, default: str) -> None:
    """--out; ``default`` says in the help what is written without it."""
    parser.add_argument(
        "--out", metavar="DIR", type=Path, help=f"folder to write ({default}, numbered if taken)"
    )


def add_force(parser: argparse.ArgumentParser) -> None:
    """--force."""
    parser.add_argument("--force", action="store_true", help="replace a file that rlprune did not write")


def add_seed(parser: argparse.ArgumentParser) -> None:
    """--seed."""
    parser.add_argument("--seed", metavar="N", type=whole_number(0), help="seed of all that is random")


def add_budget(parser: argparse.ArgumentParser) -> None:
    """--budget."""
    parser.add_argument("--budget", metavar="B", help='what may be left: 0.5, "50%%" or "150M"')


def add_execution(parser: argparse.ArgumentParser) -> None:
    """--engine, --workers and --address."""
    parser.add_argument(
        "--engine", metavar="NAME", help="where to compute: serial (default), processes, or ray (a cluster)"
    )
    parser.add_argument(
        "--workers",
        metavar="N",
        type=whole_number(1),
        help="processes, or actors of the cluster (one a core)",
    )
    parser.add_argument(
        "--address", metavar="A", help="ray: the cluster's, as auto or host:port (a local one is started)"
    )


def read_config(args: argparse.Namespace) -> Config:
    """The settings of a command: the file or shipped name, then --set, then the options of their own."""
    overrides = list(args.overrides)
    for option, field in _FIELDS.items():
        value = getattr(args, option, None)
        if value is not None:
            overrides.append(f"{field}={value}")
    config = load_config(args.config, overrides)
    check_names(config)
    methods = getattr(args, "methods", None)
    check_wing(config, methods or ())
    from ..experiments.usage import check_usage

    check_usage(config, _what_runs(args), args.overrides, methods=methods)
    return config


def _what_runs(args: argparse.Namespace) -> str:
    """The command as `experiments.usage.check_usage` knows it."""
    command: str = args.command
    if command == "apply" and args.refine:
        return "apply --refine"
    if command == "prune" and args.steps is not None:
        return "prune --steps"
    if command == "prune" and (args.stages or 1) > 1:
        return "prune --stages"
    return command


def check_packages(config: Config, steps: int) -> None:
    """A package that only the final fine-tune needs is missed before the search, not after it."""
    from ..experiments.build import expected_adapter

    adapter = expected_adapter(config) if steps else None
    if adapter is not None and (missing := adapter.missing_package(config.finish)):
        raise ConfigError(missing)


def whole_number(low: int) -> Callable[[str], int]:
    """A converter of options: a whole number of ``low`` and more."""

    def convert(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = low - 1
        if number < low:
            raise argparse.ArgumentTypeError(f"must be a whole number of {low} and more, got {text!r}")
        return number

    return convert


def name_list(text: str) -> list[str]:
    """A converter of options: different names with commas between."""
    names = [name.strip() for name in text.split(",")]
    if not all(names) or len(set(names)) != len(names):
        raise argparse.ArgumentTypeError(f"must be different names with commas between, got {text!r}")
    return names


def free_folder(name: str, parent: str = "runs") -> Path:
    """PARENT/NAME, or the first of PARENT/NAME-2, -3, ... that does not exist yet."""
    folder, number = Path(parent) / name, 1
    while folder.exists():
        number += 1
        folder = Path(parent) / f"{name}-{number}"
    return folder


def existing_folder(path: Path, what: str) -> None:
    """ConfigError naming the option ``what`` unless the folder is there."""
    if not path.is_dir():
        raise ConfigError(f"{what}: {path}: no such folder")


def show(args: argparse.Namespace, result: object, out: Path) -> None:
    """What a command returned in words, if anything, and where its files are."""
    if isinstance(result, str) and result:
        say(args, result)
    finish(args, f"written: {out}", written=out)
