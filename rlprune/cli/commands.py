"""The commands of `rlprune`: their options, and for each the one call that does its work.

The code that works is imported when a command runs, so that `--help` and wrong settings answer at once.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..config.config import Config, json_schema
from ..errors import ConfigError, RlpruneError
from .catalogue import KINDS, rows
from .completion import SHELLS
from .options import (
    Subparsers,
    add_config,
    add_execution,
    add_force,
    add_out,
    add_plugin,
    add_seed,
    check_packages,
    existing_folder,
    free_folder,
    name_list,
    new_command,
    read_config,
    show,
    whole_number,
)
from .output import add_json, add_quiet, finish, print_rows, say, show_benchmark, show_run, watcher
from .pruning_commands import add_apply, add_prune
from .sharing_commands import add_optuna, add_push


def _add_demo(commands: Subparsers) -> None:
    parser = new_command(
        commands,
        "demo",
        "the whole path on handwritten digits, in a few minutes",
        "rlprune demo --out runs/demo",
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on with the run in --out, where there is one"
    )
    add_out(parser, "runs/demo")
    add_seed(parser)
    add_quiet(parser)
    add_json(parser)
    parser.set_defaults(action=_demo, config="digits", overrides=[])


def _demo(args: argparse.Namespace) -> None:
    """A `train` of the shipped digits; then its policy prunes a second checkpoint."""
    config = read_config(args)
    out = _run_folder(args, "demo")
    _run(args, config, out)
    from ..experiments import apply as deploy

    other = config.override([f"model.seed={config.model.seed + 1}"])
    say(args, "\nthe learned policy on a second checkpoint, without a search:")
    target = config.budget.target
    applied = deploy.apply(out, other, target, callback=watcher(args))
    applied.save(out / "second")
    say(args, str(applied))
    show_run(out, args)


def _add_inspect(commands: Subparsers) -> None:
    parser = new_command(
        commands,
        "inspect",
        "groups, widths, costs, protected parts, feasible budgets",
        "rlprune inspect digits",
    )
    add_config(parser)
    parser.add_argument("--resources", action="store_true", help="also print seconds and peak memory")
    add_json(parser)
    parser.set_defaults(action=_inspect)


def _inspect(args: argparse.Namespace) -> None:
    started = time.perf_counter()
    config = read_config(args)
    from ..experiments import inspect as inspection

    found = inspection.inspect(config)
    print(found.text)
    args.summary = found.facts
    if args.resources:
        print(inspection.resources(time.perf_counter() - started))


def _add_train(commands: Subparsers) -> None:
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
    add_execution(parser)
    add_seed(parser)
    add_quiet(parser)
    add_json(parser)
    parser.set_defaults(action=_train)


def _train(args: argparse.Namespace) -> None:
    config = read_config(args)
    out = _run_folder(args, config.name)
    if args.resume and not out.is_dir():
        raise ConfigError(f"--resume: no run in {out}; give its folder with --out")
    _run(args, config, out)
    show_run(out, args)


def _run_folder(args: argparse.Namespace, name: str) -> Path:
    """--out, or the folder of that name in runs/, numbered where it is taken and --resume is not given."""
    out: Path = args.out or (Path("runs") / name if args.resume else free_folder(name))
    return out


def _run(args: argparse.Namespace, config: Config, out: Path) -> None:
    """Train into ``out``, which an interruption then names."""
    check_packages(config, config.finish.steps)
    from ..experiments import train as run

    args.resumable.append(out)
    run.train(config, out, resume=args.resume, callback=watcher(args))


def _add_benchmark(commands: Subparsers) -> None:
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
        "--jobs": {"metavar": "N", "type": number, "help": "short for --engine processes --workers N"},
        "--out": {"metavar": "DIR", "type": Path, "help": "folder (runs/NAME-benchmark); what it holds is reused"},
    }  # fmt: skip
    for option, options in arguments.items():
        parser.add_argument(option, **options)
    add_execution(parser)
    add_seed(parser)
    add_quiet(parser)
    add_json(parser)
    parser.set_defaults(action=_benchmark)


def _benchmark(args: argparse.Namespace) -> None:
    config = read_config(args)
    check_packages(config, config.finish.steps)
    from ..benchmarks import verb

    out = args.out or verb.default_folder(config)
    results = verb.benchmark(
        config,
        args.methods,
        seeds=args.seeds,
        evaluations=args.evaluations,
        out=out,
        budgets=args.budgets,
        checkpoints=args.checkpoints,
        jobs=args.jobs,
        callback=watcher(args),
    )
    show_benchmark(out, results, args)


def _add_fidelity(commands: Subparsers) -> None:
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
        help="gradient steps of the most expensive recovery (20; none for language models)",
    )
    parser.add_argument(
        "--out", metavar="DIR", type=Path, help="folder (runs/NAME-fidelity); what it holds is reused"
    )
    add_execution(parser)
    add_seed(parser)
    add_quiet(parser)
    add_json(parser)
    parser.set_defaults(action=_fidelity)


def _fidelity(args: argparse.Namespace) -> None:
    config = read_config(args)
    check_packages(config, config.finish.steps)
    from ..experiments import fidelity

    out = args.out or Path("runs") / f"{config.name}-fidelity"
    show(args, fidelity.run(config, args.candidates, out, args.steps, callback=watcher(args)), out)


def _add_evaluate(commands: Subparsers) -> None:
    parser = new_command(
        commands,
        "evaluate",
        "metric, costs and measured latency of a saved pruned model compared with its dense base",
        "rlprune evaluate runs/demo/pruned digits",
    )
    parser.add_argument("directory", metavar="DIR", type=Path, help="folder of a pruned model")
    add_config(parser, required=False)
    parser.add_argument(
        "--tasks",
        metavar="TASK,TASK",
        type=name_list,
        default=[],
        help="zero-shot accuracy of a language model on multiple-choice files of yours, or tasks of "
        "lm-evaluation-harness by name whose data is in the cache (extra `zeroshot`)",
    )
    parser.add_argument(
        "--limit", metavar="N", type=whole_number(1), help="first N questions of each file only"
    )
    add_quiet(parser)
    add_json(parser)
    parser.set_defaults(action=_evaluate)


def _evaluate(args: argparse.Namespace) -> None:
    existing_folder(args.directory, "DIR")
    if args.limit is not None and not args.tasks:
        raise ConfigError("--limit: limits the questions of --tasks, which is not given")
    config = read_config(args) if args.config is not None else None
    from ..experiments import inspect as inspection

    tasks = [Path(t) for t in args.tasks]
    found = inspection.evaluate(args.directory, config, tasks, args.limit, callback=watcher(args))
    print(found.text)
    args.summary = found.facts


def _add_export(commands: Subparsers) -> None:
    parser = new_command(
        commands,
        "export",
        "other formats, checked against the PyTorch outputs",
        "rlprune export runs/demo/pruned --to onnx --out model.onnx",
    )
    parser.add_argument("directory", metavar="DIR", type=Path, help="folder of a pruned model, or of a run")
    add_config(parser, required=False)
    parser.add_argument(
        "--to",
        metavar="FORMAT",
        required=True,
        help="onnx; torch-export for a model of images; hf or gguf for a language model",
    )
    parser.add_argument(
        "--dtype",
        metavar="TYPE",
        help="number format of a GGUF file: f32, f16, bf16 or q8_0 (16 bits by default)",
    )
    parser.add_argument("--out", metavar="PATH", type=Path, help="file to write (in DIR by default)")
    add_force(parser)
    add_json(parser)
    parser.set_defaults(action=_export)


def _export(args: argparse.Namespace) -> None:
    existing_folder(args.directory, "DIR")
    config = read_config(args) if args.config is not None else None
    from ..experiments import export

    written = export.export(
        args.directory, args.to, args.out, config=config, force=args.force, dtype=args.dtype
    )
    text = f"written: {written.path}" + (f" ({written.needs})" if written.needs else "")
    finish(args, text, written=written.path, needs=written.needs, notes=list(written.notes))
    for note in written.notes:
        print(f"  {note}")


def _add_report(commands: Subparsers) -> None:
    parser = new_command(
        commands, "report", "rebuild report.html from what the run recorded", "rlprune report runs/demo"
    )
    parser.add_argument("directory", metavar="RUN", type=Path, help="folder of a run")
    add_json(parser)
    parser.set_defaults(action=_report)


def _report(args: argparse.Namespace) -> None:
    existing_folder(args.directory, "RUN")
    from ..report import html as report

    path = report.build(args.directory)
    finish(args, f"report: {path}", report=path)


def _add_list(commands: Subparsers) -> None:
    parser = new_command(commands, "list", "what there is, one line each", "rlprune list rules")
    parser.add_argument("kind", nargs="?", choices=KINDS, metavar="KIND", help=f"one of: {', '.join(KINDS)}")
    add_plugin(parser)
    add_json(parser)
    parser.set_defaults(action=_list)


def _list(args: argparse.Namespace) -> None:
    if args.json:
        wanted = KINDS if args.kind is None else (args.kind,)
        args.summary = {
            kind: [{"name": name, "summary": text} for name, text in rows(kind)] for kind in wanted
        }
        return
    if args.kind is not None:
        print_rows(rows(args.kind))
        return
    for kind in KINDS:
        if kind != "settings":  # long, and asked for by name
            print(f"{kind}:")
            print_rows(rows(kind), "  ")


def _add_completion(commands: Subparsers) -> None:
    parser = new_command(
        commands,
        "completion",
        "a script by which a shell completes commands and options",
        "rlprune completion bash",
    )
    parser.add_argument("shell", choices=SHELLS, metavar="SHELL", help=f"one of: {', '.join(SHELLS)}")
    parser.set_defaults(action=_completion)


def _completion(args: argparse.Namespace) -> None:
    from .completion import script

    print(script(args.parser, args.shell))


def _add_schema(commands: Subparsers) -> None:
    parser = new_command(
        commands,
        "schema",
        "a JSON schema of the settings, for editors",
        "rlprune schema --out rlprune.schema.json",
    )
    parser.add_argument("--out", metavar="FILE", type=Path, help="file to write (printed by default)")
    add_force(parser)
    add_plugin(parser)
    parser.set_defaults(action=_schema)


def _schema(args: argparse.Namespace) -> None:
    if args.out is None:
        print(json.dumps(json_schema(), indent=1))
        return
    from ..utils.files import keep_foreign, read_json, write_json_atomic

    schema = json_schema()

    def is_ours(path: Path) -> bool:
        with contextlib.suppress(RlpruneError):
            found = read_json(path)
            return isinstance(found, dict) and found.get("title") == schema["title"]
        return False

    keep_foreign(args.out, is_ours, args.force)
    write_json_atomic(args.out, schema)
    print(f"written: {args.out}")


COMMANDS: tuple[Callable[[Any], None], ...] = (
    _add_demo,
    _add_inspect,
    _add_train,
    add_apply,
    add_prune,
    _add_benchmark,
    _add_fidelity,
    _add_evaluate,
    _add_export,
    add_push,
    _add_report,
    add_optuna,
    _add_list,
    _add_schema,
    _add_completion,
)
"""In the order of `rlprune --help`."""
