"""Weights from outside into a model: finding the state dict in what a trainer wrote, whatever it was wrapped in.

Every tensor of a file has a whole name: the keys of the dicts around it and its own name, joined by dots. A state
dict is then a prefix under which all names of the model are found, be it "", "state_dict", "model.module._orig_mod" or
"teacher.backbone"; no list of keys and no order of wrappers has to be known.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import ArtifactError, near_miss
from ..utils.finite import all_finite
from .weight_files import SUFFIXES as SUFFIXES
from .weight_files import read_weight_file
from .weight_names import COMPUTED, Names

_MOST_VALUES = 5_000_000
_DEEPEST = 30


class CheckpointWarning(UserWarning):
    """A checkpoint fits, but not all of it was used, or a layer of the model keeps its random start."""


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a file by their whole names, and the dict that each of them lies in (its dotted path)."""

    tensors: Mapping[str, Tensor]
    holders: Mapping[str, str] = field(default_factory=dict)
    key: str | None = None
    """What ``model.checkpoint_key`` chose: all whole names begin with it; "." is the top of the file."""


def load_checkpoint(path: str | Path, key: str | None = None) -> Checkpoint:
    """Read the tensors of a checkpoint onto the CPU; `put_weights` finds the model's among them.

    Code in a file is never run (see `weight_files`). ``key`` (``model.checkpoint_key``) keeps what lies under a dotted
    path, such as "state_dict_ema" or "state_dict.encoder_q"; "." prefers what lies at the top.

    Raises ArtifactError: see `read_weight_file`; no tensor with a name; no such key (with the near miss).
    """
    tensors: dict[str, Tensor] = {}
    holders: dict[str, str] = {}
    for name, holder, tensor in _tensors(read_weight_file(path), str(path)):
        tensors[name], holders[name] = tensor, holder
    if not tensors:
        raise ArtifactError(f"checkpoint {str(path)!r}: holds no state dict (no tensor that has a name)")
    if key is None or key == ".":
        return Checkpoint(tensors, holders, key)
    kept = {name: tensor for name, tensor in tensors.items() if name.startswith(f"{key}.")}
    if not kept:
        known = list(dict.fromkeys([*filter(None, holders.values()), *_heads(tensors)]))
        more = ", ..." if len(known) > 8 else ""
        hint = near_miss(key, known) or f"; it has {', '.join(known[:8])}{more}"
        raise ArtifactError(f"model.checkpoint_key {key!r}: nothing of that name in {str(path)!r}{hint}")
    return Checkpoint(kept, holders, key)


def _tensors(content: object, path: str) -> Iterator[tuple[str, str, Tensor]]:
    """(whole name, holder, tensor) of all tensors in nested dicts and lists."""
    left, seen = [("", content, 0)], 0
    while left:
        holder, value, depth = left.pop(0)
        items: Iterable[tuple[object, object]] = ()
        if isinstance(value, Mapping):
            items = value.items()
        elif isinstance(value, (list, tuple)):
            items = enumerate(value)
        for key, item in items:
            seen += 1
            if seen > _MOST_VALUES or depth > _DEEPEST:
                raise ArtifactError(f"checkpoint {path!r}: is nested too deeply to be a checkpoint")
            name = f"{holder}.{key}" if holder else str(key)
            if isinstance(item, np.ndarray) and item.dtype.kind in "fiub":
                item = torch.from_numpy(np.array(item))  # a copy: read-only arrays warn
            if isinstance(item, Tensor):
                yield name, holder, item.detach()
            elif isinstance(item, (Mapping, list, tuple)):
                left.append((name, item, depth + 1))


def _heads(names: Iterable[str]) -> list[str]:
    """All beginnings of dotted names, the shortest first."""
    found = {
        ".".join(parts[:i]) for parts in (name.split(".") for name in names) for i in range(1, len(parts))
    }
    return sorted(found, key=lambda name: (name.count("."), name))


