"""A plan that exists already, applied to a checkpoint: the same units are kept, nothing is searched."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from torch import nn

from ..artifacts.documents import PLAN_FILE, PlanDocument
from ..config.config import Config
from ..errors import ConfigError
from ..evaluation.recovery import Recovery
from ..pruning.cost import plain_amount
from ..pruning.plan import Plan
from ..pruning.surgery import prune
from ..tracing.trace import TraceOptions
from ..utils.progress import Callback, Console
from ..workloads.adapter import holds_pruned_model, read_pruned
from ..workloads.base import Workload
from ..workloads.builder import builder_of
from .build import build_workload, train_dense
from .saving import save_model


def is_plan(source: Path) -> bool:
    """Whether a path is a plan.json, or a folder of a pruned model that holds one (and no policy)."""
    if source.is_dir():
        return holds_pruned_model(source) and not (source / "policy.json").is_file()
    return source.is_file()


def apply_plan(
    source: Path, config: Config, *, checkpoint: Path | None, out: Path, callback: Callback | None = None
) -> str:
    """Cut the units that a plan cuts from the model of the settings, recover it, write it; returns a table.

    Without recovery the model may be cut file by file and never loaded (``WorkloadBuilder.cut_files``).

    Args:
        source: a plan.json, or the folder of a pruned model.
        checkpoint: weights of the model, instead of those of the settings.
        callback: is told of the progress; bars without one.

    Raises ArtifactError: no plan, or one of another architecture.
    """
    document = _read(source)
    if config.workload is None:
        folder = source if source.is_dir() else source.parent
        if builder_of(config.model.name).cut_files(config, checkpoint, document, folder, out):
            return (
                _costs(document)
                + "\nnot recovered: recovery.steps is none, so the weights were never in memory"
            )
    workload = build_workload(config, checkpoint=checkpoint, train=False)
    space = workload.adapter.space_of_plan(workload, document, TraceOptions.of(config.prune))
    plan = Plan.from_dict(document, space)
    # A plan that does not fit is refused before anything is trained.
    if checkpoint is None and config.workload is None and config.model.train.epochs > 0:
        callback = callback or Console(True)
        train_dense(workload, config.model, callback.training)
        callback.close()
    budget = {k: v for k, v in document["budget"].items() if v is not None}
    origin = {"method": "plan", "source": str(source)}
    origin |= {new: budget[old] for new, old in (("budget", "target"), ("metric", "metric")) if old in budget}
    if isinstance(ranking := plan.origin.get("importance"), str):
        origin["importance"] = ranking
    plan = replace(plan, origin=origin)
    slim = prune(workload.model, plan)
    # The kept units are the ranking: all of them before all others.
    kept = [
        np.isin(np.arange(g.units), k).astype(float) for g, k in zip(space.groups, plan.kept, strict=True)
    ]
    Recovery(workload, space, config.recovery, importance=kept)(slim, plan)
    qualities = _qualities(workload, slim)
    sizes = save_model(workload, slim, plan, out, config.finish.dtype)
    return "\n".join([_costs(document), qualities, *sizes])


def _read(source: Path) -> PlanDocument:
    if source.is_dir():
        return read_pruned(source)
    if source.name != PLAN_FILE:
        raise ConfigError(f"RUN_OR_POLICY: {source}: a plan's file is named {PLAN_FILE}")
    return read_pruned(source.parent)


def _costs(document: PlanDocument) -> str:
    """What the plan keeps of each cost."""
    rows = [
        f"{metric}: {plain_amount(kept, metric)} of {plain_amount(document['dense_cost'][metric], metric)} "
        f"({kept / document['dense_cost'][metric]:.1%})"
        for metric, kept in document["cost"].items()
        if document["dense_cost"].get(metric)
    ]
    return "\n".join(rows)


def _qualities(workload: Workload, slim: nn.Module) -> str:
    """Validation loss and metric of both models."""
    name = workload.metric_name
    lines = [f"{'':<8} {'loss':>10} {name:>12}"]
    for label, model in (("dense", workload.model), ("pruned", slim)):
        q = workload.evaluate(model, "validation")
        lines.append(f"{label:<8} {q.loss:>10.4f} {q.metric:>12.4f}")
    return "\n".join(lines)
