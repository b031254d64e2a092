"""Pruning a checkpoint on disk: a plan is applied tensor by tensor, for models that do not fit into memory twice.

The result is the folder that `rlprune.save(rlprune.prune(model, plan), plan, ...)` writes, to the bit, but the
dense weights are never in memory together: one tensor is read, cut, written and dropped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...artifacts.documents import PLAN_FILE, PlanDocument, read_plan
from ...artifacts.safetensors import MAX_SHARD_SIZE, TensorFiles
from ...errors import ArtifactError, near_miss
from ...pruning.cost_metrics import with_registered_costs
from ...pruning.plan import Plan
from ...pruning.space import PruningSpace, fingerprint
from ...pruning.surgery import axis_indices, cut_tensor, cuts_by_tensor, prune
from ...tracing.trace import TraceOptions
from ..space import language_space
from . import pretrained
from .folder import write_language_model
from .reading import source_names

if TYPE_CHECKING:
    pass


def prune_shards(
    source: str | Path,
    plan: Plan | str | Path,
    out: str | Path,
    *,
    max_shard_size: str | int = MAX_SHARD_SIZE,
) -> Path:
    """Apply a plan to a language model's checkpoint folder and write the pruned model's folder.

    Args:
        source: a transformers folder: config.json and safetensors, in one file or in shards; tokenizer files and
            the generation config are taken along.
        plan: a `Plan` made for this architecture (on ``meta``, say), a plan.json, or a folder with one.
        out: new, empty, or an earlier pruned model written by rlprune.
        max_shard_size: a larger model is written as several files.

    Raises ArtifactError: files that are missing, damaged, quantised or of another architecture than the plan.
    """
    folder = Path(source)
    files = TensorFiles(folder)
    dense = dense_skeleton(folder, files)
    if isinstance(plan, Plan):
        chosen = plan
    else:
        document = read_plan(plan)
        chosen = Plan.from_dict(document, space_of(dense, document))
    try:
        slim = prune(dense, chosen)
    except Exception as error:  # a plan for other shapes fails somewhere in the slicing
        raise ArtifactError(f"{folder}: the plan does not fit this checkpoint ({error})") from error
    names = source_names(dense, files)
    cuts = cuts_by_tensor(chosen.space, axis_indices(chosen.space, chosen.kept))
    dtypes = {name: entry.dtype for name, entry in pretrained.stored_entries(slim).items()}

    def stream(wanted: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        for name, (found, tensor) in zip(wanted, files.read([names[n] for n in wanted]), strict=True):
            tensor = cut_tensor(tensor, cuts.get(name, ())).to(dtypes[name])
            pretrained.refuse_nan(found, tensor, files.where(found))
            yield name, tensor

    stored = pretrained.stored_entries(slim)
    base = {"name": folder.name}
    return write_language_model(slim, chosen, out, stored, stream, base, folder, max_shard_size)


def dense_skeleton(folder: str | Path, files: TensorFiles | None = None) -> Any:
    """The dense model of a checkpoint folder on ``meta``: enough to trace it, to cost it and to plan.

    Its tensors have the number format that transformers would load them in.
    Raises ArtifactError for a configuration that is not supported.
    """
    path = Path(folder)
    fields = pretrained.read_fields(path)
    if fields.get("quantization_config") is not None:
        raise ArtifactError(
            f"{path / pretrained.CONFIG}: quantization_config: quantised weights cannot be cut"
        )
    try:
        config = pretrained.build_config(fields)
    except ArtifactError as error:
        raise ArtifactError(f"{path / pretrained.CONFIG}: {error}") from error
    model: Any = pretrained.skeleton(config)
    entries = (files if files is not None else TensorFiles(path)).entries
    stored = next((e.dtype for e in entries.values() if e.dtype.is_floating_point), torch.float32)
    model.to(getattr(config, "dtype", None) or stored)
    pretrained.put_generation(model, path)
    return model


def stored_as_held(folder: str | Path) -> bool:
    """Whether a checkpoint holds the experts of its layers in the tensors that the model has.

    Most name each expert apart, and transformers puts them together on loading: such a file is not cut as it lies.
    """
    files = TensorFiles(Path(folder))
    model = dense_skeleton(folder, files)
    prefix = f"{model.base_model_prefix}."
    fused = [name for name, parameter in model.named_parameters() if parameter.ndim == 3]
    return all(name in files.entries or name.removeprefix(prefix) in files.entries for name in fused)


def space_of(model: nn.Module, document: PlanDocument) -> PruningSpace:
    """The pruning space in which a saved plan was made; the model may be on ``meta``.

    Raises ArtifactError: a group of the plan is none of the model's.
    """
    names = [group["name"] for group in document["groups"]]
    shape = document.get("input") or [1, 8]
    example = torch.zeros((1, int(shape[-1])), dtype=torch.long)
    drop = any(width == 0 for width in document["widths"])

    def traced(ignore: Sequence[str]) -> PruningSpace:
        options = TraceOptions(ignore=ignore, round_to=1, verify=False, drop=drop, hidden="hidden" in names)
        space = language_space(model, example, fingerprint(model), options)
        return with_registered_costs(space, model)

    space = traced(())
    own = [group.name for group in space.groups]
    foreign = sorted(set(names) - set(own))
    if foreign:
        raise ArtifactError(f"{PLAN_FILE}: the model has no group {foreign[0]!r}{near_miss(foreign[0], own)}")
    left_out = [name for name in own if name not in names]
    return traced(left_out) if left_out else space
