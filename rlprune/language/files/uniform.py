"""A pruned language model as a plain transformers folder, where its layers have equal widths.

Such a folder needs no custom code, so everything that reads the family's checkpoints reads it: transformers
without ``trust_remote_code``, vLLM, llama.cpp's converter. Blocks that were dropped whole are left out and the
others numbered anew.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ...artifacts.documents import PLAN_FILE, VERSION
from ...artifacts.fitting import checksum
from ...artifacts.safetensors import MAX_SHARD_SIZE, Entry, write_checkpoint
from ...errors import ArtifactError, BudgetError
from ...pruning.space import PruningSpace
from ...utils.arrays import Ints
from ...utils.files import replacing_folder, write_json_atomic
from ...workloads.adapter import TokenizerSource, read_pruned
from .. import families
from ..sizes import layer_sizes
from . import pretrained
from .mark import MARK
from .reading import load_folder
from .tokenizers import write_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MARKER = "rlprune_export.json"
_CHECKED_TOKENS = (2, 9)  # sequences and their length in the check of what was written
_PART = re.compile(r"^.*?\.(\d+)\.(.+)$")  # a part's block and its name in there


class NotUniform(ArtifactError):
    """The model cannot be written as a plain folder; the message says which layer or tensor stands in the way."""


@dataclass(frozen=True)
class PlainForm:
    """How a pruned model looks to stock transformers: its configuration, and stored name -> name in ``slim``."""

    config: Mapping[str, Any]
    names: Mapping[str, str]
    entries: Mapping[str, Entry]


def equal_widths(
    space: PruningSpace, budget: str | float, metric: str = "macs", dropped_blocks: Sequence[int] = ()
) -> Ints:
    """Widths (G,) with one number of neurons for all blocks, within a budget; heads and hidden size stay.

    The number is the largest that fits: a multiple of the step, or the dense one. The blocks with the indices
    ``dropped_blocks`` go whole, which takes a space that was traced with ``drop``.

    Raises BudgetError: the blocks cannot be made alike, or no number of neurons meets the budget.
    """
    dropped = set(dropped_blocks)
    neurons = np.array([g.kind == "ffn" and g.block not in dropped for g in space.groups])
    kept = [g for g, chosen in zip(space.groups, neurons, strict=True) if chosen]
    if not kept:
        raise BudgetError("same widths: no block with a feed-forward part that can be pruned is left")
    _check_alike(space, dropped)
    base = np.where([g.block in dropped for g in space.groups], 0, space.widths)
    dense, step = kept[0].width, kept[0].step
    # A feed-forward part without neurons has no plain form.
    lowest = max(1, -(-kept[0].minimum // step)) * step
    choices = [*range(lowest, dense, step), dense]

    def cost(count: int) -> float:
        return float(space.cost(np.where(neurons, count, base), metric))

    target = space.target(budget, metric)
    fitting = bisect_right(choices, target, key=cost)
    if not fitting:
        low, high, whole = cost(choices[0]), cost(dense), space.dense_cost(metric)
        raise BudgetError(
            f"budget: {budget!r} ({target:.6g} {metric}) is below what equal widths reach with {len(dropped)} "
            f"blocks dropped; feasible: {low:.6g} to {high:.6g} {metric} (ratio {low / whole:.4f} to "
            f"{high / whole:.4f}); more dropped blocks save more"
        )
    widths: Ints = np.where(neurons, choices[fitting - 1], base)
    return widths


def _check_alike(space: PruningSpace, dropped: set[int]) -> None:
    """BudgetError unless the dropped blocks may go and all others can have the same neurons."""
    for g in space.groups:
        if g.block in dropped and g.minimum > 0:
            raise BudgetError(f"same widths: {g.name!r} may not be dropped; set prune.drop=true")
    missing = dropped - {g.block for g in space.groups if g.block >= 0}
    if missing:
        raise BudgetError(f"same widths: there is no block {min(missing)} that could be dropped")
    kept = [g for g in space.groups if g.kind == "ffn" and g.block not in dropped]
    for g in kept:
        if g.width != kept[0].width:
            raise BudgetError(
                f"same widths: {g.name!r} has {g.width} neurons and {kept[0].name!r} has {kept[0].width}"
            )
    ffn = {match[2] for g in kept if (match := _PART.match(g.name))}
    for name, reason in space.protected.items():
        match = _PART.match(name)
        if match and (int(match[1]) in dropped or match[2] in ffn):
            raise BudgetError(f"same widths: {name!r} stays as it is ({reason}), the others cannot follow")


def plain_obstacle(model: nn.Module) -> str:
    """Why a pruned causal language model has no plain form; empty where it has one."""
    slim = pretrained.pretrained_model(model)
    try:
        plain_form(slim)
    except NotUniform as reason:
        return str(reason)
    for block, layer in zip(families.blocks_of(slim), layer_sizes(slim), strict=True):  # both parts are there
        if not any(layer[name] for name in _cut(slim)):
            for name in (block.out, block.down):
                bias = getattr(slim.get_submodule(name), "bias", None)
                if bias is not None and bool(bias.any()):
                    return f"the dropped block {block.index} leaves the bias of {name!r}"
    return ""


def plain_form(slim: PreTrainedModel) -> PlainForm:
    """The plain form of a pruned causal language model; NotUniform says why there is none."""
    sizes = layer_sizes(slim)
    mixed = families.why_never_plain(slim)
    if mixed:
        raise NotUniform(mixed)
    kept = [index for index, layer in enumerate(sizes) if any(layer[name] for name in _cut(slim))]
    if not kept:
        raise NotUniform("every block was dropped")
    for index in kept:
        for name, size in sizes[index].items():
            if size != sizes[kept[0]][name]:
                raise NotUniform(
                    f"layers differ: {name} is {sizes[kept[0]][name]} in layer {kept[0]} and {size} in layer {index}"
                )
    fields = _fields(slim, sizes[kept[0]], kept, len(sizes))
    try:
        twin = pretrained.skeleton(pretrained.build_config(fields))
    except ArtifactError as error:
        raise NotUniform(str(error)) from error
    wanted, own = pretrained.stored_entries(twin), pretrained.stored_entries(slim)
    names = _renumbered(own, families.family_of(slim).blocks, kept)
    for name in [*names, *wanted]:
        found = own.get(names.get(name, ""))
        if name not in wanted or found is None or found.shape != wanted[name].shape:
            shape = None if found is None else list(found.shape)
            due = list(wanted[name].shape) if name in wanted else None
            raise NotUniform(f"{name!r} has shape {shape}, the plain {type(twin).__name__} wants {due}")
    fields["architectures"] = [type(twin).__name__]
    config = pretrained.plain_config(pretrained.build_config(fields))
    names = {pretrained.published_name(config["model_type"], name): source for name, source in names.items()}
    return PlainForm(config, names, {name: own[source] for name, source in names.items()})


def write_plain(
    slim: PreTrainedModel,
    out: str | Path,
    *,
    tokenizer: TokenizerSource | None = None,
    max_shard_size: str | int = MAX_SHARD_SIZE,
) -> Path:
    """Write the plain folder and check it: stock transformers has to give the same logits to the bit.

    Args:
        tokenizer: the tokenizer, or a folder whose tokenizer files are copied.

    Raises:
        NotUniform: there is no plain form, or its outputs differ (a dropped part that leaves a bias, say).
        ArtifactError: the folder cannot be written.
    """
    form = plain_form(slim)
    tensors = slim.state_dict()

    def stream(names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        for name in names:
            pretrained.refuse_nan(name, tensors[form.names[name]], "the model")
            yield name, tensors[form.names[name]]

    with replacing_folder(out, MARKER) as folder:
        write_checkpoint(folder, form.entries, stream, max_shard_size, {"format": "pt"})
        write_json_atomic(folder / pretrained.CONFIG, dict(form.config))
        generation = getattr(slim, "generation_config", None)
        if generation is not None:
            write_json_atomic(folder / pretrained.GENERATION, json.loads(generation.to_json_string()))
        write_tokenizer(folder, tokenizer)
        write_json_atomic(folder / MARKER, {"format": "rlprune export", "tensors": len(form.entries)})
        _check(slim, folder)
    return Path(out)


def export_folder(directory: str | Path, out: str | Path | None = None) -> tuple[Path, str]:
    """The folder of a pruned language model for other tools, and one line on what it needs.

    Plain where that is possible; else the same per-layer folder again, for ``trust_remote_code=True``.

    Args:
        directory: written by `rlprune.save`.
        out: the new folder; ``hf`` inside of ``directory`` by default.

    Raises ArtifactError: not the folder of a language model, damaged files, outputs that differ.
    """
    source = Path(directory)
    target = source / "hf" if out is None else Path(out)
    document = read_pruned(source)
    if document["base"].get("source") != pretrained.SOURCE:
        raise ArtifactError(f"--to hf: {source} holds no language model of transformers")
    slim = load_folder(source, document)
    try:
        write_plain(slim, target, tokenizer=source)
        return target, "loads with transformers alone, without trust_remote_code"
    except NotUniform as reason:
        why = str(reason)
    config = pretrained.read_fields(source)
    entries, tensors = pretrained.stored_entries(slim), slim.state_dict()

    def stream(names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        return ((name, tensors[name]) for name in names)

    # A folder that another tool wrote gets its plan, and the checksums of the weights that it has now.
    document["tensors"] = {name: list(entry.shape) for name, entry in entries.items()}
    document["checksums"] = {name: checksum(tensors[name]) for name in entries}
    with replacing_folder(target, PLAN_FILE) as folder:
        write_checkpoint(folder, entries, stream, metadata={"format": "pt", MARK: str(VERSION)})
        pretrained.write_side_files(folder, config, slim, source)
        write_json_atomic(folder / PLAN_FILE, dict(document))
        _same(slim, load_folder(folder, document), "the folder written")
    return target, f"needs trust_remote_code=True: {why}"


def _cut(slim: PreTrainedModel) -> tuple[str, str]:
    heads, _, neurons = families.family_of(slim).sizes
    return heads, neurons


def _fields(
    slim: PreTrainedModel, sizes: Mapping[str, int], kept: Sequence[int], depth: int
) -> dict[str, Any]:
    """The dense model's fields with one size for all layers and the number of blocks that are left."""
    fields = pretrained.dense_fields(slim.config)
    dense = pretrained.build_config(fields)
    heads = families.family_of(slim).sizes[0]
    if sizes[heads] != getattr(dense, heads):
        # The hidden size no longer says what a head's size is. Families that do not read it are found out later.
        fields["head_dim"] = families.blocks_of(slim)[kept[0]].head_dim
    # A size that the family derives (GPT-2's empty n_inner) stays derived where it is the dense one.
    fields |= {name: size for name, size in sizes.items() if getattr(dense, name, None) != size}
    if len(kept) < depth:
        fields[dense.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = len(kept)
        for name, value in fields.items():
            if "layer" in name and isinstance(value, list) and len(value) == depth:
                fields[name] = [value[index] for index in kept]  # layer_types, no_rope_layers, ...
    return fields | {"dtype": pretrained.one_dtype(slim)}


def _renumbered(names: Mapping[str, Entry], blocks: str, kept: Sequence[int]) -> dict[str, str]:
    """Name in the plain folder -> name in the pruned model, without the blocks that are left out."""
    place = {str(old): str(new) for new, old in enumerate(kept)}
    found = {}
    for name in names:
        if not name.startswith(f"{blocks}."):
            found[name] = name
            continue
        index, _, rest = name.removeprefix(f"{blocks}.").partition(".")
        if index in place:
            found[f"{blocks}.{place[index]}.{rest}"] = name
    return found


def _check(slim: PreTrainedModel, folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    with pretrained.quiet_loading():
        plain = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    _same(slim, plain, "the plain model")


def _same(slim: PreTrainedModel, other: PreTrainedModel, what: str) -> None:
    """Raise NotUniform unless both give the same logits to the bit on random tokens."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(slim.config.get_text_config().vocab_size, _CHECKED_TOKENS, generator=generator)
    was = slim.training
    with torch.no_grad():
        wanted = slim.eval()(input_ids=ids.to(slim.device)).logits.cpu()
        found = other.eval()(input_ids=ids).logits
    slim.train(was)
    if not torch.equal(wanted, found):
        difference = float((wanted - found).abs().max())
        raise NotUniform(f"{what} gives other logits (by up to {difference:.2g})")
