"""The plan of a pruned model's folder that has no plan.json: found again from config.json.

``save_pretrained``, PEFT's merge and the Trainer write config.json, weights and code. The sizes stand in
``per_layer_config``, and the mark (`mark`) names the dense model and the units that were kept. Without a mark, or where
the architecture was changed since (tokens added, say), the pruned model is its own base.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from ...artifacts.documents import PLAN_FILE, ForeignFolderWarning, PlanDocument
from ...artifacts.pruned_model import plan_document
from ...errors import ArtifactError, near_miss
from ...pruning.cost_metrics import with_registered_costs
from ...pruning.plan import Plan
from ...pruning.space import PruningSpace, fingerprint
from ...pruning.surgery import prune
from ...tracing.trace import TraceOptions
from ...utils.files import read_json
from ...utils.values import are_whole, show_value
from ..describe import context_length
from ..space import language_space
from . import pretrained
from .mark import MARK, VERSION, is_pruned, kept_units

ADAPTER = "adapter_config.json"
_LENGTH = 128  # tokens of a sample whose costs are counted, where the folder does not say


def is_folder_of_ours(folder: Path) -> bool:
    """Whether a folder is that of a pruned language model, by its config.json; nothing of it is checked."""
    path = folder / pretrained.CONFIG
    if not path.is_file():
        return False
    try:
        fields = read_json(path)
    except ArtifactError:
        return False
    return isinstance(fields, dict) and is_pruned(fields)


def document_without_plan(folder: Path) -> PlanDocument:
    """What plan.json would say of a folder that has none; it has no checksums.

    Warns ForeignFolderWarning: the dense model is not known, so the pruned model stands for it.
    Raises ArtifactError: a configuration that is damaged or of an unknown family, or a mark that names no units.
    """
    fields = pretrained.read_fields(folder)
    path = folder / pretrained.CONFIG
    slim = pretrained.skeleton(pretrained.read_config(fields, path))
    mark = _mark(fields, path)
    plan, base, reason = _plan_of_mark(mark, fields, slim, path) if mark else (None, {}, "it is not named")
    if plan is None:
        base = _dense(fields) | pretrained.uneven_fields(fields)
        space = whole_space(slim, fingerprint(slim), _length(mark, base), "pruned_hidden_size" in fields)
        plan = Plan(space, space.widths, tuple(np.arange(group.units) for group in space.groups))
        warnings.warn(
            f"{folder}: its dense model is not known ({reason}, and there is no {PLAN_FILE}); the pruned model counts "
            "as its own base",
            ForeignFolderWarning,
            stacklevel=3,
        )
    known = {"source": pretrained.SOURCE, "name": mark.get("base") if reason == "" else None, "config": base}
    shapes = {name: entry.shape for name, entry in pretrained.stored_entries(slim).items()}
    document = plan_document(plan, known, shapes) | pretrained.plan_fields(slim, fields)
    return cast("PlanDocument", document)


def plan_against_base(model: nn.Module, document: PlanDocument, options: TraceOptions) -> Plan:
    """The plan of a document in the space of all groups that its dense ``model`` (or skeleton) has.

    Groups that the document leaves out were kept whole, so that a second plan may cut them.
    Raises ArtifactError: a group of the document is none of the model's.
    """
    groups = {group["name"]: group["kept"] for group in document["groups"]}
    length = int((document.get("input") or [_LENGTH])[-1])
    hidden = "hidden" in groups or options.hidden
    space = whole_space(model, document["fingerprint"], length, hidden)
    names = [group.name for group in space.groups]
    for name in groups:
        if name not in names:
            raise ArtifactError(f"{PLAN_FILE}: the model has no group {name!r}{near_miss(name, names)}")
    widths = dict(zip(groups, document["widths"], strict=True))
    lanes = [groups.get(g.lane_group, range(g.lanes)) for g in space.groups]
    entries = [
        {"kept": groups.get(g.name, [lane * g.width + u for lane in left for u in range(g.width)])}
        for g, left in zip(space.groups, lanes, strict=True)
    ]
    counts = [widths.get(g.name, g.width) for g in space.groups]
    return Plan.from_dict({**document, "groups": entries, "widths": counts}, space)


def whole_space(model: nn.Module, architecture: str, length: int, hidden: bool) -> PruningSpace:
    """The space of all groups of a model, each of which may be dropped; nothing is proved."""
    options = TraceOptions(round_to=1, verify=False, drop=True, hidden=hidden)
    example = torch.zeros((1, length), dtype=torch.long)
    return with_registered_costs(language_space(model, example, architecture, options), model)


def _mark(fields: Mapping[str, object], path: Path) -> dict[str, Any]:
    """The mark of a config.json, or {} where it has none; ArtifactError where it cannot be read."""
    mark = fields.get(MARK)
    if mark is None:
        return {}
    where = f"{path}: {MARK}"
    if not isinstance(mark, dict):
        raise ArtifactError(f"{where}: must be a table, got {show_value(mark)}")
    version = mark.get("version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ArtifactError(
            f"{where}.version: must be a whole number of 1 and more, got {show_value(version)}"
        )
    if version > VERSION:
        raise ArtifactError(
            f"{where}.version: {version} is newer than this rlprune reads (up to {VERSION}); update it"
        )
    for name, kinds in (("base", (str, type(None))), ("origin", dict), ("base_sizes", dict)):
        if name in mark and not isinstance(mark[name], kinds):
            raise ArtifactError(f"{where}.{name}: cannot be {show_value(mark[name])}")
    if "input" in mark and not (are_whole(mark["input"]) and len(mark["input"]) == 2):
        raise ArtifactError(f"{where}.input: must be a shape (1, L), got {show_value(mark['input'])}")
    return mark


def _plan_of_mark(
    mark: Mapping[str, Any], fields: Mapping[str, object], slim: nn.Module, path: Path
) -> tuple[Plan | None, dict[str, Any], str]:
    """The plan against the dense model that a mark names, and that model's fields; or None, and why there is none."""
    base = _dense(fields) | dict(mark.get("base_sizes", {}))
    dense = pretrained.skeleton(pretrained.read_config(base, path))
    if fingerprint(dense) != mark.get("fingerprint"):
        return None, {}, "the architecture was changed since it was pruned"
    kept: object = mark.get("kept")
    hidden = isinstance(kept, Mapping) and "hidden" in kept
    space = whole_space(dense, fingerprint(dense), _length(mark, base), hidden)
    units = kept_units(mark, space.groups, path)
    lanes = [len(left) for left in space.lanes_left(units)]
    widths = np.array([len(each) // max(1, n) for each, n in zip(units, lanes, strict=True)], dtype=np.int64)
    plan = Plan(space, widths, units, dict(mark.get("origin", {})))
    cut = {name: tuple(tensor.shape) for name, tensor in prune(dense, plan).named_parameters()}
    own = {name: tuple(p.shape) for name, p in slim.named_parameters()}
    added = {f"{name}.bias" for name in fields.get("added_biases") or ()}  # type: ignore[attr-defined]
    if any(cut.get(name) != shape for name, shape in own.items() if name not in added):
        return None, {}, f"{MARK}.kept in config.json is not what per_layer_config has"
    return plan, base | {"architectures": [type(dense).__name__]}, ""


def _dense(fields: Mapping[str, object]) -> dict[str, Any]:
    """The fields of the dense configuration, without what only says which program wrote them."""
    return {n: v for n, v in pretrained.dense_fields_of(fields).items() if n not in pretrained.IDLE}


def _length(mark: Mapping[str, Any], base: Mapping[str, object]) -> int:
    given = mark.get("input")
    longest = context_length(dict(base))
    return int(given[-1]) if given else min(_LENGTH, longest or _LENGTH)
