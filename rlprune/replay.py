"""A plan that exists already, applied to a checkpoint: the same units are kept, nothing is searched."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from .artifacts import PLAN_FILE, read_plan, save
from .config import Config
from .errors import ArtifactError, ConfigError, near_miss
from .progress import Console
from .pruning.cost import plain_amount
from .pruning.plan import Plan
from .pruning.recovery import Recovery
from .pruning.space import PruningSpace
from .pruning.surgery import prune
from .pruning.tracing import fingerprint, trace_configured
from .shards import dense_skeleton, prune_shards, space_of
from .workloads.build import build_workload, train_dense
from .workloads.causal import PREFIX


def is_plan(source: Path) -> bool:
    """Whether a path is a plan.json, or a folder of a pruned model that holds one (and no policy)."""
    if source.is_dir():
        return (source / PLAN_FILE).is_file() and not (source / "policy.json").is_file()
    return source.is_file()


def apply_plan(source: Path, config: Config, *, checkpoint: Path | None, out: Path) -> str:
    """Cut the units that a plan cuts from the model of the settings, recover it, write it; returns a table.

    Without recovery a language model's folder is cut tensor by tensor and never loaded (`shards`).

    Args:
        source: a plan.json, or the folder of a pruned model.
        checkpoint: weights of the model, instead of those of the settings.

    Raises ArtifactError: no plan, or one of another architecture.
    """
    document = _read(source)
    folder = _streamed(config, checkpoint)
    if folder is not None:
        _same_architecture(dense_skeleton(folder), document)
        prune_shards(folder, source if source.is_dir() else source.parent, out)
        return (
            _costs(document) + "\nnot recovered: recovery.steps is none, so the weights were never in memory"
        )
    workload = build_workload(config, checkpoint=checkpoint, train=False)
    space = _space(workload, document, config)
    plan = Plan.from_dict(document, space)
    # A plan that does not fit is refused before anything is trained.
    if checkpoint is None and config.workload is None and config.model.train.epochs > 0:
        console = Console(True)
        train_dense(workload, config.model, console.training)
        console.close()
    budget = {k: v for k, v in document["budget"].items() if v is not None}
    origin = {"method": "plan", "source": str(source)}
    origin |= {new: budget[old] for new, old in (("budget", "target"), ("metric", "metric")) if old in budget}
    plan = replace(plan, origin=origin)
    slim = prune(workload.model, plan)
    # The kept units are the ranking: all of them before all others.
    kept = [
        np.isin(np.arange(g.width), k).astype(float) for g, k in zip(space.groups, plan.kept, strict=True)
    ]
    Recovery(workload, space, config.recovery, importance=kept)(slim, plan)
    save(slim, plan, out, base=workload.base, tokenizer=getattr(workload, "tokenizer", None))
    return _costs(document) + "\n" + _qualities(workload, slim)


def _streamed(config: Config, checkpoint: Path | None) -> Path | None:
    """The folder of a language model that can be cut file by file: nothing but its own weights is needed."""
    if config.workload is not None or config.recovery.steps != ("none",) or config.model.dtype != "auto":
        return None
    name = config.model.name
    if not name.startswith(PREFIX):
        return None
    folder = Path(checkpoint or config.model.checkpoint or name.removeprefix(PREFIX)).expanduser()
    return folder if (folder / "config.json").is_file() and any(folder.glob("*.safetensors")) else None


def _space(workload: Any, document: dict[str, Any], config: Config) -> PruningSpace:
    """The space that the plan was made in; ArtifactError where the settings protect what it cuts."""
    if workload.language:
        _same_architecture(workload.model, document)
        return space_of(workload.model, document)
    space = trace_configured(workload.model, workload.example_inputs, config.prune)
    if document["fingerprint"] == space.fingerprint:  # else Plan.from_dict says that it is another model
        _same_groups(document, space)
    return space


def _read(source: Path) -> dict[str, Any]:
    if source.is_dir():
        return read_plan(source)
    if source.name != PLAN_FILE:
        raise ConfigError(f"RUN_OR_POLICY: {source}: a plan's file is named {PLAN_FILE}")
    return read_plan(source.parent)


def _same_architecture(model: nn.Module, document: dict[str, Any]) -> None:
    if fingerprint(model) != document["fingerprint"]:
        raise ArtifactError("plan: made for another architecture (its fingerprint differs)")


def _same_groups(document: dict[str, Any], space: PruningSpace) -> None:
    """The settings may protect (prune.ignore) other layers than the plan's did."""
    theirs, ours = [group["name"] for group in document["groups"]], [group.name for group in space.groups]
    for name in theirs:
        if name not in ours:
            raise ArtifactError(
                f"plan: cuts {name!r}, which prune.ignore protects here{near_miss(name, ours)}"
            )
    if theirs != ours:
        raise ArtifactError("plan: its groups come in another order than the model's")


def _costs(document: dict[str, Any]) -> str:
    """What the plan keeps of each cost."""
    rows = [
        f"{metric}: {plain_amount(kept, metric)} of {plain_amount(document['dense_cost'][metric], metric)} "
        f"({kept / document['dense_cost'][metric]:.1%})"
        for metric, kept in document["cost"].items()
        if document["dense_cost"].get(metric)
    ]
    return "\n".join(rows)


def _qualities(workload: Any, slim: Any) -> str:
    """Validation loss and metric of both models."""
    name = workload.metric_name
    lines = [f"{'':<8} {'loss':>10} {name:>12}"]
    for label, model in (("dense", workload.model), ("pruned", slim)):
        q = workload.evaluate(model, "validation")
        lines.append(f"{label:<8} {q.loss:>10.4f} {q.metric:>12.4f}")
    return "\n".join(lines)
