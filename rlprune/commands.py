"""The commands of `rlprune`: their options, and for each the one call that does its work.

The code that works is imported when a command runs, so that `--help` and wrong settings answer at once.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .catalogue import KINDS, check_names, check_side, rows
from .config import Config, load_config
from .errors import ConfigError, near_miss


def _add_demo(commands: Any) -> None:
    parser = _command(
        commands,
        "demo",
        "the whole path on handwritten digits, in a few minutes",
        "rlprune demo --out runs/demo",
    )
    _add_out(parser, "runs/demo")
    _add_seed(parser)
    parser.set_defaults(action=_demo)


def _demo(args: argparse.Namespace) -> None:
    from . import run

    out = args.out or _free_folder("demo")
    args.resumable.append(out)
    run.demo(out, args.seed or 0)
    _show_run(out)


def _add_inspect(commands: Any) -> None:
    parser = _command(
        commands,
        "inspect",
        "groups, widths, costs, protected parts, feasible budgets",
        "rlprune inspect digits",
    )
    _add_config(parser)
    parser.add_argument("--resources", action="store_true", help="also print seconds and peak memory")
    parser.set_defaults(action=_inspect)


def _inspect(args: argparse.Namespace) -> None:
    started = time.perf_counter()
    config = _config(args)
    from . import inspection

    print(inspection.inspect(config))
    if args.resources:
        print(inspection.resources(time.perf_counter() - started))


def _add_train(commands: Any) -> None:
    parser = _command(
        commands,
        "train",
        "learn the distribution, pick the best plan, finish it, save everything",
        "rlprune train digits --set budget.target=30% search.evaluations=200 --out runs/digits30",
    )
    _add_config(parser)
    _add_out(parser, "runs/NAME of the config")
    parser.add_argument(
        "--resume", action="store_true", help="continue the run in --out where it was stopped"
    )
    _add_seed(parser)
    parser.set_defaults(action=_train)


def _train(args: argparse.Namespace) -> None:
    config = _config(args)
    out = args.out or (Path("runs") / config.name if args.resume else _free_folder(config.name))
    if args.resume and not out.is_dir():
        raise ConfigError(f"--resume: no run in {out}; give its folder with --out")
    _check_packages(config, config.finish.steps)
    from . import run

    args.resumable.append(out)
    run.train(config, out, resume=args.resume, progress=True)
    _show_run(out)


def _add_apply(commands: Any) -> None:
    parser = _command(
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
    _add_config(parser)
    parser.add_argument("--checkpoint", metavar="FILE", type=Path, help="weights of the model to prune")
    _add_budget(parser)
    parser.add_argument("--refine", metavar="N", type=_whole(0), default=0, help="then spend N evaluations")
    _add_out(parser, "pruned/NAME of the config")
    _add_seed(parser)
    parser.set_defaults(action=_apply)


def _apply(args: argparse.Namespace) -> None:
    config = _config(args)
    if not args.source.is_file():
        _existing_folder(args.source, "RUN_OR_POLICY")
    if args.checkpoint is not None and not args.checkpoint.is_file():
        raise ConfigError(f"--checkpoint: {args.checkpoint}: no such file")
    out = args.out or _free_folder(config.name, "pruned")
    from . import replay

    if replay.is_plan(args.source):
        for option, given in (("--budget", args.budget is not None), ("--refine", args.refine > 0)):
            if given:
                raise ConfigError(f"{option}: not for a plan, which fixes the units; {args.source} is one")
        _show(replay.apply_plan(args.source, config, checkpoint=args.checkpoint, out=out), out)
        return
    from . import deploy

    target = config.budget.target
    result = deploy.apply(
        args.source, config, checkpoint=args.checkpoint, budget=target, refine=args.refine, out=out
    )
    _show(result, out)


def _add_prune(commands: Any) -> None:
    parser = _command(
        commands,
        "prune",
        "a heuristic rule prunes the model",
        "rlprune prune digits --rule lamp --budget 50%",
    )
    _add_config(parser)
    parser.add_argument("--rule", metavar="NAME", required=True, help="see `rlprune list rules`")
    parser.add_argument(
        "--stages", metavar="N", type=_whole(1), default=1, help="cut in N rounds, the rule asked in each (1)"
    )
    parser.add_argument(
        "--steps", metavar="N", type=_whole(0), help="optimizer steps after each round (finish.steps / N)"
    )
    _add_budget(parser)
    _add_out(parser, "pruned/NAME of the config")
    _add_seed(parser)
    parser.set_defaults(action=_prune)


def _prune(args: argparse.Namespace) -> None:
    config = _config(args)
    from . import deploy
    from .rules import RULES

    if args.rule not in RULES:
        hint = near_miss(args.rule, RULES)
        raise ConfigError(f"--rule: unknown rule {args.rule!r}{hint}; allowed: {', '.join(RULES)}")
    check_side(config, [args.rule])
    out = args.out or _free_folder(config.name, "pruned")
    if args.stages == 1 and args.steps is None:
        _show(deploy.prune_rule(config, args.rule, config.budget.target, out), out)
        return
    steps = config.finish.steps // args.stages if args.steps is None else args.steps
    _check_packages(config, steps)
    _show(deploy.prune_stages(config, args.rule, config.budget.target, args.stages, steps, out), out)


def _add_benchmark(commands: Any) -> None:
    parser = _command(
        commands,
        "benchmark",
        "all methods with the same number of evaluations: table, plots, results.json",
        "rlprune benchmark digits --methods ppo,random,lamp --seeds 3 --evaluations 300",
    )
    _add_config(parser)
    parser.add_argument("--methods", metavar="a,b,c", type=_names, help="rules and agents; all by default")
    parser.add_argument("--seeds", metavar="N", type=_whole(1), default=1, help="seeds of each search (1)")
    parser.add_argument("--evaluations", metavar="N", type=_whole(1), help="instead of search.evaluations")
    _add_out(parser, "runs/NAME-benchmark")
    _add_seed(parser)
    parser.set_defaults(action=_benchmark)


def _benchmark(args: argparse.Namespace) -> None:
    config = _config(args)
    _check_packages(config, config.finish.steps)
    check_side(config, args.methods or ())
    from . import benchmark

    out = args.out or _free_folder(f"{config.name}-benchmark")
    evaluations = args.evaluations or config.search.evaluations
    benchmark.run(config, args.methods, args.seeds, evaluations, out)
    _show_run(out)


def _add_fidelity(commands: Any) -> None:
    parser = _command(
        commands,
        "fidelity",
        "does the reward predict the quality after the final fine-tune?",
        "rlprune fidelity digits --candidates 20 --out runs/fidelity",
    )
    _add_config(parser)
    parser.add_argument("--candidates", metavar="N", type=_whole(4), default=14, help="plans compared (14)")
    _add_out(parser, "runs/NAME-fidelity")
    _add_seed(parser)
    parser.set_defaults(action=_fidelity)


def _fidelity(args: argparse.Namespace) -> None:
    config = _config(args)
    _check_packages(config, config.finish.steps)
    from . import fidelity

    out = args.out or _free_folder(f"{config.name}-fidelity")
    _show(fidelity.run(config, args.candidates, out), out)


def _add_evaluate(commands: Any) -> None:
    parser = _command(
        commands,
        "evaluate",
        "metric, costs and measured latency of a saved pruned model beside its dense base",
        "rlprune evaluate runs/demo/pruned digits",
    )
    parser.add_argument("directory", metavar="DIR", type=Path, help="folder of a pruned model")
    _add_config(parser, required=False)
    parser.add_argument(
        "--tasks",
        metavar="FILE,FILE",
        type=_names,
        default=[],
        help="zero-shot accuracy of a language model on these multiple-choice files (extra `zeroshot`)",
    )
    parser.add_argument("--limit", metavar="N", type=_whole(1), help="first N questions of each file only")
    parser.set_defaults(action=_evaluate)


def _evaluate(args: argparse.Namespace) -> None:
    _existing_folder(args.directory, "DIR")
    if args.limit is not None and not args.tasks:
        raise ConfigError("--limit: limits the questions of --tasks, which is not given")
    config = _config(args) if args.config is not None else None
    from . import inspection

    print(inspection.evaluate(args.directory, config, [Path(t) for t in args.tasks], args.limit))


def _add_export(commands: Any) -> None:
    parser = _command(
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
    _existing_folder(args.directory, "DIR")
    from . import export

    print(f"written: {export.export(args.directory, args.to, args.out)}")


def _add_report(commands: Any) -> None:
    parser = _command(
        commands, "report", "rebuild report.html from what the run recorded", "rlprune report runs/demo"
    )
    parser.add_argument("directory", metavar="RUN", type=Path, help="folder of a run")
    parser.set_defaults(action=_report)


def _report(args: argparse.Namespace) -> None:
    _existing_folder(args.directory, "RUN")
    from . import report

    print(f"report: {report.build(args.directory)}")


def _add_list(commands: Any) -> None:
    parser = _command(commands, "list", "what there is, one line each", "rlprune list rules")
    parser.add_argument("kind", nargs="?", choices=KINDS, metavar="KIND", help=f"one of: {', '.join(KINDS)}")
    parser.set_defaults(action=_list)


def _list(args: argparse.Namespace) -> None:
    if args.kind is not None:
        _print_rows(rows(args.kind))
        return
    for kind in KINDS:
        if kind != "settings":  # long, and asked for by name
            print(f"{kind}:")
            _print_rows(rows(kind), "  ")


def _command(commands: Any, name: str, summary: str, example: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=summary, description=summary[0].upper() + summary[1:] + ".", epilog=f"example: {example}"
    )
    add_common(parser, argparse.SUPPRESS)
    return parser


def add_common(parser: argparse.ArgumentParser, default: Any) -> None:
    """Options that may stand before or after the command; a sub-parser must not overwrite what came before."""
    debug_default = False if default is None else default
    parser.add_argument("--debug", action="store_true", default=debug_default, help="show tracebacks")
    parser.add_argument(
        "--threads", metavar="N", type=_whole(1), default=default, help="CPU threads of torch"
    )


def _add_config(parser: argparse.ArgumentParser, required: bool = True) -> None:
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


def _add_out(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument(
        "--out", metavar="DIR", type=Path, help=f"folder to write ({default}, numbered if taken)"
    )


def _add_seed(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", metavar="N", type=_whole(0), help="seed of the search")


def _add_budget(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--budget", metavar="B", help='what may be left: 0.5, "50%%" or "150M"')


def _config(args: argparse.Namespace) -> Config:
    """The settings of a command: the file or shipped name, then --set, then the options of their own."""
    overrides = list(args.overrides)
    for option, field in (("budget", "budget.target"), ("seed", "seed"), ("threads", "threads")):
        value = getattr(args, option, None)
        if value is not None:
            overrides.append(f"{field}={value}")
    config = load_config(args.config, overrides)
    check_names(config)
    check_side(config)
    return config


def _check_packages(config: Config, steps: int) -> None:
    """A package that only the final fine-tune needs is missed before the search, not after it."""
    if steps and config.finish.method == "lora" and importlib.util.find_spec("peft") is None:
        from .workloads.causal import is_causal

        if is_causal(config.model.name):
            raise ConfigError("finish.method: 'lora' needs peft; pip install 'rlprune[language]'")


def _whole(low: int) -> Callable[[str], int]:
    def convert(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = low - 1
        if number < low:
            raise argparse.ArgumentTypeError(f"must be a whole number of {low} and more, got {text!r}")
        return number

    return convert


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if not all(names) or len(set(names)) != len(names):
        raise argparse.ArgumentTypeError(f"must be different names with commas between, got {text!r}")
    return names


def _free_folder(name: str, parent: str = "runs") -> Path:
    """PARENT/NAME, or the first of PARENT/NAME-2, -3, ... that does not exist yet."""
    folder, number = Path(parent) / name, 1
    while folder.exists():
        number += 1
        folder = Path(parent) / f"{name}-{number}"
    return folder


def _existing_folder(path: Path, what: str) -> None:
    if not path.is_dir():
        raise ConfigError(f"{what}: {path}: no such folder")


def _show_run(out: Path) -> None:
    """The table of a finished run and where its report is."""
    from . import report

    print(report.markdown(report.read_results(out)))
    if (out / "report.html").is_file():
        print(f"report: {out / 'report.html'}")


def _show(result: object, out: Path) -> None:
    """What a command returned in words, if anything, and where its files are."""
    if isinstance(result, str):
        print(result)
    print(f"written: {out}")


def _print_rows(rows: Sequence[tuple[str, str]], indent: str = "") -> None:
    width = max((len(name) for name, _ in rows), default=0)
    for name, text in rows:
        print(f"{indent}{name:<{width}}  {text}".rstrip())


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
