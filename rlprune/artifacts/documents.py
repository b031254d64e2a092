"""The JSON documents of saved things: read, and checked field by field before anything else is done with them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import ArtifactError
from ..utils.files import read_json

PLAN_FILE = "plan.json"
VERSION = 1


def read_plan(directory: str | Path) -> dict[str, Any]:
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
    return document


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


def check_fields(document: Mapping[str, Any], fields: Mapping[str, type], path: Path) -> None:
    """Raise ArtifactError unless every field is there and of its type."""
    for field, kind in fields.items():
        if not isinstance(document.get(field), kind):
            state = "is missing" if field not in document else f"is not a {kind.__name__}"
            raise ArtifactError(f"{path}: damaged: the field {field!r} {state}")


def _check_group(group: Any, width: Any, path: Path) -> None:
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


def is_count(value: Any) -> bool:
    """Whether a value of a JSON file is a whole number of 0 and more."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
