"""A saved pruned model in other formats, each file checked against the PyTorch outputs before it is kept."""

from __future__ import annotations

import importlib
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ..artifacts.documents import PLAN_FILE, PlanDocument, read_plan
from ..artifacts.pruned_model import example_of
from ..config.config import Config, load_config
from ..errors import ArtifactError, ConfigError, near_miss
from ..language.files.uniform import export_folder
from ..tracing.trace import count_macs
from ..utils import pytrees
from ..utils.files import keep_foreign
from ..utils.pytrees import Inputs
from ..utils.registry import Registry
from ..workloads.adapter import ModelAdapter, adapter_of_base
from .build import build_workload
from .one_file import Call, Reader, Runner, Writer, export_model, named_inputs, output_names

_SIDES = (32, 224, 28, 8, 64, 16, 96, 128, 160, 192, 256, 288, 299, 320, 384, 448, 512)
_MARK = "rlprune"
"""What a file of ours says about itself."""


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
    example_inputs: Inputs = None,
    base: nn.Module | None = None,
    config: Config | None = None,
    force: bool = False,
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

    Raises:
        ConfigError: an unknown format, or a package that it needs is not installed.
        ArtifactError: the folder is unusable, the model cannot be exported, the outputs differ, or a file that rlprune
            did not write is in the way.
    """
    if to not in FORMATS:
        raise ConfigError(
            f"--to: unknown format {to!r}; use one of {', '.join(FORMATS)}{near_miss(to, FORMATS)}"
        )
    folder = find_folder(Path(directory))
    return FORMATS[to].write(_with_workload(Export(folder, to, out, example_inputs, base, force), config))


def find_folder(directory: Path) -> Path:
    """The folder of the pruned model: itself, or the one of a run."""
    inside = directory / "pruned"
    own = (directory / PLAN_FILE).is_file() or not (inside / PLAN_FILE).is_file()
    return directory if own else inside


def _with_workload(job: Export, config: Config | None) -> Export:
    """The job with the dense model and inputs of the workload of ``config``, or of the run's where it takes that."""
    document = read_plan(job.directory)
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


@dataclass(frozen=True)
class Export:
    """One export that was asked for; see `export` for the fields."""

    directory: Path
    to: str
    out: str | Path | None = None
    example_inputs: Inputs = None
    base: nn.Module | None = None
    force: bool = False

    def adapter(self) -> ModelAdapter:
        """The adapter of the saved model."""
        return adapter_of_base(read_plan(self.directory)["base"])

    def file(self, suffix: str, is_ours: Callable[[Path], bool] = lambda path: False) -> Path:
        """The file to write: ``out``, or ``model`` with the suffix in the folder.

        ArtifactError where something lies there that neither ``is_ours`` recognises nor `force` gives up.
        """
        target = Path(self.out) if self.out is not None else self.directory / f"model{suffix}"
        keep_foreign(target, is_ours, self.force)
        return target


def find_example(model: nn.Module, document: PlanDocument, where: str = PLAN_FILE) -> Inputs:
    """One sample of the inputs that the plan was made for.

    Uses `input` of plan.json where it is recorded; else the side of a square image for which the
    model's MACs equal the recorded cost.
    """
    if document.get("input") is not None:
        return example_of(document, where)
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
    raise ArtifactError(
        "export: the input's shape is not recorded in plan.json: give CONFIG, or example_inputs in Python"
    )


def _write_onnx(model: nn.Module, call: Call, path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's notes on its own future
        torch.onnx.export(
            model,
            call.args,
            path,
            kwargs=call.kwargs,
            dynamo=True,
            external_data=False,
            verbose=False,
            input_names=list(named_inputs(model, call.inputs)),
            output_names=output_names(model, call.inputs),
            dynamic_shapes=call.dynamic_shapes(model),
        )
    _mark_onnx(path)


def _write_traced_onnx(model: nn.Module, call: Call, path: Path) -> None:
    """By torch's older exporter, which records one call: what it gives for other inputs is checked like all else."""
    if call.free or call.kwargs:
        raise ArtifactError("export: the older exporter takes one sample of arguments by position")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model,
            call.args,
            path,
            dynamo=False,
            input_names=list(named_inputs(model, call.inputs)),
            output_names=output_names(model, call.inputs),
        )
    _mark_onnx(path)


def _mark_onnx(path: Path) -> None:
    import onnx

    file = onnx.load(path)
    onnx.helper.set_model_props(file, {_MARK: "rlprune export"})
    onnx.save(file, path)


def _is_our_onnx(path: Path) -> bool:
    import onnx

    try:
        return any(entry.key == _MARK for entry in onnx.load(path, load_external_data=False).metadata_props)
    except Exception:  # whatever it is, it is not ours
        return False


def _read_onnx(path: Path) -> Runner:
    import onnx
    import onnxruntime

    onnx.checker.check_model(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]

    def runner(inputs: Inputs, by_name: Mapping[str, Tensor]) -> list[Tensor]:
        found = session.run(None, {name: by_name[name].numpy() for name in names})
        return [torch.from_numpy(array) for array in found]

    return runner


def write_program(model: nn.Module, call: Call, path: Path) -> None:
    """Write a program of torch.export; it is called as the model is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(
            model, call.args, call.kwargs, dynamic_shapes=call.dynamic_shapes(model)
        )
        torch.export.save(program, path, extra_files={_MARK: "rlprune export"})


def read_program(path: Path) -> Runner:
    """A function of inputs that runs a written program."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = torch.export.load(path).module()

    def runner(inputs: Inputs, by_name: Mapping[str, Tensor]) -> list[Tensor]:
        with torch.no_grad():
            return list(pytrees.tensors(pytrees.call(module, inputs)))

    return runner


def _is_our_program(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.rpartition("/")[2] == _MARK for name in archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return False


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


def _file(
    job: Export, suffix: str, is_ours: Callable[[Path], bool], write: Sequence[Writer], read: Reader
) -> Written:
    """A format of one file: the batch size stays free, and batches of 1, 2 and 5 random inputs are compared."""
    adapter = job.adapter()
    if not adapter.one_file:
        # Caches, masks and positions are Python state that these formats would freeze.
        raise ArtifactError(
            f"--to {job.to}: not for {adapter.models}; use --to hf, a folder that other tools load"
        )
    target = job.file(suffix, is_ours)
    document = read_plan(job.directory)
    model = adapter.load(job.directory, document, job.base)
    example = job.example_inputs
    if example is None:
        example = find_example(model, document, str(job.directory / PLAN_FILE))
    example = pytrees.to_device(example, torch.device("cpu"))
    return Written(target, export_model(model, example, target, write, read))


@export_format("ONNX, checked by onnxruntime (extra `export`)", name="onnx")
def _onnx(job: Export) -> Written:
    _need(("onnx", "onnxscript", "onnxruntime"), job.to)
    return _file(job, ".onnx", _is_our_onnx, [_write_onnx, _write_traced_onnx], _read_onnx)


@export_format("a program of torch.export", name="torch-export")
def _torch_export(job: Export) -> Written:
    return _file(job, ".pt2", _is_our_program, [write_program], read_program)


@export_format("a folder of transformers; plain where all layers are alike (language models)", name="hf")
def _hf(job: Export) -> Written:
    """Checked by stock transformers' own logits (`language.files.uniform.export_folder`)."""
    path, needs = export_folder(job.directory, job.out)
    return Written(path, needs)
