"""A saved pruned model in other formats, each file checked against the PyTorch outputs before it is kept."""

from __future__ import annotations

import importlib
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .artifacts import load, read_plan
from .errors import ArtifactError, ConfigError, near_miss, one_line
from .pretrained import SOURCE
from .pruning.tracing import count_macs
from .uniform import export_folder

CHECKED_BATCHES = (1, 2, 5)
TOLERANCE = 1e-4  # of the largest output; other runtimes sum in another order, in float32
_SIDES = (32, 224, 28, 8, 64, 16, 96, 128, 160, 192, 256, 288, 299, 320, 384, 448, 512)

Runner = Callable[[Tensor], Tensor]


def export(
    directory: str | Path,
    to: str,
    out: str | Path | None = None,
    *,
    example_inputs: Tensor | None = None,
    base: nn.Module | None = None,
) -> Path:
    """Write a saved pruned model as another format and return the file's path.

    The batch size stays free. The file is written beside its place, run on batches of 1, 2 and 5
    random inputs, compared with PyTorch, and only then moved to its place.

    Language models are written as a folder (``hf``, see `uniform.export_folder`), with stock transformers'
    own logits as the check.

    Args:
        directory: a folder written by `rlprune.save`.
        to: a name in `FORMATS`, or "hf".
        out: the file or folder; by default `model.<suffix>` or `hf` in the folder.
        example_inputs: one sample, (1, ...). Without it the plan's record is used, or a square image
            whose MACs equal the recorded ones.
        base: the dense model, where the folder cannot say how to build it.

    Raises:
        ConfigError: an unknown format, or a package that it needs is not installed.
        ArtifactError: the folder is unusable, the model cannot be exported, or the outputs differ.
    """
    known = (*FORMATS, "hf")
    if to not in known:
        raise ConfigError(f"--to: unknown format {to!r}; use one of {', '.join(known)}{near_miss(to, known)}")
    if to == "hf":
        return export_folder(directory, out)[0]
    if read_plan(directory)["base"].get("source") == SOURCE:
        # Caches, masks and positions of a language model are Python state that these formats would freeze.
        raise ArtifactError(
            f"--to {to}: not for language models; use --to hf, a folder that other tools load"
        )
    suffix, packages, write, read = FORMATS[to]
    _need(packages, to)
    model = load(directory, base=base)
    document = read_plan(directory)
    example = example_inputs if example_inputs is not None else find_example(model, document)
    target = Path(out) if out is not None else Path(directory) / f"model{suffix}"
    if target.is_dir():
        raise ArtifactError(f"{target}: is a folder, where a file is to be written")
    export_model(model, example, target, write, read)
    return target


def export_model(
    model: nn.Module,
    example: Tensor,
    target: Path,
    write: Callable[[nn.Module, Tensor, Path], None],
    read: Callable[[Path], Runner],
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


def find_example(model: nn.Module, document: dict[str, Any]) -> Tensor:
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


def _write_program(model: nn.Module, sample: Tensor, path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(model, (sample,), dynamic_shapes=({0: torch.export.Dim("batch")},))
        torch.export.save(program, path)


def _read_program(path: Path) -> Runner:
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


FORMATS: dict[
    str, tuple[str, tuple[str, ...], Callable[[nn.Module, Tensor, Path], None], Callable[[Path], Runner]]
]
FORMATS = {
    "onnx": (".onnx", ("onnx", "onnxscript", "onnxruntime"), _write_onnx, _read_onnx),
    "torch-export": (".pt2", (), _write_program, _read_program),
}
"""name -> (suffix, packages it needs, writer, reader); a new format is one line here."""
