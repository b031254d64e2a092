"""`rlprune push` and `rlprune optuna`: what a run has made, where other people and tools find it."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..errors import ConfigError
from .options import Subparsers, existing_folder, new_command
from .output import add_json, finish


def add_push(commands: Subparsers) -> None:
    parser = new_command(
        commands,
        "push",
        "a pruned model with a card written from its plan, to the Hugging Face hub or into a folder",
        "rlprune push runs/demo me/digits-half --private",
    )
    parser.add_argument("directory", metavar="DIR", type=Path, help="folder of a pruned model, or of a run")
    parser.add_argument(
        "repo", metavar="REPO", nargs="?", help="OWNER/NAME on the hub; a token comes from `hf auth login`"
    )
    parser.add_argument(
        "--out", metavar="FOLDER", type=Path, help="write what would be pushed here; nothing is sent"
    )
    parser.add_argument("--private", action="store_true", help="a repository that is made now is private")
    parser.add_argument("--endpoint", metavar="URL", help="another hub than https://huggingface.co")
    parser.add_argument("--base-model", metavar="ID", help="the dense model's id on the hub, for the card")
    parser.add_argument(
        "--license", metavar="NAME", help="licence for the card, as the hub spells it: apache-2.0"
    )
    add_json(parser)
    parser.set_defaults(action=_push)


def _push(args: argparse.Namespace) -> None:
    existing_folder(args.directory, "DIR")
    if (args.repo is None) == (args.out is None):
        raise ConfigError("push: give REPO, a name on the hub, or --out FOLDER, to look at it first")
    for option, given in (("--private", args.private), ("--endpoint", args.endpoint)):
        if args.out is not None and given:
            raise ConfigError(f"{option}: is for a push to the hub, and --out sends nothing")
    from ..experiments import push as pushing

    card = {"base_model": args.base_model, "license_name": args.license}
    if args.out is not None:
        where = str(pushing.write_folder(args.directory, args.out, **card))
        finish(args, f"written: {where}", written=where)
        return
    where = pushing.push(args.directory, args.repo, private=args.private, endpoint=args.endpoint, **card)
    finish(args, f"pushed: {where}", pushed=where)


def add_optuna(commands: Subparsers) -> None:
    parser = new_command(
        commands,
        "optuna",
        "the evaluations of a run as Optuna studies, for its dashboard and plots (extra `benchmark`)",
        "rlprune optuna runs/demo --storage sqlite:///studies.db",
    )
    parser.add_argument("directory", metavar="RUN", type=Path, help="folder of a run, finished or not")
    parser.add_argument(
        "--storage", metavar="URL", required=True, help="Optuna's storage: sqlite:///studies.db"
    )
    parser.add_argument("--name", metavar="NAME", help="studies are called NAME/method (the folder's name)")
    add_json(parser)
    parser.set_defaults(action=_optuna)


def _optuna(args: argparse.Namespace) -> None:
    existing_folder(args.directory, "RUN")
    from ..tracking import to_optuna

    studies = to_optuna(args.directory, args.storage, args.name)
    finish(
        args,
        f"studies: {', '.join(studies) or 'none, the log is empty'}",
        storage=args.storage,
        studies=studies,
    )
