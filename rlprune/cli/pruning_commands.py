"""`rlprune apply` and `rlprune prune`: the commands that prune without a search."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..errors import ConfigError, near_miss
from .catalogue import check_wing
from .options import (
    Subparsers,
    add_budget,
    add_config,
    add_execution,
    add_out,
    add_seed,
    check_packages,
    existing_folder,
    free_folder,
    new_command,
    read_config,
    show,
    whole_number,
)
from .output import add_json, add_quiet, say, watcher


def add_apply(commands: Subparsers) -> None:
    parser = new_command(
        commands,
        "apply",
        "a learned policy prunes another checkpoint or architecture, without a search",
        "rlprune apply runs/digits digits --set model.seed=7 --budget 30% --out pruned/",
    )
    parser.add_argument(
        "source",
        metavar="RUN_OR_POLICY",
        type=Path,
        help="folder of a run, or of its policy; or a pruned model's folder or plan.json, whose units are kept",
    )
    add_config(parser)
    _add_checkpoint(parser)
    add_budget(parser)
    parser.add_argument(
        "--builds",
        metavar="N",
        type=whole_number(0),
        help="models that a policy of several checkpoints builds to compare plans without labels "
        "(8 a group; 0 or 1: its network alone)",
    )
    parser.add_argument(
        "--refine", metavar="N", type=whole_number(0), default=0, help="then spend N evaluations"
    )
    add_execution(parser)
    add_out(parser, "pruned/NAME of the config")
    add_seed(parser)
    add_quiet(parser)
    add_json(parser)
    parser.set_defaults(action=_apply)


def _apply(args: argparse.Namespace) -> None:
    config = read_config(args)
    if not args.source.is_file():
        existing_folder(args.source, "RUN_OR_POLICY")
    _check_checkpoint(args)
    out = _out(args, config.name)
    from ..experiments import replay

    if replay.is_plan(args.source):
        for option, given in (
            ("--budget", args.budget is not None),
            ("--builds", args.builds is not None),
            ("--refine", args.refine > 0),
        ):
            if given:
                raise ConfigError(f"{option}: not for a plan, which fixes the units; {args.source} is one")
        callback = watcher(args)
        table = replay.apply_plan(args.source, config, checkpoint=args.checkpoint, out=out, callback=callback)
        show(args, table, out)
        return
    from ..experiments import apply as deploy

    applied = deploy.apply(
        args.source,
        config,
        checkpoint=args.checkpoint,
        refine=args.refine,
        builds=args.builds,
        callback=watcher(args),
    )
    applied.save(out)
    say(args, str(applied))
    show(args, applied.sizes(out), out)


def _out(args: argparse.Namespace, name: str) -> Path:
    """The folder to write; one with other people's files in it is refused before anything is trained."""
    from ..artifacts.documents import PLAN_FILE
    from ..utils.files import refuse_foreign

    out: Path = args.out or free_folder(name, "pruned")
    refuse_foreign(out, PLAN_FILE)
    return out


def _add_checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint",
        metavar="FILE",
        type=Path,
        help="weights of the model to prune; or a pruned model's folder, to prune that further",
    )


def _check_checkpoint(args: argparse.Namespace) -> None:
    given = args.checkpoint
    if given is None or given.is_file():
        return
    from ..workloads.adapter import holds_pruned_model

    if not holds_pruned_model(given):
        what = "is a folder, but of no pruned model" if given.is_dir() else "no such file"
        raise ConfigError(f"--checkpoint: {given}: {what}")


def add_prune(commands: Subparsers) -> None:
    parser = new_command(
        commands,
        "prune",
        "a heuristic rule prunes the model, or all blocks of a language model alike",
        "rlprune prune digits --rule lamp --budget 50%",
    )
    add_config(parser)
    parser.add_argument("--rule", metavar="NAME", help="see `rlprune list rules`")
    _add_checkpoint(parser)
    parser.add_argument(
        "--stages", metavar="N", type=whole_number(1), help="cut in N rounds, the rule asked in each (1)"
    )
    parser.add_argument(
        "--steps",
        metavar="N",
        type=whole_number(0),
        help="optimizer steps after each round (finish.steps / N; none for a single round)",
    )
    parser.add_argument(
        "--same-widths",
        dest="equal_widths",
        action="store_true",
        help="instead of a rule: the same number of neurons in all blocks, for `export --to hf`",
    )
    parser.add_argument(
        "--drop-blocks",
        metavar="N",
        type=whole_number(0),
        help="with --same-widths: the N blocks with the least influence go (0; needs prune.drop=true)",
    )
    add_budget(parser)
    add_out(parser, "pruned/NAME of the config")
    add_seed(parser)
    add_quiet(parser)
    add_json(parser)
    parser.set_defaults(action=_prune)


def _prune(args: argparse.Namespace) -> None:
    if args.equal_widths:
        _prune_equal_widths(args)
        return
    if args.rule is None:
        raise ConfigError("one of these options is required: --rule NAME, --same-widths")
    if args.drop_blocks is not None:
        raise ConfigError("--drop-blocks: only with --same-widths; rules choose themselves what goes whole")
    config = read_config(args)
    _check_checkpoint(args)
    from ..experiments import apply as deploy
    from ..rules import RULES

    if args.rule not in RULES:
        hint = near_miss(args.rule, RULES)
        raise ConfigError(f"--rule: unknown rule {args.rule!r}{hint}; allowed: {', '.join(RULES)}")
    check_wing(config, [args.rule])
    out = _out(args, config.name)
    stages = args.stages or 1
    if stages == 1 and args.steps is None:
        table = deploy.prune_rule(
            config, args.rule, config.budget.target, out, args.checkpoint, callback=watcher(args)
        )
        show(args, table, out)
        return
    steps = config.finish.steps // stages if args.steps is None else args.steps
    check_packages(config, steps)
    target, checkpoint = config.budget.target, args.checkpoint
    table = deploy.prune_stages(
        config, args.rule, target, stages, steps, out, checkpoint, callback=watcher(args)
    )
    show(args, table, out)


def _prune_equal_widths(args: argparse.Namespace) -> None:
    for option in ("rule", "stages", "steps"):
        if getattr(args, option) is not None:
            raise ConfigError(f"--{option}: not together with --same-widths, which is a way of its own")
    config = read_config(args)
    from ..experiments.build import expected_adapter

    adapter = expected_adapter(config)
    if adapter is not None and not adapter.equal_widths:
        raise ConfigError(f"--same-widths: is for language models only; {config.model.name!r} is none")
    dropped = args.drop_blocks or 0
    if dropped and not config.prune.drop:
        raise ConfigError("--drop-blocks: blocks may not be dropped; give --set prune.drop=true")
    from ..experiments import apply as deploy

    out = _out(args, config.name)
    table = deploy.prune_equal_widths(
        config, config.budget.target, dropped, out, args.checkpoint, callback=watcher(args)
    )
    show(args, table, out)
