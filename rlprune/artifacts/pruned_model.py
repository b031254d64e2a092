"""Pruned models and policies on disk: tensors in safetensors, everything else in JSON, never pickle.

A pruned model's folder holds `model.safetensors` and `plan.json`. Loading builds the dense
architecture (from an allow-list, or the model passed in), puts the small tensors in by name and sets the
integer attributes that surgery changed: nothing is traced and no code is named by the files. An adapter may add what
other tools need to load the folder alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArtifactError, near_miss
from ..pruning.plan import Plan
from ..pruning.space import fingerprint
from ..pruning.surgery import attributes, axis_indices
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
from ..utils.torch_internals import buffer_slots, parameter_slots
from .documents import PLAN_FILE, VERSION, PlanDocument, is_count, read_plan
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


def save_pruned(slim: nn.Module, plan: Plan, directory: str | Path, base: Mapping[str, object]) -> None:
    """Write the tensors and the plan of a pruned model into a folder, which is replaced as a whole or not at all.

    Args:
        base: how to build the dense architecture, ``{"source", "name", "arguments"}``; {"source": "given"} means
            that loading needs the model.

    Raises ArtifactError: tensors that do not fit the plan, NaN weights, or a folder that cannot be written.
    """
    tensors = {name: tensor.detach() for name, tensor in slim.state_dict().items()}
    refuse_nan(tensors, "the model")
    check_against_plan(tensors, plan)
    document = plan_document(plan, base, {name: tensor.shape for name, tensor in tensors.items()})
    with replacing_folder(directory, PLAN_FILE) as folder:
        write_tensors_atomic(folder / MODEL_FILE, tensors, {"format": "pt", "rlprune": str(VERSION)})
        write_json_atomic(folder / PLAN_FILE, document)


def plan_document(
    plan: Plan, base: Mapping[str, object], shapes: Mapping[str, Sequence[int]]
) -> dict[str, Any]:
    """The content of plan.json for a model of these tensors."""
    return {
        "format": "rlprune pruned model",
        "version": VERSION,
        "base": dict(base),
        **plan.to_dict(),
        "budget": {"target": plan.origin.get("budget"), "metric": plan.origin.get("metric", "macs")},
        "attributes": attributes(plan.space, plan),
        "roots": _roots(plan),
        "tensors": {name: list(shape) for name, shape in shapes.items()},
        "libraries": library_versions(),
    }


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
    model = rebuild(document["base"]) if base is None else copy.deepcopy(base)
    check_base(model, document, folder)
    _put_tensors(model, tensors, where)
    _set_attributes(model, document["attributes"], str(folder / PLAN_FILE))
    return model.cpu().eval()


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


def example_of(document: PlanDocument) -> Tensor:
    """One zero sample of the shape that plan.json records; ArtifactError where it records none."""
    shape = document.get("input")
    if not shape:
        raise ArtifactError("plan.json: does not say the input's shape; give CONFIG")
    return torch.zeros(1, *shape[1:])


def _roots(plan: Plan) -> dict[str, dict[str, Any]]:
    """For each group a tensor whose size follows from its width alone: size = per_unit * width.

    It ties the kept indices to the tensors, so that a mismatch shows when the folder is loaded.
    """
    space = plan.space
    roots: dict[str, dict[str, Any]] = {}
    for group, first in zip(space.groups, space.offsets, strict=True):
        for cut in space.cuts:
            slots = space.axes[cut.axis].slots
            inside = (slots >= first) & (slots < first + group.width)
            if inside.all() and len(slots) % group.width == 0:
                roots[group.name] = {
                    "tensor": cut.tensor, "dim": int(cut.dim), "per_unit": len(slots) // group.width
                }  # fmt: skip
                break
    return roots


def check_against_plan(tensors: Mapping[str, Tensor], plan: Plan) -> None:
    """Every tensor that the plan cuts has the size that the plan gives it."""
    indices = axis_indices(plan.space, plan.kept)
    for cut in plan.space.cuts:
        index = indices[cut.axis]
        size = len(plan.space.axes[cut.axis].slots) if index is None else len(index)
        tensor = tensors.get(cut.tensor)
        if tensor is None or cut.dim >= tensor.ndim or tensor.shape[cut.dim] != size:
            shape = None if tensor is None else tuple(tensor.shape)
            raise ArtifactError(
                f"save: {cut.tensor!r} has shape {shape}, the plan needs {size} in dimension {cut.dim}: "
                "the model was not made with this plan"
            )


def _put_tensors(model: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Replace all parameters and buffers by the tensors of the file, whatever their sizes; ties stay tied."""
    own = model.state_dict()
    missing, foreign = sorted(set(own) - set(tensors)), sorted(set(tensors) - set(own))
    if missing or foreign:
        name = (missing or foreign)[0]
        state = "lacks" if missing else "holds the unknown"
        raise ArtifactError(f"{where}: {state} tensor {name!r}{near_miss(name, foreign if missing else own)}")
    shared: dict[int, nn.Parameter] = {}
    for name, tensor in tensors.items():
        old = own[name]
        if tensor.ndim != old.ndim or any(
            new > was for new, was in zip(tensor.shape, old.shape, strict=True)
        ):
            raise ArtifactError(
                f"{where}: {name!r} has shape {list(tensor.shape)}, which does not fit {list(old.shape)} of the base"
            )
        path, _, last = name.rpartition(".")
        module = model.get_submodule(path)
        parameter = parameter_slots(module).get(last)
        if parameter is None:
            buffer_slots(module)[last] = tensor
        else:
            new = nn.Parameter(tensor, parameter.requires_grad)
            parameter_slots(module)[last] = shared.setdefault(id(parameter), new)


def _set_attributes(model: nn.Module, wanted: Mapping[str, object], where: str) -> None:
    """Set integer attributes of modules, and only ones that are there and are integers already."""
    modules = dict(model.named_modules())
    for name, values in wanted.items():
        if name not in modules or not isinstance(values, dict):
            raise ArtifactError(
                f"{where}: attributes: the base has no module {name!r}{near_miss(name, modules)}"
            )
        for attribute, value in values.items():
            old = vars(modules[name]).get(attribute)
            if attribute.startswith("_") or not is_count(old) or not is_count(value):
                raise ArtifactError(
                    f"{where}: attributes: {name}.{attribute} = {value!r} is not a size that may be set"
                )
            setattr(modules[name], attribute, value)
