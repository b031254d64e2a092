"""A format of one file that holds a function of tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from ...artifacts.documents import PLAN_FILE, PlanDocument
from ...artifacts.pruned_model import example_of
from ...errors import ArtifactError
from ...tracing.trace import count_macs
from ...utils import pytrees
from ...utils.pytrees import Inputs
from ...workloads.adapter import read_pruned
from ..one_file import Reader, Writer, export_model
from .base import Export, Written

_SIDES = (32, 224, 28, 8, 64, 16, 96, 128, 160, 192, 256, 288, 299, 320, 384, 448, 512)


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


def one_file(
    job: Export, suffix: str, is_ours: Callable[[Path], bool], write: Sequence[Writer], read: Reader
) -> Written:
    """A format of one file: the batch size stays free, and batches of 1, 2 and 5 random inputs are compared."""
    adapter = job.adapter()
    if not adapter.one_file:
        # Caches, masks and positions are Python state that these formats would freeze.
        raise ArtifactError(
            f"--to {job.to}: not for {adapter.models}; use --to onnx, or --to hf, a folder that other tools load"
        )
    target = job.file(suffix, is_ours)
    document = read_pruned(job.directory)
    model = adapter.load(job.directory, document, job.base)
    example = job.example_inputs
    if example is None:
        example = find_example(model, document, str(job.directory / PLAN_FILE))
    example = pytrees.to_device(example, torch.device("cpu"))
    return Written(target, export_model(model, example, target, write, read))
