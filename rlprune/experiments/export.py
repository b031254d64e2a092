"""A saved pruned model in other formats, each file checked against the PyTorch outputs before it is kept."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import nn

from ..config.config import Config, load_config
from ..errors import ConfigError, near_miss
from ..utils.pytrees import Inputs
from ..workloads.adapter import adapter_of_base, holds_pruned_model, read_pruned
from .build import build_workload
from .formats import FORMATS, Export, Written


def export(
    directory: str | Path,
    to: str,
    out: str | Path | None = None,
    *,
    example_inputs: Inputs = None,
    base: nn.Module | None = None,
    config: Config | None = None,
    force: bool = False,
    dtype: str | None = None,
) -> Written:
    """Write a saved pruned model as another format; returns the path and what it needs.

    Each format says in `FORMATS` what it is and how it is checked against PyTorch's own outputs.

    Args:
        directory: a folder written by `rlprune.save`, or that of a run, whose pruned model is meant.
        to: a name in `FORMATS`.
        out: the file or folder; by default `model.<suffix>` or `hf` in the folder.
        example_inputs: one sample, or several, of what the model is called with (any nest). Without it those of the
            workload or the plan's record are used, or a square image whose MACs equal the recorded ones.
        base: the dense model, where the folder cannot say how to build it.
        config: settings whose workload has the dense model and its inputs; those of the run by default.
        force: a file that rlprune did not write may be replaced.
        dtype: the number format of the weights, where the format has a choice (gguf: f32, f16, bf16, q8_0).

    Raises:
        ConfigError: an unknown format or number format, or a package that it needs is not installed.
        ArtifactError: the folder is unusable, the model cannot be exported, the outputs differ, or a file that rlprune
            did not write is in the way.
    """
    if to not in FORMATS:
        raise ConfigError(
            f"--to: unknown format {to!r}; use one of {', '.join(FORMATS)}{near_miss(to, FORMATS)}"
        )
    _check_dtype(to, dtype)
    folder = find_folder(Path(directory))
    return FORMATS[to].write(
        _with_workload(Export(folder, to, out, example_inputs, base, force, dtype), config)
    )


def _check_dtype(to: str, dtype: str | None) -> None:
    allowed = FORMATS[to].dtypes
    if dtype is None or dtype in allowed:
        return
    if not allowed:
        having = ", ".join(name for name in FORMATS if FORMATS[name].dtypes)
        raise ConfigError(f"--dtype: {to} keeps the folder's number format; only {having} has a choice")
    raise ConfigError(
        f"--dtype: {to} has no {dtype!r}; use one of {', '.join(allowed)}{near_miss(dtype, allowed)}"
    )


def find_folder(directory: Path) -> Path:
    """The folder of the pruned model: itself, or the one of a run."""
    inside = directory / "pruned"
    own = holds_pruned_model(directory) or not holds_pruned_model(inside)
    return directory if own else inside


def _with_workload(job: Export, config: Config | None) -> Export:
    """The job with the dense model and inputs of the workload of ``config``, or of the run's where it takes that."""
    document = read_pruned(job.directory)
    if config is None:
        known = job.base is not None or adapter_of_base(document["base"]).rebuilds(document)
        # resolve: the last part of "." and the like is not the folder's name.
        run = job.directory.resolve().parent
        of_a_run = (run / "config.yaml").is_file() and (run / "results.json").is_file()
        said = job.example_inputs is not None or document.get("input") is not None
        if (known and said) or not of_a_run:
            return job
        config = load_config(run / "config.yaml")
    workload = build_workload(replace(config, device="cpu"), train=False)
    return replace(
        job,
        base=workload.architecture if job.base is None else job.base,
        example_inputs=workload.example_inputs if job.example_inputs is None else job.example_inputs,
    )
