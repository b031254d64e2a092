"""Pruned models and policies on disk: tensors in safetensors, everything else in JSON, never pickle.

A pruned model's folder holds `model.safetensors` and `plan.json`. Loading builds the dense
architecture (from an allow-list, or the model passed in), puts the small tensors in by name and sets the
integer attributes that surgery changed: nothing is traced and no code is named by the files. An adapter may add what
other tools need to load the folder alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArtifactError
from ..pruning.fingerprint import fingerprint, uncompiled
from ..pruning.inputs import inputs_from
from ..pruning.plan import Plan
from ..pruning.space import PruningSpace
from ..pruning.surgery import attributes, axis_indices, axis_length
from ..utils.files import (
    lock_run,
    read_json,
    read_tensors,
    replacing_folder,
    write_json_atomic,
    write_tensors_atomic,
    write_text_atomic,
)
from ..utils.machine import library_versions
from ..utils.torch_internals import copied, unsaved_buffers
from .documents import LANES_VERSION, PLAN_FILE, VERSION, PlanDocument, read_plan
from .fitting import check_checksum, checksum, put_tensors, set_attributes
from .safetensors import check_roots, check_tensors, refuse_nan

__all__ = [
    "PLAN_FILE",
    "VERSION",
    "example_of",
    "load_pruned",
    "lock_run",
    "read_json",
    "read_plan",
    "read_tensors",
    "save_pruned",
    "write_json_atomic",
    "write_tensors_atomic",
    "write_text_atomic",
]

MODEL_FILE = "model.safetensors"


def save_pruned(
    slim: nn.Module,
    plan: Plan,
    directory: str | Path,
    base: Mapping[str, object],
    side_files: Mapping[str, str] | None = None,
) -> None:
    """Write the tensors and the plan of a pruned model into a folder, which is replaced as a whole or not at all.

    Args:
        base: how to build the dense architecture, ``{"source", "name", "arguments"}``; {"source": "given"} means
            that loading needs the model.
        side_files: name -> text of further files.

    Raises ArtifactError: tensors that do not fit the plan, NaN weights, or a folder that cannot be written.
    """
    tensors = _saved_tensors(uncompiled(slim), plan)
    refuse_nan(tensors, "the model")
    check_against_plan(tensors, plan)
    document = plan_document(plan, base, {name: tensor.shape for name, tensor in tensors.items()})
    document["checksums"] = {name: checksum(tensor) for name, tensor in tensors.items()}
    with replacing_folder(directory, PLAN_FILE) as folder:
        write_tensors_atomic(folder / MODEL_FILE, tensors, {"format": "pt", "rlprune": str(VERSION)})
        for name, text in (side_files or {}).items():
            write_text_atomic(folder / name, text)
        write_json_atomic(folder / PLAN_FILE, document)


def _saved_tensors(slim: nn.Module, plan: Plan) -> dict[str, Tensor]:
    """The state dict, and the buffers that it leaves out although the plan cuts them."""
    tensors = {name: tensor.detach() for name, tensor in slim.state_dict().items()}
    cut = {cut.tensor for cut in plan.space.cuts} & unsaved_buffers(slim)
    return tensors | {name: tensor for name, tensor in slim.named_buffers() if name in cut}


def plan_document(
    plan: Plan, base: Mapping[str, object], shapes: Mapping[str, Sequence[int]]
) -> dict[str, Any]:
    """The content of plan.json for a model of these tensors."""
    return {
        "format": "rlprune pruned model",
        "version": document_version(plan.space),
        "base": dict(base),
        **plan.to_dict(),
        "budget": {"target": plan.origin.get("budget"), "metric": plan.origin.get("metric", "macs")},
        "attributes": attributes(plan.space, plan),
        "roots": {name: root for name, root in _roots(plan).items() if root["tensor"] in shapes},
        "tensors": {name: list(shape) for name, shape in shapes.items()},
        "libraries": library_versions(),
    }


def document_version(space: PruningSpace) -> int:
    """The oldest version of the format that can say what a plan of this space keeps."""
    return LANES_VERSION if any(g.lanes > 1 or g.lane_group for g in space.groups) else 1


def load_pruned(
    folder: Path,
    document: PlanDocument,
    base: nn.Module | None,
    rebuild: Callable[[Mapping[str, object]], nn.Module],
) -> nn.Module:
    """The pruned model that `save_pruned` wrote, on the CPU, in eval mode.

    Args:
        document: the content of its plan.json.
        base: the dense model, where the file cannot say how to build it; it is not changed.
        rebuild: builds the dense architecture from the document's ``base``.

    Raises ArtifactError: missing, truncated or foreign tensors, or ones that do not fit the plan or the base.
    """
    tensors = read_tensors(folder / MODEL_FILE)
    where = str(folder / MODEL_FILE)
    check_tensors(tensors, document["tensors"], where)
    check_roots({name: tensor.shape for name, tensor in tensors.items()}, document, where)
    refuse_nan(tensors, where)
    for name in sorted(tensors) if "checksums" in document else ():
        check_checksum(name, tensors[name], document["checksums"], where)
    if base is None:
        _check_described(_skeleton(document["base"], rebuild), document, folder)
        model = rebuild(document["base"])
        _check_described(model, document, folder)
    else:
        check_base(base, document, folder)
        model = copied(uncompiled(base))
    put_tensors(model, tensors, where)
    set_attributes(model, document["attributes"], str(folder / PLAN_FILE))
    return model.cpu().eval()


def _skeleton(
    base: Mapping[str, object], rebuild: Callable[[Mapping[str, object]], nn.Module]
) -> nn.Module | None:
    """The architecture without memory for its weights; None where its constructor does not allow that.

    A description that asks for another model than was saved is then found out before it fills the memory.
    """
    with contextlib.suppress(ArtifactError, RuntimeError, NotImplementedError), torch.device("meta"):
        return rebuild(base)
    return None


def _check_described(model: nn.Module | None, document: PlanDocument, folder: Path) -> None:
    if model is not None and fingerprint(model) != document["fingerprint"]:
        raise ArtifactError(
            f"{folder / PLAN_FILE}: base: describes another architecture than was pruned (its fingerprint differs)"
        )


def check_base(model: nn.Module | None, document: PlanDocument, folder: Path) -> None:
    """ArtifactError where a dense model that was given is of another architecture than the saved one."""
    if model is None:
        return
    found = fingerprint(model)
    if found != document["fingerprint"]:
        raise ArtifactError(
            f"{folder}: was made from another architecture than {type(model).__name__} as given "
            f"(fingerprint {document['fingerprint']}, here {found})"
        )


def example_of(document: PlanDocument, where: str = PLAN_FILE) -> Any:
    """One zero sample of the inputs that plan.json records (`inputs_from`); ArtifactError where it records none."""
    if document.get("input") is None:
        raise ArtifactError(f"{where}: does not say the input's shape; give CONFIG")
    return inputs_from(document["input"], where)


def _roots(plan: Plan) -> dict[str, dict[str, Any]]:
    """For each group a tensor whose size follows from its width alone: size = per_unit * width.

    It ties the kept indices to the tensors, so that a mismatch shows when the folder is loaded.
    """
    space = plan.space
    roots: dict[str, dict[str, Any]] = {}
    for group, first in zip(space.groups, space.offsets, strict=True):
        for cut in space.cuts:
            axis = space.axes[cut.axis]
            inside = (axis.slots >= first) & (axis.slots < first + group.units)
            if inside.all() and axis.length % group.width == 0:
                roots[group.name] = {
                    "tensor": cut.tensor, "dim": int(cut.dim), "per_unit": axis.length // group.width
                }  # fmt: skip
                break
    return roots


def check_against_plan(tensors: Mapping[str, Tensor], plan: Plan) -> None:
    """Every tensor that the plan cuts has the size that the plan gives it."""
    indices = axis_indices(plan.space, plan.kept)
    sizes = {cut.axis: axis_length(plan.space, cut.axis, indices) for cut in plan.space.cuts}
    empty = {cut.tensor for cut in plan.space.cuts if sizes[cut.axis] == 0}
    for cut in plan.space.cuts:
        size, tensor = sizes[cut.axis], tensors.get(cut.tensor)
        if tensor is None and cut.tensor in empty:
            continue  # the part is dropped
        if tensor is None or cut.dim >= tensor.ndim or tensor.shape[cut.dim] != size:
            shape = None if tensor is None else tuple(tensor.shape)
            raise ArtifactError(
                f"save: {cut.tensor!r} has shape {shape}, the plan needs {size} in dimension {cut.dim}: "
                "the model was not made with this plan"
            )
