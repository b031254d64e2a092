"""The commands of `rlprune`: their options, and for each the one call that does its work.

The code that works is imported when a command runs, so that `--help` and wrong settings answer at once.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .catalogue import KINDS, check_side, rows
from .errors import ConfigError, near_miss
from .options import (
    add_budget,
    add_config,
    add_out,
    add_plugin,
    add_seed,
    check_packages,
    existing_folder,
    free_folder,
    name_list,
    new_command,
    print_rows,
    read_config,
    show,
    show_run,
    whole_number,
)


def _add_demo(commands: Any) -> None:
    parser = new_command(
        commands,
        "demo",
        "the whole path on handwritten digits, in a few minutes",
        "rlprune demo --out runs/demo",
    )
    add_out(parser, "runs/demo")
    add_seed(parser)
    parser.set_defaults(action=_demo)


def _demo(args: argparse.Namespace) -> None:
    from . import run

    out = args.out or free_folder("demo")
    args.resumable.append(out)
    run.demo(out, args.seed or 0)
    show_run(out)


def _add_inspect(commands: Any) -> None:
    parser = new_command(
        commands,
        "inspect",
        "groups, widths, costs, protected parts, feasible budgets",
        "rlprune inspect digits",
    )
    add_config(parser)
    parser.add_argument("--resources", action="store_true", help="also print seconds and peak memory")
    parser.set_defaults(action=_inspect)


def _inspect(args: argparse.Namespace) -> None:
    started = time.perf_counter()
    config = read_config(args)
    from . import inspection

    print(inspection.inspect(config))
    if args.resources:
        print(inspection.resources(time.perf_counter() - started))


def _add_train(commands: Any) -> None:
    parser = new_command(
        commands,
        "train",
        "learn the distribution, pick the best plan, finish it, save everything",
        "rlprune train digits --set budget.target=30% search.evaluations=200 --out runs/digits30",
    )
    add_config(parser)
    add_out(parser, "runs/NAME of the config")
    parser.add_argument(
        "--resume", action="store_true", help="continue the run in --out where it was stopped"
    )
    add_seed(parser)
    parser.set_defaults(action=_train)


def _train(args: argparse.Namespace) -> None:
    config = read_config(args)
    out = args.out or (Path("runs") / config.name if args.resume else free_folder(config.name))
    if args.resume and not out.is_dir():
        raise ConfigError(f"--resume: no run in {out}; give its folder with --out")
    check_packages(config, config.finish.steps)
    from . import run

    args.resumable.append(out)
    run.train(config, out, resume=args.resume, progress=True)
    show_run(out)


def _add_apply(commands: Any) -> None:
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
    parser.add_argument("--checkpoint", metavar="FILE", type=Path, help="weights of the model to prune")
    add_budget(parser)
    parser.add_argument(
        "--builds",
        metavar="N",
        type=whole_number(0),
        help="models that a policy of several checkpoints builds to compare plans without labels (default: 8 a group)",
    )
    parser.add_argument(
        "--refine", metavar="N", type=whole_number(0), default=0, help="then spend N evaluations"
    )
    add_out(parser, "pruned/NAME of the config")
    add_seed(parser)
    parser.set_defaults(action=_apply)


def _apply(args: argparse.Namespace) -> None:
    config = read_config(args)
    if not args.source.is_file():
        existing_folder(args.source, "RUN_OR_POLICY")
    if args.checkpoint is not None and not args.checkpoint.is_file():
        raise ConfigError(f"--checkpoint: {args.checkpoint}: no such file")
    out = args.out or free_folder(config.name, "pruned")
    from . import replay

    if replay.is_plan(args.source):
        for option, given in (
            ("--budget", args.budget is not None),
            ("--builds", args.builds is not None),
            ("--refine", args.refine > 0),
        ):
            if given:
                raise ConfigError(f"{option}: not for a plan, which fixes the units; {args.source} is one")
        show(replay.apply_plan(args.source, config, checkpoint=args.checkpoint, out=out), out)
        return
    from . import deploy

    target = config.budget.target
    result = deploy.apply(
        args.source,
        config,
        checkpoint=args.checkpoint,
        budget=target,
        refine=args.refine,
        out=out,
        builds=args.builds,
    )
    show(result, out)


def _add_prune(commands: Any) -> None:
    parser = new_command(
        commands,
        "prune",
        "a heuristic rule prunes the model, or all blocks of a language model alike",
        "rlprune prune digits --rule lamp --budget 50%",
    )
    add_config(parser)
    parser.add_argument("--rule", metavar="NAME", help="see `rlprune list rules`")
    parser.add_argument(
        "--stages", metavar="N", type=whole_number(1), help="cut in N rounds, the rule asked in each (1)"
    )
    parser.add_argument(
        "--steps",
        metavar="N",
        type=whole_number(0),
        help="optimizer steps after each round (finish.steps / N)",
    )
    parser.add_argument(
        "--same-widths",
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
    parser.set_defaults(action=_prune)


def _prune(args: argparse.Namespace) -> None:
    if args.same_widths:
        _prune_same_widths(args)
        return
    if args.rule is None:
        raise ConfigError("one of these options is required: --rule NAME, --same-widths")
    if args.drop_blocks is not None:
        raise ConfigError("--drop-blocks: only with --same-widths; rules choose themselves what goes whole")
    config = read_config(args)
    from . import deploy
    from .rules import RULES

    if args.rule not in RULES:
        hint = near_miss(args.rule, RULES)
        raise ConfigError(f"--rule: unknown rule {args.rule!r}{hint}; allowed: {', '.join(RULES)}")
    check_side(config, [args.rule])
    out = args.out or free_folder(config.name, "pruned")
    stages = args.stages or 1
    if stages == 1 and args.steps is None:
        show(deploy.prune_rule(config, args.rule, config.budget.target, out), out)
        return
    steps = config.finish.steps // stages if args.steps is None else args.steps
    check_packages(config, steps)
    show(deploy.prune_stages(config, args.rule, config.budget.target, stages, steps, out), out)


def _prune_same_widths(args: argparse.Namespace) -> None:
    for option in ("rule", "stages", "steps"):
        if getattr(args, option) is not None:
            raise ConfigError(f"--{option}: not together with --same-widths, which is a way of its own")
    config = read_config(args)
    from .workloads.causal import is_causal

    if config.workload is None and not is_causal(config.model.name):
        raise ConfigError(f"--same-widths: is for language models only; {config.model.name!r} is none")
    dropped = args.drop_blocks or 0
    if dropped and not config.prune.drop:
        raise ConfigError("--drop-blocks: blocks may not be dropped; give --set prune.drop=true")
    from . import deploy

    out = args.out or free_folder(config.name, "pruned")
    show(deploy.prune_same_widths(config, config.budget.target, dropped, out), out)


def _add_benchmark(commands: Any) -> None:
    parser = new_command(
        commands,
        "benchmark",
        "all methods with the same number of evaluations: table, plots, results.json",
        "rlprune benchmark digits --methods ppo,random,lamp --budgets 0.5 0.3 --jobs 2",
    )
    add_config(parser)
    number = whole_number(1)
    arguments: dict[str, dict[str, Any]] = {
        "--methods": {"metavar": "a,b,c", "type": name_list, "help": "rules and agents (all that can run)"},
        "--seeds": {"metavar": "N", "type": number, "default": 5, "help": "seeds of each method (5)"},
        "--checkpoints": {"metavar": "N", "type": number, "default": 1, "help": "dense models, for seeds in turn (1)"},
        "--evaluations": {"metavar": "N", "type": number, "help": "instead of search.evaluations"},
        "--budgets": {"metavar": "B", "nargs": "+", "default": [], "help": "several, instead of budget.target"},
        "--jobs": {"metavar": "N", "type": number, "default": 1, "help": "processes, each of --threads threads (1)"},
        "--out": {"metavar": "DIR", "type": Path, "help": "folder (runs/NAME-benchmark); what it holds is reused"},
    }  # fmt: skip
    for option, options in arguments.items():
        parser.add_argument(option, **options)
    add_seed(parser)
    parser.set_defaults(action=_benchmark)


def _benchmark(args: argparse.Namespace) -> None:
    config = read_config(args)
    check_packages(config, config.finish.steps)
    check_side(config, args.methods or ())
    from . import benchmark

    out = args.out or Path("runs") / f"{config.name}-benchmark"
    evaluations = args.evaluations or config.search.evaluations
    more = {"budgets": args.budgets, "jobs": args.jobs, "checkpoints": args.checkpoints}
    benchmark.run(config, args.methods, args.seeds, evaluations, out, **more)
    print((out / "benchmark.md").read_text(encoding="utf-8"))
    print(f"report: {out / 'report.html'}")


def _add_fidelity(commands: Any) -> None:
    parser = new_command(
        commands,
        "fidelity",
        "does the reward predict the quality after the final fine-tune?",
        "rlprune fidelity digits --candidates 20 --out runs/fidelity",
    )
    add_config(parser)
    parser.add_argument(
        "--candidates", metavar="N", type=whole_number(4), default=14, help="plans compared (14)"
    )
    parser.add_argument(
        "--steps",
        metavar="N",
        type=whole_number(0),
        help="gradient steps of the dearest recovery (20; none for language models)",
    )
    add_out(parser, "runs/NAME-fidelity")
    add_seed(parser)
    parser.set_defaults(action=_fidelity)


def _fidelity(args: argparse.Namespace) -> None:
    config = read_config(args)
    check_packages(config, config.finish.steps)
    from . import fidelity

    out = args.out or free_folder(f"{config.name}-fidelity")
    show(fidelity.run(config, args.candidates, out, args.steps), out)


def _add_evaluate(commands: Any) -> None:
    parser = new_command(
        commands,
        "evaluate",
        "metric, costs and measured latency of a saved pruned model beside its dense base",
        "rlprune evaluate runs/demo/pruned digits",
    )
    parser.add_argument("directory", metavar="DIR", type=Path, help="folder of a pruned model")
    add_config(parser, required=False)
    parser.add_argument(
        "--tasks",
        metavar="FILE,FILE",
        type=name_list,
        default=[],
        help="zero-shot accuracy of a language model on these multiple-choice files (extra `zeroshot`)",
    )
    parser.add_argument(
        "--limit", metavar="N", type=whole_number(1), help="first N questions of each file only"
    )
    parser.set_defaults(action=_evaluate)


def _evaluate(args: argparse.Namespace) -> None:
    existing_folder(args.directory, "DIR")
    if args.limit is not None and not args.tasks:
        raise ConfigError("--limit: limits the questions of --tasks, which is not given")
    config = read_config(args) if args.config is not None else None
    from . import inspection

    print(inspection.evaluate(args.directory, config, [Path(t) for t in args.tasks], args.limit))


def _add_export(commands: Any) -> None:
    parser = new_command(
        commands,
        "export",
        "other formats, checked against the PyTorch outputs",
        "rlprune export runs/demo/pruned --to onnx --out model.onnx",
    )
    parser.add_argument("directory", metavar="DIR", type=Path, help="folder of a pruned model")
    parser.add_argument(
        "--to", metavar="FORMAT", required=True, help="onnx or torch-export; hf for a language model"
    )
    parser.add_argument("--out", metavar="PATH", type=Path, help="file to write (in DIR by default)")
    parser.set_defaults(action=_export)


def _export(args: argparse.Namespace) -> None:
    existing_folder(args.directory, "DIR")
    if args.to == "hf":
        from . import uniform

        written, needs = uniform.export_folder(args.directory, args.out)
        print(f"written: {written} ({needs})")
        return
    from . import export

    print(f"written: {export.export(args.directory, args.to, args.out)}")


def _add_report(commands: Any) -> None:
    parser = new_command(
        commands, "report", "rebuild report.html from what the run recorded", "rlprune report runs/demo"
    )
    parser.add_argument("directory", metavar="RUN", type=Path, help="folder of a run")
    parser.set_defaults(action=_report)


def _report(args: argparse.Namespace) -> None:
    existing_folder(args.directory, "RUN")
    from . import report

    print(f"report: {report.build(args.directory)}")


def _add_list(commands: Any) -> None:
    parser = new_command(commands, "list", "what there is, one line each", "rlprune list rules")
    parser.add_argument("kind", nargs="?", choices=KINDS, metavar="KIND", help=f"one of: {', '.join(KINDS)}")
    add_plugin(parser)
    parser.set_defaults(action=_list)


def _list(args: argparse.Namespace) -> None:
    if args.kind is not None:
        print_rows(rows(args.kind))
        return
    for kind in KINDS:
        if kind != "settings":  # long, and asked for by name
            print(f"{kind}:")
            print_rows(rows(kind), "  ")


COMMANDS: tuple[Callable[[Any], None], ...] = (
    _add_demo,
    _add_inspect,
    _add_train,
    _add_apply,
    _add_prune,
    _add_benchmark,
    _add_fidelity,
    _add_evaluate,
    _add_export,
    _add_report,
    _add_list,
)
"""In the order of `rlprune --help`."""
