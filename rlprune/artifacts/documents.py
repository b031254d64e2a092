"""The JSON documents of saved things: read, and checked field by field before anything else is done with them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NotRequired, TypedDict, TypeGuard, cast

from ..errors import ArtifactError, near_miss
from ..pruning.inputs import check_inputs
from ..utils.files import read_json
from ..utils.values import are_whole, is_finite, is_whole, show_value

PLAN_FILE = "plan.json"
VERSION = 2
# Plans with groups of several lanes are of this version, all others of version 1: what earlier readers know stays so.
LANES_VERSION = 2
# Numbers of an input: beyond what any sample holds, and far below what fills a machine's memory.
_MOST = 2**31
_DIMENSIONS = 16


class ForeignFolderWarning(UserWarning):
    """Another tool has written files of a pruned model's folder since: what therefore is not checked, or not known."""


class GroupEntry(TypedDict):
    """A group in plan.json: its dense width, and the units that it keeps, ascending.

    A group with ``lanes`` keeps as many in each lane that stays; unit u of lane l is the number ``l * width + u``. The
    lanes that stay are the units that ``lane_group`` keeps, all of them where it names none.
    """

    name: str
    kind: str
    width: int
    lanes: NotRequired[int]
    lane_group: NotRequired[str]
    kept: list[int]


class Root(TypedDict):
    """The tensor whose size shows how many units a group keeps: ``per_unit`` entries of dimension ``dim`` for each."""

    tensor: str
    dim: int
    per_unit: int


class PlanDocument(TypedDict):
    """The content of plan.json. What stands in ``base``, but for its ``source``, is known to the wing that wrote it."""

    format: str
    version: int
    base: dict[str, Any]
    fingerprint: str
    input: NotRequired[Any]
    """The record of the example inputs (`pruning.inputs`): of one float32 tensor its shape."""
    groups: list[GroupEntry]
    widths: list[int]
    budget: dict[str, Any]
    cost: dict[str, float]
    dense_cost: dict[str, float]
    origin: NotRequired[dict[str, Any]]
    attributes: dict[str, dict[str, int]]
    roots: dict[str, Root]
    tensors: dict[str, list[int]]
    checksums: NotRequired[dict[str, str]]
    """Number format and SHA-256 of each tensor (`fitting.checksum`); folders of earlier versions have none."""
    libraries: dict[str, str]
    layers: NotRequired[list[dict[str, int]]]
    """Of language models, as `pruned_hidden_size` and `added_biases`: the sizes of each block."""
    pruned_hidden_size: NotRequired[int]
    added_biases: NotRequired[list[str]]


def read_plan(directory: str | Path) -> PlanDocument:
    """The checked content of a plan, from a pruned model's folder or the JSON file itself; raises ArtifactError."""
    folder = Path(directory)
    path = folder if folder.is_file() else folder / PLAN_FILE
    if not folder.exists():
        raise ArtifactError(f"{folder}: no such folder of a pruned model")
    document = read_document(path, "rlprune pruned model", VERSION)
    fields: dict[str, type] = {
        "base": dict, "fingerprint": str, "groups": list, "widths": list, "budget": dict, "cost": dict,
        "dense_cost": dict, "attributes": dict, "roots": dict, "tensors": dict, "libraries": dict,
    }  # fmt: skip
    check_fields(document, fields, path)
    if len(document["groups"]) != len(document["widths"]):
        raise ArtifactError(
            f"{path}: has {len(document['groups'])} groups but {len(document['widths'])} widths"
        )
    for group, width in zip(document["groups"], document["widths"], strict=True):
        _check_group(group, width, path)
    _check_names(document["groups"], path)
    _check_lanes(document["groups"], document["widths"], path)
    _check_facts(document, path)
    _check_sizes(document, path)
    if document.get("input") is not None:
        check_inputs(document["input"], str(path))
    if not isinstance(document.get("checksums", {}), dict):
        raise ArtifactError(f"{path}: damaged: the field 'checksums' is not a dict")
    return cast("PlanDocument", document)


def read_document(path: Path, kind: str, newest: int) -> dict[str, Any]:
    """A JSON object of the given kind whose version this code can read."""
    document = read_json(path)
    if not isinstance(document, dict) or document.get("format") != kind:
        raise ArtifactError(f"{path}: not a file of a {kind}")
    version = document.get("version")
    if not is_count(version) or version < 1:
        raise ArtifactError(
            f"{path}: version: must be a whole number of 1 and more, got {show_value(version)}"
        )
    if version > newest:
        raise ArtifactError(
            f"{path}: format version {version} is newer than this rlprune reads (up to {newest}); update rlprune"
        )
    return document