def put_weights(
    model: nn.Module, given: Checkpoint | Mapping[str, Tensor], source: str, *, head: bool = False
) -> None:
    """Copy the tensors of a checkpoint into ``model`` in place; every parameter and buffer has to be there and to fit.

    The names may stand under any prefix (keys of dicts, wrappers such as DataParallel, torch.compile, Lightning, in
    any order). Tensors other than the model's are left out with a `CheckpointWarning`; those inside of its parts are
    refused, for they are another model's. Buffers that models compute (batch-norm counters, ...) may be missing, and
    of tied tensors one is enough. Half precision is taken in the model's own format.

    Args:
        given: a checkpoint, or a state dict.
        source: names the checkpoint in messages.
        head: whether training follows, so that layers for another number of classes or channels keep their random
            start, with a warning; else they are refused.

    Raises ArtifactError naming missing, unexpected or misfitting tensors; NaN or infinite weights; quantised ones;
    several sets of weights that fit (with their names for ``model.checkpoint_key``).
    """
    checkpoint = given if isinstance(given, Checkpoint) else Checkpoint(given)
    own = {name: t for name, t in model.state_dict().items() if isinstance(t, Tensor)}
    found = Names(own, checkpoint.tensors)
    prefix, chosen = _choose(found, own, checkpoint, source, _head_names(model) if head else set())
    tensors = {
        name: _readable(checkpoint.tensors[stored], own[name], name, source)
        for name, stored in chosen.items()
    }
    anew = _misfits(model, own, tensors, source, head)
    anew += [name for name in found.missing(prefix) if name in _head_names(model)]
    _refuse_or_report_extras(found, prefix, chosen, checkpoint, source)
    if anew:
        layers = list(dict.fromkeys(name.rpartition(".")[0] for name in anew))
        start = "start" if len(layers) > 1 else "starts"
        _warn(
            f"{source}: {', '.join(map(repr, layers))} {start} anew: the file is for other classes or channels; only "
            "training changes that"
        )
    model.load_state_dict({name: t for name, t in tensors.items() if name not in anew}, strict=False)


def _choose(
    found: Names, own: Mapping[str, Tensor], checkpoint: Checkpoint, source: str, free: set[str]
) -> tuple[str, dict[str, str]]:
    """The prefix whose names are the model's, and own name -> stored name there; ArtifactError for none or several."""
    prefixes = sorted(found.counts, key=lambda p: (-found.counts[p], p))[:50]
    fitting = [p for p in prefixes if not found.missing(p)]
    fitting = fitting or [
        p for p in prefixes if set(found.missing(p)) <= free and found.under(p).keys() - free
    ]
    if not fitting:
        raise _misses(found, prefixes[0] if prefixes else "", checkpoint, source)
    chosen = [found.under(p) for p in fitting]
    # Names as short as those of a bare nn.Sequential stand in many places; the right place has the shapes, too.
    shaped = [i for i, names in enumerate(chosen) if _shapes_fit(names, own, checkpoint.tensors)]
    if shaped:
        fitting, chosen = [fitting[i] for i in shaped], [chosen[i] for i in shaped]
    different = [0] + [
        i for i in range(1, len(chosen)) if not _same(chosen[0], chosen[i], checkpoint.tensors)
    ]
    if len(different) > 1:
        shown = {i: found.shown(fitting[i]) for i in different}
        exact = [i for i in different if shown[i] == checkpoint.key]
        if len(exact) != 1:
            names = " and ".join(map(repr, shown.values()))
            raise ArtifactError(
                f"{source} holds {len(different)} sets of weights that fit the model, {names}: choose one by "
                "model.checkpoint_key"
            )
        different = exact
    return fitting[different[0]], chosen[different[0]]


def _shapes_fit(names: Mapping[str, str], own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> bool:
    return all(tensors[stored].shape == own[name].shape for name, stored in names.items())


def _same(one: Mapping[str, str], other: Mapping[str, str], tensors: Mapping[str, Tensor]) -> bool:
    """Whether two sets of weights are the same numbers."""
    if one.keys() != other.keys():
        return False
    pairs = ((tensors[one[name]], tensors[other[name]]) for name in one if not name.endswith(COMPUTED))
    return all(a is b or (a.shape == b.shape and a.dtype == b.dtype and _equal(a, b)) for a, b in pairs)


def _equal(a: Tensor, b: Tensor) -> bool:
    plain = a.layout == b.layout == torch.strided and not (
        a.is_meta or b.is_meta or a.is_quantized or b.is_quantized
    )
    return plain and torch.equal(a, b)


def _misses(found: Names, prefix: str, checkpoint: Checkpoint, source: str) -> ArtifactError:
    """What is missing and unexpected at the prefix that comes closest."""
    missing = found.missing(prefix)
    there = set(found.under(prefix).values())
    begin = f"{prefix}." if prefix else ""
    foreign = [
        bare.removeprefix(begin)
        for bare, stored in found.stored.items()
        if bare.startswith(begin) and stored not in there and not stored.endswith(COMPUTED)
    ]
    parts = [_listed("missing", missing), _listed("unexpected", foreign)]
    hint = near_miss(missing[0], foreign) if missing and foreign else ""
    where = f" (under {found.shown(prefix)!r})" if prefix and there else ""
    return ArtifactError(f"{source} does not fit the model{where}: {'; '.join(p for p in parts if p)}{hint}")


def _readable(tensor: Tensor, own: Tensor, name: str, source: str) -> Tensor:
    """A stored tensor as an ordinary one of the model's kind of numbers; ArtifactError where it is none."""

    def refused(reason: str) -> ArtifactError:
        return ArtifactError(f"{source}: tensor {name!r} {reason}")

    if tensor.is_quantized:
        raise refused("is quantised; save the weights of the float model, or dequantise them")
    if tensor.is_meta:
        raise refused("has no data (it was saved on the device `meta`)")
    if tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    if _kind(tensor) != _kind(own):
        raise refused(
            f"holds {_word(tensor.dtype)}, the model {_word(own.dtype)}: are the weights quantised?"
        )
    if tensor.is_floating_point():
        if tensor.dtype.itemsize == 1:
            raise refused(f"holds {_word(tensor.dtype)}, whose scale is kept elsewhere; save wider weights")
        if not all_finite(tensor):
            raise refused("holds NaN or infinite values")
    return tensor


def _kind(tensor: Tensor) -> str:
    return "float" if tensor.is_floating_point() else "complex" if tensor.is_complex() else "integer"


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _misfits(
    model: nn.Module, own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], source: str, head: bool
) -> list[str]:
    """Own names whose stored shape is that of other classes or channels; ArtifactError for any other misfit."""
    odd = [name for name, tensor in tensors.items() if tensor.shape != own[name].shape]
    ends = _of_heads(model, odd, own, tensors) | _of_stem(model, odd, own, tensors)
    explained = set(odd) <= ends
    if not odd or (head and explained):
        return odd
    name = odd[0]
    theirs, ours = tuple(tensors[name].shape), tuple(own[name].shape)
    why = ""
    if explained and theirs[:1] != ours[:1]:
        why = (
            f"; the layer has {theirs[0]} outputs there and {ours[0]} here: it starts anew where training follows, "
            "with model.checkpoint and model.train.epochs above 0"
        )
    raise ArtifactError(
        f"{source} does not fit the model: {name!r} has shape {theirs}, the model needs {ours}{why}"
    )


