"""A program of torch.export."""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ...utils import pytrees
from ...utils.onnx_files import MARK
from ...utils.pytrees import Inputs
from ..one_file import Call, Runner
from .base import Export, Written, export_format
from .single import one_file


@export_format("a program of torch.export", name="torch-export")
def _torch_export(job: Export) -> Written:
    return one_file(job, ".pt2", _is_our_program, [write_program], read_program)


def write_program(model: nn.Module, call: Call, path: Path) -> None:
    """Write a program of torch.export; it is called as the model is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(
            model, call.args, call.kwargs, dynamic_shapes=call.dynamic_shapes(model)
        )
        torch.export.save(program, path, extra_files={MARK: "rlprune export"})


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
            return any(name.rpartition("/")[2] == MARK for name in archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return False
