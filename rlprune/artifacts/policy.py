"""Policies on disk: safetensors and JSON, no pickle."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import ArtifactError
from ..utils.files import read_tensors, replacing_folder, write_json_atomic, write_tensors_atomic
from ..utils.machine import library_versions
from .documents import check_fields, read_document
from .safetensors import check_tensors, refuse_nan

POLICY_VERSION = 1

POLICY_TENSORS, POLICY_FILE = "policy.safetensors", "policy.json"


def save_policy(tensors: Mapping[str, Tensor], meta: Mapping[str, object], directory: str | Path) -> Path:
    """Write a policy's shared weights and its JSON-able description into a folder, replaced as a whole."""
    refuse_nan(tensors, "the policy")
    document = {
        "format": "rlprune policy",
        "version": POLICY_VERSION,
        "meta": dict(meta),
        "tensors": {name: list(tensor.shape) for name, tensor in tensors.items()},
        "libraries": library_versions(),
    }
    with replacing_folder(directory, POLICY_FILE) as folder:
        write_tensors_atomic(folder / POLICY_TENSORS, tensors)
        write_json_atomic(folder / POLICY_FILE, document)
    return Path(directory)


def read_policy_files(directory: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and description of a saved policy; raises ArtifactError for anything that is not one."""
    folder = Path(directory)
    if not folder.is_dir():
        raise ArtifactError(f"{folder}: no such folder of a policy")
    document = read_document(folder / POLICY_FILE, "rlprune policy", POLICY_VERSION)
    check_fields(document, {"meta": dict, "tensors": dict}, folder / POLICY_FILE)
    tensors = read_tensors(folder / POLICY_TENSORS)
    where = str(folder / POLICY_TENSORS)
    check_tensors(tensors, document["tensors"], where)
    refuse_nan(tensors, where)
    return tensors, document["meta"]
