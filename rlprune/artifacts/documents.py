"""The JSON documents of saved things: read, and checked field by field before anything else is done with them."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NotRequired, TypedDict, TypeGuard, cast

from ..errors import ArtifactError
from ..pruning.inputs import check_inputs
from ..utils.files import read_json

PLAN_FILE = "plan.json"
VERSION = 1


class GroupEntry(TypedDict):
    """A group in plan.json: its dense width, and the units that it keeps, ascending."""

    name: str
    kind: str
    width: int
    kept: list[int]


class Root(TypedDict):
    """The tensor whose size shows how many units a group keeps: ``per_unit`` entries of dimension ``dim`` for each."""

    tensor: str
    dim: int
    per_unit: int


class PlanDocument(TypedDict):
    """The content of plan.json. What stands in ``base``, beside its ``source``, is known to the wing that wrote it."""

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
    for field in ("cost", "dense_cost"):
        _check_costs(document[field], f"{path}: {field}")
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
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ArtifactError(f"{path}: version: must be a whole number of 1 and more, got {version!r}")
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


def _check_group(group: object, width: object, path: Path) -> None:
    if not isinstance(group, dict) or not isinstance(group.get("name"), str):
        raise ArtifactError(f"{path}: damaged: a group has no name")
    dense, kept = group.get("width"), group.get("kept")
    experiment = f"{path}: damaged: group {group['name']!r}: "
    if not is_count(dense) or not is_count(width) or not isinstance(kept, list):
        raise ArtifactError(experiment + "needs whole-number widths and a list of kept units")
    if len(kept) != width:
        raise ArtifactError(experiment + f"keeps {len(kept)} units but its width is {width}")
    inside = all(is_count(unit) and unit < dense for unit in kept)
    if not inside or any(a >= b for a, b in itertools.pairwise(kept)):
        raise ArtifactError(experiment + f"kept units must be ascending numbers below {dense}")


def _check_costs(costs: Mapping[str, object], where: str) -> None:
    for metric, cost in costs.items():
        if (
            isinstance(cost, bool)
            or not isinstance(cost, (int, float))
            or not 0 <= cost <= sys.float_info.max
        ):
            raise ArtifactError(
                f"{where}.{metric}: must be a finite number of 0 and more, got {str(cost)[:40]!r}"
            )


def is_count(value: object) -> TypeGuard[int]:
    """Whether a value of a JSON file is a whole number of 0 and more."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
