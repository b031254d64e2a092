"""The mark in config.json by which the folder of a pruned language model is known, with or without its plan.json.

transformers keeps fields of a configuration that it does not know. So what is needed to find the dense model again,
and to prune a second time against it, outlives ``save_pretrained``, PEFT's merge and the Trainer, which write
config.json, weights and code, but no plan.json.

``rlprune`` in config.json holds:

- ``version``: of this mark;
- ``base``: the name of the dense model, or null; ``fingerprint``: the hash of its architecture; ``base_sizes``: where
  the dense model had layers of different sizes itself, their fields;
- ``input``: the shape of a sample, whose costs plan.json holds;
- ``kept``: group -> which of its units are left, for groups that lost some, and for the hidden size wherever it was
  traced: a bit a unit, the first unit first, eight to a byte, in hexadecimal; units of a group with lanes lane after
  lane;
- ``origin``: where the widths came from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...artifacts.documents import PLAN_FILE, GroupEntry
from ...errors import ArtifactError, near_miss
from ...pruning.plan import Plan
from ...pruning.space import Group
from ...utils.arrays import Ints
from ...utils.values import show_value

MARK = "rlprune"
VERSION = 1
CODE_FILE = "modeling_rlprune"
_ON_REQUEST = "hidden"  # the kind of group that is traced only where ``prune.hidden`` says so


def is_pruned(fields: Mapping[str, object]) -> bool:
    """Whether a config.json is that of a pruned model: by its mark or, of earlier versions, by the classes it names.

    ``per_layer_config`` is no sign: transformers gives it to families of its own.
    """
    classes = fields.get("auto_map")
    named = isinstance(classes, Mapping) and any(str(c).startswith(f"{CODE_FILE}.") for c in classes.values())
    return isinstance(fields.get(MARK), Mapping) or named


def mark_of(plan: Plan, base: str | None, sizes: Mapping[str, object]) -> dict[str, Any]:
    """The mark of a model that was cut by a plan from the dense model ``base``, with uneven fields ``sizes``."""
    groups = zip(plan.space.groups, plan.kept, strict=True)
    # Every other group is found again whether the plan cut it or not; this one only where it is asked for.
    told = ((g, kept) for g, kept in groups if len(kept) < g.units or g.kind == _ON_REQUEST)
    mark: dict[str, Any] = {
        "version": VERSION,
        "base": base,
        "fingerprint": plan.space.fingerprint,
        "input": list(plan.space.input_shape or ()),
        "kept": {group.name: _packed(kept, group.units) for group, kept in told},
        "origin": dict(plan.origin),
    }
    return mark | ({"base_sizes": dict(sizes)} if sizes else {})


def kept_units(mark: Mapping[str, Any], groups: Sequence[Group], path: Path) -> tuple[Ints, ...]:
    """The units that each group of the dense model kept; ArtifactError where the mark does not name them."""
    table = mark.get("kept")
    where = f"{path}: {MARK}.kept"
    if not isinstance(table, Mapping):
        raise ArtifactError(f"{where}: must be a table of groups, got {show_value(table)}")
    names = [group.name for group in groups]
    for name in table:
        if name not in names:
            raise ArtifactError(
                f"{where}: the dense model has no group {name!r}{near_miss(str(name), names)}"
            )
    return tuple(
        _unpacked(table[g.name], g.units, f"{where}.{g.name}") if g.name in table else np.arange(g.units)
        for g in groups
    )


def check_mark(fields: Mapping[str, Any], groups: Sequence[GroupEntry], path: Path) -> None:
    """ArtifactError where the mark of a config.json names other units than the groups of the plan.json next to it."""
    mark = fields.get(MARK)
    if not isinstance(mark, Mapping):
        return  # a folder of an earlier version
    said = mark.get("kept")
    if not isinstance(said, Mapping):
        raise ArtifactError(f"{path}: {MARK}.kept: must be a table of groups, got {show_value(said)}")
    counts = {g["name"]: g["width"] * g.get("lanes", 1) for g in groups}
    kept = {g["name"]: g["kept"] for g in groups}
    lost = [name for name, units in kept.items() if len(units) < counts[name]]
    for name in {**said, **dict.fromkeys(lost)}:
        own = _packed(np.array(kept[name], dtype=np.int64), counts[name]) if name in kept else None
        if said.get(name) != own:
            raise ArtifactError(
                f"{path}: {MARK}.kept.{name}: {PLAN_FILE} keeps other units: they are of two models"
            )


def _packed(kept: Ints, units: int) -> str:
    bits = np.zeros(units, dtype=np.uint8)
    bits[kept] = 1
    return np.packbits(bits).tobytes().hex()


def _unpacked(text: object, units: int, where: str) -> Ints:
    try:
        data = bytes.fromhex(text) if isinstance(text, str) else b""
    except ValueError:
        data = b""
    if len(data) != -(-units // 8):
        raise ArtifactError(f"{where}: must be {units} bits in hexadecimal, got {show_value(text)}")
    bits = np.unpackbits(np.frombuffer(data, dtype=np.uint8))
    if bits[units:].any():
        raise ArtifactError(f"{where}: names units beyond the group's {units}")
    found: Ints = np.nonzero(bits[:units])[0].astype(np.int64)
    return found
