"""The final fine-tune of a saved pruned model, in a process of its own; or in several, on a GPU each::

    rlprune train CONFIG --set finish.steps=0 --out RUN       # the search, one process
    accelerate config                                         # once: number of GPUs, FSDP or not
    accelerate launch -m rlprune.experiments.tune RUN/pruned CONFIG --out RUN/tuned --set finish.steps=2000

``python -m rlprune.experiments.tune ...`` is the same on one device, and ``torchrun --nproc-per-node 2 -m
rlprune.experiments.tune ...`` in two processes, also without a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..api import load
from ..config.config import Config, load_config
from ..errors import ConfigError, RlpruneError
from ..recovery.finetune import Progress
from ..recovery.processes import team_of
from ..tracing.trace import TraceOptions
from ..utils.checkpoints import forget
from ..utils.launched import is_main_process, process_rank
from ..workloads.adapter import TuneJob, read_pruned
from .build import build_workload, resolve_device
from .saving import save_model
from .usage import check_usage


def tune_folder(
    folder: str | Path, config: Config, out: str | Path, *, progress: Progress | None = None
) -> str:
    """Fine-tune a saved pruned model and save it again with the same plan; returns a table.

    Runs in one process, or in all that ``accelerate launch`` or ``torchrun`` started; the first of them saves.

    Args:
        folder: a pruned model that a run or ``rlprune prune`` left.
        config: the settings it was made with; ``finish`` says how it is tuned.
        out: the new folder; the state to go on from lies next to it, in ``OUT.state``, until it is done.

    Raises ConfigError: the settings leave the fine-tune out; ArtifactError: the folder.
    """
    team = team_of(resolve_device(config.device))
    if team is not None and team.device.type == "cuda":
        config = replace(config, device=str(team.device))
    with contextlib.nullcontext() if team is None else team.first_alone():
        workload = build_workload(config)
    count, unit = workload.adapter.fine_tune_length(config.finish)
    if count < 1:
        raise ConfigError(f"finish.{unit}: a fine-tune needs at least 1, got {count}")
    dtype = next(workload.model.parameters()).dtype  # training takes more digits than a folder may keep
    model = load(folder, base=workload.architecture).to(workload.device, dtype)
    options = TraceOptions.of(config.prune)
    plan = workload.adapter.plan_of(workload.before_any_cut(), read_pruned(folder), options)
    state = Path(f"{Path(out)}.state")
    result = workload.fine_tune(model, config.finish, TuneJob(config.seed, state=state, progress=progress))
    if team is not None:
        team.close()
    if not is_main_process():
        return ""
    sizes = save_model(workload, result.model, plan, Path(out), config.finish.dtype)
    forget(state)
    result.model.to(dtype)
    rows = [("dense", workload.model), ("tuned", result.model.to(workload.device))]
    name = workload.metric_name
    lines = [result.note]
    for label, each in rows:
        quality = workload.evaluate(each, "validation")
        lines.append(f"{label:<8} validation loss {quality.loss:.4f}, {name} {quality.metric:.4f}")
    return "\n".join([*lines, *sizes])


def main(argv: Sequence[str] | None = None) -> int:
    """``python -m rlprune.experiments.tune DIR CONFIG --out OUT [--set a.b=c ...]``; exit codes as `rlprune`'s."""
    parser = argparse.ArgumentParser(
        prog="python -m rlprune.experiments.tune", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("folder", help="folder of a pruned model")
    parser.add_argument("config", help="YAML file or name of the settings it was made with")
    parser.add_argument("--out", required=True, help="folder of the tuned model")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE")
    args = parser.parse_args(argv)
    try:
        config = load_config(args.config, args.set)
        check_usage(config, "tune", args.set)
        table = tune_folder(args.folder, config, args.out)
    except RlpruneError as error:
        where = "" if is_main_process() else f"process {process_rank()}: "  # one of them may fail alone
        print(f"{where}{error}", file=sys.stderr)
        return 2
    print(table, end="\n" if table else "")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
