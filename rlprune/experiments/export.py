"""A saved pruned model in other formats, each file checked against the PyTorch outputs before it is kept."""

from __future__ import annotations

import importlib
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..artifacts.documents import PlanDocument, read_plan
from ..errors import ArtifactError, ConfigError, near_miss, one_line
from ..language.files.uniform import export_folder
from ..tracing.trace import count_macs
from ..utils.registry import Registry
from ..workloads.adapter import ModelAdapter, adapter_of_base

CHECKED_BATCHES = (1, 2, 5)
TOLERANCE = 1e-4  # of the largest output; other runtimes sum in another order, in float32
_SIDES = (32, 224, 28, 8, 64, 16, 96, 128, 160, 192, 256, 288, 299, 320, 384, 448, 512)

Runner = Callable[[Tensor], Tensor]
Writer = Callable[[nn.Module, Tensor, Path], None]
Reader = Callable[[Path], Runner]


@dataclass(frozen=True)
class Written:
    """What an export wrote: a file or folder, and in words what it takes to load it, where that is more than usual."""

    path: Path
    needs: str = ""


@dataclass(frozen=True)
class Format:
    """An export format: one line on it, and the function that writes it and checks what it wrote."""

    name: str
    summary: str
    write: Callable[[Export], Written]


FORMATS: Registry[Format] = Registry("export format", source="write")


def export_format(
    summary: str, *, name: str | None = None
) -> Callable[[Callable[[Export], Written]], Callable[[Export], Written]]:
    """Register an export format under the name of the function below, or under ``name``.

    The function takes an :class:`Export`, writes the model, checks it, and says where it is. It raises ArtifactError
    where the folder holds what it cannot write.

    Raises (when applied):
        ConfigError: the name is taken, or the summary is missing.
    """
    return FORMATS.decorator("export_format", summary, lambda own, write: Format(own, summary, write), name)


def export(
    directory: str | Path,
    to: str,
    out: str | Path | None = None,
    *,
    example_inputs: Tensor | None = None,
    base: nn.Module | None = None,
) -> Written:
    """Write a saved pruned model as another format; returns the path and what it needs.

    Each format says in `FORMATS` what it is and how it is checked against PyTorch's own outputs.

    Args:
        directory: a folder written by `rlprune.save`.
        to: a name in `FORMATS`.
        out: the file or folder; by default `model.<suffix>` or `hf` in the folder.
        example_inputs: one sample, (1, ...). Without it the plan's record is used, or a square image
            whose MACs equal the recorded ones.
        base: the dense model, where the folder cannot say how to build it.

    Raises:
        ConfigError: an unknown format, or a package that it needs is not installed.
        ArtifactError: the folder is unusable, the model cannot be exported, or the outputs differ.
    """
    if to not in FORMATS:
        raise ConfigError(
            f"--to: unknown format {to!r}; use one of {', '.join(FORMATS)}{near_miss(to, FORMATS)}"
        )
    return FORMATS[to].write(Export(Path(directory), to, out, example_inputs, base))


@dataclass(frozen=True)
class Export:
    """One export that was asked for; see `export` for the fields."""

    directory: Path
    to: str
    out: str | Path | None = None
    example_inputs: Tensor | None = None
    base: nn.Module | None = None

    def adapter(self) -> ModelAdapter:
        """The adapter of the saved model."""
        return adapter_of_base(read_plan(self.directory)["base"])