def check_fields(document: Mapping[str, object], fields: Mapping[str, type], path: Path) -> None:
    """Raise ArtifactError unless every field is there and of its type."""
    for field, kind in fields.items():
        if not isinstance(document.get(field), kind):
            state = "is missing" if field not in document else f"is not a {kind.__name__}"
            raise ArtifactError(f"{path}: damaged: the field {field!r} {state}")


def _check_names(groups: list[dict[str, Any]], path: Path) -> None:
    names = [group["name"] for group in groups]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ArtifactError(f"{path}: damaged: two groups are called {twice!r}")


def _check_facts(document: Mapping[str, Any], path: Path) -> None:
    """Costs, budget and libraries."""
    for field in ("cost", "dense_cost"):
        for metric, value in document[field].items():
            if not is_finite(value) or value < 0:
                raise ArtifactError(
                    f"{path}: damaged: {field}.{metric}: must be a finite number of 0 and more, got {show_value(value)}"
                )
    for field, kinds in (("base.source", str), ("origin", dict)):
        owner, _, last = field.rpartition(".")
        value = (document[owner] if owner else document).get(last)
        if value is not None and not isinstance(value, kinds):
            raise ArtifactError(f"{path}: damaged: {field}: cannot be {show_value(value)}")
    metric = document["budget"].get("metric", "macs")
    if not isinstance(metric, str):
        raise ArtifactError(f"{path}: damaged: budget.metric: must be a text, got {show_value(metric)}")


def _check_sizes(document: Mapping[str, Any], path: Path) -> None:
    """The shapes of the tensors, the roots of the groups among them, and the sizes that modules are given."""
    for name, shape in document["tensors"].items():
        if not are_whole(shape):
            raise ArtifactError(f"{path}: damaged: tensors.{name}: must be a shape, got {show_value(shape)}")
    names = {group["name"] for group in document["groups"]}
    for name, root in document["roots"].items():
        if name not in names:
            raise ArtifactError(f"{path}: damaged: roots: there is no group {name!r}{near_miss(name, names)}")
        good = isinstance(root, dict) and isinstance(root.get("tensor"), str)
        if not good or not is_whole(root.get("dim"), _DIMENSIONS) or not is_whole(root.get("per_unit")):
            raise ArtifactError(
                f"{path}: damaged: roots.{name}: must name a tensor, a dim and a per_unit, got {show_value(root)}"
            )
    for name, values in document["attributes"].items():
        if not isinstance(values, dict):
            raise ArtifactError(
                f"{path}: attributes.{name}: must be a table of sizes, got {show_value(values)}"
            )
        for attribute, value in values.items():
            if not is_whole(value):
                raise ArtifactError(
                    f"{path}: attributes: {name}.{attribute} = {show_value(value)} is not a size that may be set"
                )


def _check_group(group: object, width: object, path: Path) -> None:
    if not isinstance(group, dict) or not isinstance(group.get("name"), str):
        raise ArtifactError(f"{path}: damaged: a group has no name")
    dense, kept = group.get("width"), group.get("kept")
    experiment = f"{path}: damaged: group {group['name']!r}: "
    if not is_count(dense) or not is_count(width) or not isinstance(kept, list):
        raise ArtifactError(experiment + "needs whole-number widths and a list of kept units")
    lanes, owner = group.get("lanes", 1), group.get("lane_group", "")
    if not is_count(lanes) or lanes < 1 or not isinstance(owner, str):
        raise ArtifactError(
            experiment + "needs a whole number of lanes, and the name of the group that they are"
        )
    if lanes == 1 and len(kept) != width:
        raise ArtifactError(experiment + f"keeps {len(kept)} units but its width is {width}")
    inside = all(is_count(unit) and unit < dense * lanes for unit in kept)
    if not inside or any(a >= b for a, b in itertools.pairwise(kept)):
        raise ArtifactError(experiment + f"kept units must be ascending numbers below {dense * lanes}")


def _check_lanes(groups: list[dict[str, Any]], widths: list[int], path: Path) -> None:
    """Groups with lanes keep as many units in each lane that stays."""
    kept = {group["name"]: group["kept"] for group in groups}
    for group, width in zip(groups, widths, strict=True):
        owner, dense = group.get("lane_group", ""), group["width"]
        if owner and owner not in kept:
            raise ArtifactError(
                f"{path}: damaged: group {group['name']!r}: lane_group: there is no group {owner!r}"
                f"{near_miss(owner, kept)}"
            )
        left = kept[owner] if owner else range(group.get("lanes", 1))
        wanted = [lane for lane in left for _ in range(width)]
        if [unit // max(1, dense) for unit in group["kept"]] != wanted:
            raise ArtifactError(
                f"{path}: damaged: group {group['name']!r}: must keep {width} units in each of the {len(left)} lanes "
                "that stay"
            )


def is_count(value: object) -> TypeGuard[int]:
    """Whether a value of a JSON file is a whole number of 0 and more."""
    return is_whole(value)
