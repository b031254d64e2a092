"""ONNX, checked by onnxruntime."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ...errors import ArtifactError
from ...utils.files import keep_foreign
from ...utils.onnx_files import is_our_onnx, mark_onnx
from ...utils.pytrees import Inputs
from ...workloads.adapter import read_pruned
from ..one_file import Call, Runner, named_inputs, output_names
from .base import Export, Written, export_format, need_packages
from .single import one_file


@export_format("ONNX, checked by onnxruntime (extra `export`)", name="onnx")
def _onnx(job: Export) -> Written:
    need_packages(("onnx", "onnxscript", "onnxruntime"), job.to)
    own = job.adapter().onnx_file()
    if own is None:
        return one_file(job, ".onnx", is_our_onnx, [write_onnx, _write_traced_onnx], read_onnx)
    target = job.file(".onnx", is_our_onnx)
    if not is_our_onnx(target):  # whose weights may lie next to it
        keep_foreign(target.with_name(f"{target.name}.data"), lambda path: False, job.force)
    model = job.adapter().load(job.directory, read_pruned(job.directory), job.base)
    return Written(target, str(own(model, target)))


def write_onnx(model: nn.Module, call: Call, path: Path) -> None:
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
    mark_onnx(path)


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
    mark_onnx(path)


def read_onnx(path: Path) -> Runner:
    import onnx
    import onnxruntime

    onnx.checker.check_model(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]

    def runner(inputs: Inputs, by_name: Mapping[str, Tensor]) -> list[Tensor]:
        found = session.run(None, {name: by_name[name].numpy() for name in names})
        return [torch.from_numpy(array) for array in found]

    return runner