def export_model(
    model: nn.Module,
    example: Tensor,
    target: Path,
    write: Writer,
    read: Reader,
) -> None:
    """Write, check and only then move a file into place; see `export`."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
            fresh = Path(folder) / target.name
            # Two samples: an exporter takes a size of 1 for a constant.
            sample = example[:1].expand(2, *example.shape[1:]).contiguous()
            try:
                write(model, sample, fresh)
                _check(model, example, read(fresh))
            except (ArtifactError, OSError):
                raise
            except Exception as error:  # exporters raise whatever their many parts raise
                raise ArtifactError(
                    f"export: {type(model).__name__} cannot be exported ({type(error).__name__}: {one_line(error)})"
                ) from error
            os.replace(fresh, target)
    except OSError as error:
        raise ArtifactError(f"{target}: cannot be written ({error.strerror or error})") from error


def find_example(model: nn.Module, document: PlanDocument) -> Tensor:
    """One zero sample of the shape that the plan was made for.

    Uses `input` of plan.json where it is recorded; else the side of a square image for which the
    model's MACs equal the recorded cost.
    """
    shape = document.get("input")
    if isinstance(shape, list) and shape and all(isinstance(side, int) and side > 0 for side in shape):
        return torch.zeros(1, *shape[1:])
    stem = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    recorded = document.get("cost", {}).get("macs")
    if stem is not None and isinstance(recorded, int | float):
        for side in _SIDES:
            example = torch.zeros(1, stem.in_channels, side, side)
            try:
                macs = count_macs(model, example)
            except Exception:  # too small for this architecture: the next size may fit
                continue
            if abs(macs - recorded) <= 1e-9 * recorded:
                return example
    raise ArtifactError("export: the input's shape is not recorded in plan.json: give example_inputs")


def _check(model: nn.Module, example: Tensor, runner: Runner) -> None:
    generator = torch.Generator().manual_seed(0)
    for size in CHECKED_BATCHES:
        inputs = torch.randn(size, *example.shape[1:], generator=generator)
        with torch.no_grad():
            wanted = model(inputs)
        found = runner(inputs)
        if found.shape != wanted.shape:
            raise ArtifactError(
                f"export: outputs of shape {tuple(found.shape)} where PyTorch gives {tuple(wanted.shape)}"
            )
        difference = float((found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-12))
        if not difference <= TOLERANCE:
            raise ArtifactError(
                f"export: outputs differ from PyTorch by {difference:.2g} of the largest one "
                f"(allowed {TOLERANCE:g}) at batch size {size}"
            )


def _write_onnx(model: nn.Module, sample: Tensor, path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's notes on its own future
        torch.onnx.export(
            model,
            (sample,),
            path,
            dynamo=True,
            external_data=False,
            verbose=False,
            input_names=["input"],
            output_names=["output"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )


def _read_onnx(path: Path) -> Runner:
    import onnx
    import onnxruntime

    onnx.checker.check_model(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda inputs: torch.from_numpy(session.run(None, {"input": inputs.numpy()})[0])


def write_program(model: nn.Module, sample: Tensor, path: Path) -> None:
    """Write a program of torch.export whose batch size is free."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(model, (sample,), dynamic_shapes=({0: torch.export.Dim("batch")},))
        torch.export.save(program, path)


def read_program(path: Path) -> Runner:
    """A function of a batch that runs a written program."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = torch.export.load(path).module()

    def runner(inputs: Tensor) -> Tensor:
        with torch.no_grad():
            outputs: Tensor = module(inputs)
        return outputs

    return runner


def _need(packages: Sequence[str], to: str) -> None:
    missing = []
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError:
            missing.append(package)
    if missing:
        raise ConfigError(
            f"--to {to}: needs {', '.join(missing)}; install it with: pip install 'rlprune[export]'"
        )


def _file(job: Export, suffix: str, packages: Sequence[str], write: Writer, read: Reader) -> Written:
    """A format of one file: the batch size stays free, and batches of 1, 2 and 5 random inputs are compared."""
    adapter = job.adapter()
    if not adapter.one_file:
        # Caches, masks and positions are Python state that these formats would freeze.
        raise ArtifactError(
            f"--to {job.to}: not for {adapter.models}; use --to hf, a folder that other tools load"
        )
    _need(packages, job.to)
    document = read_plan(job.directory)
    model = adapter.load(job.directory, document, job.base)
    example = job.example_inputs if job.example_inputs is not None else find_example(model, document)
    target = Path(job.out) if job.out is not None else job.directory / f"model{suffix}"
    if target.is_dir():
        raise ArtifactError(f"{target}: is a folder, where a file is to be written")
    export_model(model, example, target, write, read)
    return Written(target)


@export_format("ONNX, checked by onnxruntime (extra `export`)", name="onnx")
def _onnx(job: Export) -> Written:
    return _file(job, ".onnx", ("onnx", "onnxscript", "onnxruntime"), _write_onnx, _read_onnx)


@export_format("a program of torch.export", name="torch-export")
def _torch_export(job: Export) -> Written:
    return _file(job, ".pt2", (), write_program, read_program)


@export_format("a folder of transformers; plain where all layers are alike (language models)", name="hf")
def _hf(job: Export) -> Written:
    """Checked by stock transformers' own logits (`language.files.uniform.export_folder`)."""
    path, needs = export_folder(job.directory, job.out)
    return Written(path, needs)