def _layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    kinds = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear
    return [(name, module) for name, module in model.named_modules() if isinstance(module, kinds)]


def _of_heads(
    model: nn.Module, odd: Iterable[str], own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
) -> set[str]:
    """Misfits that differ in the number of outputs alone.

    What reads a layer's outputs would misfit with it, so where all misfits are of this kind the layers are heads.
    """
    layers = {name for name, _ in _layers(model)}
    return {
        name
        for name in odd
        if name.rpartition(".")[0] in layers
        and tensors[name].ndim == own[name].ndim
        and tensors[name].shape[1:] == own[name].shape[1:]
    }


def _of_stem(
    model: nn.Module, odd: Iterable[str], own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
) -> set[str]:
    """The first layer's weight where it differs in the number of channels that it reads."""
    first = next((f"{name}.weight" for name, _ in _layers(model)), "")
    if first not in odd:
        return set()
    theirs, ours = list(tensors[first].shape), list(own[first].shape)
    return {first} if theirs[:1] + theirs[2:] == ours[:1] + ours[2:] else set()


def _head_names(model: nn.Module) -> set[str]:
    """The tensors of the last layer with weights, which a backbone's file lacks."""
    layers = _layers(model)
    return {f"{layers[-1][0]}.{key}" for key, _ in layers[-1][1].named_parameters()} if layers else set()


def _refuse_or_report_extras(
    found: Names, prefix: str, chosen: Mapping[str, str], checkpoint: Checkpoint, source: str
) -> None:
    """Tensors other than the model's are named in a warning; ArtifactError for those inside of one of its parts.

    A deeper network holds all that a shallower one of its kind needs, and must not pass for it.
    """
    used = set(chosen.values())
    holders = {checkpoint.holders.get(stored, "") for stored in used}
    parts = {bare.partition(".")[0] for bare in found.own}
    numbered = any(part.isdigit() for part in parts)
    begin = f"{prefix}." if prefix else ""
    inside: list[str] = []
    beside: list[str] = []
    for bare, stored in found.stored.items():
        if stored in used or checkpoint.holders.get(stored, "") not in holders or bare.endswith(COMPUTED):
            continue
        part = bare.removeprefix(begin).partition(".")[0] if bare.startswith(begin) else ""
        (inside if part in parts or (numbered and part.isdigit()) else beside).append(
            bare.removeprefix(begin)
        )
    if inside:
        raise ArtifactError(f"{source} does not fit the model: {_listed('unexpected', inside)}")
    if beside:
        count = f"{len(beside)} tensors are" if len(beside) > 1 else "1 tensor is"
        _warn(f"{source}: {count} not the model's and not used: {_listed('', beside).strip()}")


def _warn(message: str) -> None:
    warnings.warn(message, CheckpointWarning, stacklevel=4)


def _listed(what: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{what} {', '.join(repr(n) for n in names[:3])}{more}"
