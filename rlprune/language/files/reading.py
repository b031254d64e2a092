"""Reading the folder of a pruned causal language model: its files are checked against each other first.

Where rlprune wrote them all, every tensor has to be the one that was saved. Where another tool wrote the weights since
(PEFT's merge, the Trainer, ``save_pretrained``), config.json rules, and plan.json has to agree with the sizes.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ...artifacts.documents import PLAN_FILE, ForeignFolderWarning, PlanDocument
from ...artifacts.fitting import check_checksum, checksum
from ...artifacts.safetensors import Entry, TensorFiles
from ...errors import ArtifactError, near_miss
from ...pruning.space import fingerprint
from ..sizes import layer_sizes
from .mark import check_mark
from .pretrained import (
    CONFIG,
    IDLE,
    OWN,
    SAID_TWICE,
    build_config,
    dense_fields_of,
    model_of,
    plain_config,
    published_name,
    put_generation,
    read_config,
    read_fields,
    refuse_nan,
    short_dtype,
    skeleton,
    stored_entries,
    uneven_fields,
    with_classes,
)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# Buffers that older checkpoints hold and that models now compute themselves.
_COMPUTED = (
    ".rotary_emb.inv_freq",
    ".attn.bias",
    ".attn.masked_bias",
    ".attention.bias",
    ".attention.masked_bias",
)


def load_folder(folder: Path, document: PlanDocument) -> PreTrainedModel:
    """The pruned model of a folder, on the CPU; every file is checked against plan.json (``document``) first.

    Where another tool wrote the weights since (PEFT, the Trainer), sizes have to agree and values may be any.

    Warns ForeignFolderWarning: the checksums in plan.json are those of other weights.
    """
    files = TensorFiles(folder)
    config = (_foreign_config if files.foreign else _checked_config)(folder, document)
    if "checksums" in document:
        check_mark(read_fields(folder), document["groups"], folder / CONFIG)
    if files.foreign:
        names = source_names(skeleton(config), files)
    else:
        _check_entries(files, config, document)
        names = {name: name for name, entry in files.entries.items() if 0 not in entry.shape}
    dense = skeleton(read_config(document["base"]["config"], folder / PLAN_FILE, "base.config."))
    if fingerprint(dense) != document["fingerprint"] and not _has_empty_layers(document):
        raise ArtifactError(
            f"{folder / PLAN_FILE}: base.config: describes another architecture than was pruned"
        )
    state, changed = {}, []
    for name, (found, tensor) in zip(names, files.read(list(names.values())), strict=True):
        refuse_nan(found, tensor, files.where(found))
        if "checksums" in document:
            if not files.foreign:
                check_checksum(name, tensor, document["checksums"], files.where(found))
            elif document["checksums"].get(name) != checksum(tensor):
                changed.append(name)
        state[name] = tensor
    if changed:
        where = files.where(next(iter(names.values())))
        warnings.warn(
            f"{where}: another tool has written the weights since {PLAN_FILE} ({len(changed)} of "
            f"{len(names)} tensors differ); their sizes are those of the plan, its checksums no longer apply",
            ForeignFolderWarning,
            stacklevel=2,
        )
    with_classes(config)
    model = model_of(config, state)
    put_generation(model, folder)
    return model


def _foreign_config(folder: Path, document: PlanDocument) -> PreTrainedConfig:
    """config.json as another tool left it; ArtifactError where its architecture is no longer that of plan.json."""
    path = folder / CONFIG
    config = read_config(read_fields(folder), path)
    dense = skeleton(read_config(dense_fields_of(read_fields(folder)), path))
    base = document["base"].get("config")
    uneven = uneven_fields(base) if isinstance(base, dict) else {}
    same = layer_sizes(skeleton(config)) == document.get("layers")
    if not same or (not uneven and fingerprint(dense) != document["fingerprint"]):
        what = "its sizes" if not same else "its architecture"
        raise ArtifactError(
            f"{folder / PLAN_FILE}: is of another model than {CONFIG} and the weights next to it, which another tool "
            f"wrote since ({what} differ); delete {PLAN_FILE} to go by {CONFIG}"
        )
    return config


def _has_empty_layers(document: PlanDocument) -> bool:
    """Whether the base is a pruned model of version 1, which kept empty layers in place of dropped parts."""
    base = document["base"]["config"]
    sizes = uneven_fields(base).get("per_layer_config")
    return isinstance(sizes, dict) and any(0 in layer.values() for layer in sizes.values())


def _read_again(base: Mapping[str, Any]) -> dict[str, Any]:
    """What a dense configuration holds as null, at the top or inside, as its class gives it."""
    unsaid = [name for name, value in base.items() if value is None or isinstance(value, Mapping)]
    again = plain_config(build_config(base)) if unsaid else {}
    return {name: again[name] for name in unsaid if name in again}


def _checked_config(folder: Path, document: PlanDocument) -> PreTrainedConfig:
    """config.json as an object, after it was compared with plan.json field by field."""
    path = folder / CONFIG
    fields, base = read_fields(folder), document["base"].get("config")
    if not isinstance(base, dict) or not isinstance(document.get("layers"), list):
        name = "base.config" if not isinstance(base, dict) else "layers"
        raise ArtifactError(f"{folder / 'plan.json'}: damaged: the field {name!r} is missing")
    meant = {**base, **_read_again(base)}  # some classes read null as a default
    for name in {**base, **fields}:
        if name in OWN or name in IDLE or name == "dtype":
            continue
        if fields.get(name) not in (base.get(name), meant.get(name)):
            raise ArtifactError(f"{path}: {name}: is {fields.get(name)!r}, plan.json says {base.get(name)!r}")
    if "pruned_layers" in fields:
        _check_listed(fields["pruned_layers"], document["layers"], path)
    else:
        _check_layers(fields.get("per_layer_config", {}), base, document["layers"], path)
        fields |= {"per_layer_config": fields.get("per_layer_config", {})}
    for name in SAID_TWICE:
        if fields.get(name) != document.get(name):
            raise ArtifactError(
                f"{path}: {name}: is {fields.get(name)!r}, plan.json says {document.get(name)!r}"
            )
    return read_config(fields, path)


def _check_listed(given: object, layers: Sequence[object], path: Path) -> None:
    """The sizes in config.json, a table for each layer, are those in plan.json."""
    if not isinstance(given, list) or len(given) != len(layers):
        raise ArtifactError(f"{path}: pruned_layers: must be a list of {len(layers)} tables of sizes")
    for index, (found, wanted) in enumerate(zip(given, layers, strict=True)):
        if found != wanted:
            raise ArtifactError(f"{path}: pruned_layers.{index}: is {found!r}, plan.json says {wanted!r}")


def _check_layers(sparse: object, base: Mapping[str, object], layers: Sequence[object], path: Path) -> None:
    """The sizes in config.json are those in plan.json."""
    field = f"{path}: per_layer_config"
    if not isinstance(sparse, dict):
        raise ArtifactError(f"{field}: must be a table of layers")
    given: dict[int, Any] = {}
    for key, values in sparse.items():
        if not key.isdecimal() or int(key) >= len(layers) or not isinstance(values, dict):
            raise ArtifactError(
                f"{field}.{key}: must be one of the layers 0 to {len(layers) - 1} and its sizes"
            )
        given[int(key)] = values
    for index, wanted in enumerate(layers):
        if not isinstance(wanted, dict):
            raise ArtifactError(f"{path.parent / 'plan.json'}: damaged: layers.{index} is no table of sizes")
        found = given.get(index, {})
        for name in found:
            if name not in wanted:
                raise ArtifactError(f"{field}.{index}.{name}: unknown size{near_miss(name, wanted)}")
        for name, size in wanted.items():
            value = found.get(name, base.get(name, size))
            # Where the family's own field is empty the dense size follows from others, and so does this one.
            if value is not None and value != size:
                raise ArtifactError(f"{field}.{index}.{name}: is {value!r}, plan.json says {size!r}")


def _check_entries(files: TensorFiles, config: PreTrainedConfig, document: PlanDocument) -> None:
    """The files hold the tensors that plan.json lists, in the shapes that config.json asks for and of its format."""
    wanted = stored_entries(skeleton(config))
    # Folders of version 1 also hold the empty tensors of dropped parts.
    listed = {name: shape for name, shape in document["tensors"].items() if name in wanted or 0 not in shape}
    held = {name: entry for name, entry in files.entries.items() if name in wanted or 0 not in entry.shape}
    at = str(files.folder / "model.safetensors") if files.index is None else str(files.index)
    missing, foreign = sorted(set(listed) - set(held)), sorted(set(held) - set(listed))
    if missing:
        raise ArtifactError(f"{at}: the tensor {missing[0]!r} is missing{near_miss(missing[0], foreign)}")
    if foreign:
        raise ArtifactError(
            f"{files.where(foreign[0])}: holds the tensor {foreign[0]!r}, which plan.json does not list"
        )
    if set(wanted) != set(listed):
        name = sorted(set(wanted) ^ set(listed))[0]
        raise ArtifactError(f"{files.folder / 'plan.json'}: tensors: {name!r} does not fit config.json")
    for name, entry in held.items():
        if list(entry.shape) != listed[name]:
            raise ArtifactError(
                f"{files.where(name)}: {name!r} has shape {list(entry.shape)}, plan.json says {listed[name]}"
            )
        if entry.shape != wanted[name].shape:
            raise ArtifactError(
                f"{files.where(name)}: {name!r} has shape {list(entry.shape)}, "
                f"config.json asks for {list(wanted[name].shape)}"
            )
        if entry.dtype.is_floating_point and entry.dtype != config.dtype:
            raise ArtifactError(
                f"{files.folder / CONFIG}: dtype: is {short_dtype(config.dtype)}, "
                f"but {name!r} is stored as {short_dtype(entry.dtype)}"
            )


def source_names(model: PreTrainedModel, files: TensorFiles) -> dict[str, str]:
    """Stored name of a model -> name in its files, which may lack the prefix or name another tied tensor.

    Raises ArtifactError: a tensor is missing, of another shape, or none of the model's; the file is named.
    """
    wanted = stored_entries(model)
    aliases = _aliases(model)
    prefix = f"{model.base_model_prefix}."
    names: dict[str, str] = {}
    used: set[str] = set()
    for name, entry in wanted.items():
        spellings = [s for alias in aliases[name] for s in (alias, alias.removeprefix(prefix))]
        spellings.append(published_name(model.config.model_type, name))
        found = next((s for s in spellings if s in files.entries), None)
        if found is None:
            hint = near_miss(name, files.entries)
            raise ArtifactError(f"{files.folder}: the tensor {name!r} is missing{hint}")
        _check_shape(files, found, entry)
        names[name] = found
        used |= set(spellings)
    for name, entry in files.entries.items():
        if name not in used and not name.endswith(_COMPUTED) and 0 not in entry.shape:
            raise ArtifactError(
                f"{files.where(name)}: holds the tensor {name!r}, which {type(model).__name__} has not"
            )
    return names


def _check_shape(files: TensorFiles, name: str, entry: Entry) -> None:
    found = files.entries[name]
    if found.shape != entry.shape:
        raise ArtifactError(
            f"{files.where(name)}: {name!r} has shape {list(found.shape)}, {CONFIG} asks for {list(entry.shape)}"
        )


def _aliases(model: nn.Module) -> dict[str, list[str]]:
    """The first name of each tensor -> all its names."""
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(
        model.named_buffers(remove_duplicate=False)
    )
    first: dict[int, str] = {}
    names: dict[str, list[str]] = {}
    for name, tensor in tensors.items():
        names.setdefault(first.setdefault(id(tensor), name), []).append(name)
    return names
