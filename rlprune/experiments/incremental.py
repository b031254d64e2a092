"""Incremental pruning led by a rule or by a search in each round: cut a little, train, look again, cut again.

An agent that searches the distributions of all stages at once needs nothing of this file: that is ``search.stages``
above 1 with the recovery step ``finetune``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..agents import Memory
from ..errors import ArtifactError, ConfigError
from ..evaluation.importance import compute
from ..evaluation.recovery import Recovery
from ..pruning.history import History, Widths, final_widths
from ..pruning.plan import Plan, make_plan
from ..pruning.space import PruningSpace
from ..pruning.surgery import prune
from ..rules.context import Context, rule_widths
from ..utils.arrays import Ints
from ..utils.checkpoints import forget, require_same
from ..utils.files import read_json, read_tensors, write_json_atomic, write_tensors_atomic
from ..utils.progress import Callback
from ..utils.values import are_whole
from ..workloads.adapter import TuneJob
from .prepare import Experiment, find_rule


@dataclass(frozen=True)
class Incremental:
    """What an incremental pruning ends in.

    ``plan`` is in units of the dense model; ``history`` holds the widths (G,) after each stage; ``rounds`` one
    dict a stage: cost, loss and metric on the validation split after its training.
    """

    model: nn.Module
    plan: Plan
    history: History
    rounds: tuple[dict[str, Any], ...]


@dataclass
class Now:
    """The model as it stands: its space, and which units of the dense model it has kept."""

    model: nn.Module
    space: PruningSpace
    kept: tuple[Ints, ...]


Chosen = tuple[Ints, dict[str, Any]]
"""Widths (G,), and plain values that the next choice is told."""
Choose = Callable[[Now, int, float, Memory], Chosen]
"""``choose(now, round, cost, memory)``: the widths that a round cuts to, of at most that cost."""


def incremental(
    experiment: Experiment,
    rule: str | Sequence[Sequence[int]] | Choose,
    *,
    stages: int = 5,
    steps: int = 0,
    seed: int = 0,
    out: str | Path | None = None,
    callback: Callback | None = None,
    part: float = 0.0,
    whole: bool = False,
) -> Incremental:
    """Prune in rounds: statistics, rule, cut, closed-form recovery and training, each on what is left.

    Round t of T cuts to ``dense - t / T (dense - budget)``, as in Adapt-Pruner (Pan et al. 2025, arXiv 2502.03460).
    ``steps`` of training by section ``finish`` take the place of the gradient steps of the recovery.

    Args:
        rule: name of a rule; or the widths (G,) after each stage themselves, none above those before; or who chooses.
        stages: rounds; ignored where the widths are given.
        steps: optimizer steps of each round, 0 for none.
        seed: of the training's data; every round of a language model has sequences of its own.
        part: largest share of the dense cost that is cut before a rule looks again; 0 for a whole round at once.
        whole: one learning-rate schedule over all rounds, instead of one for each.
        out: folder of the state; rounds that an earlier try finished are taken from there.

    Raises:
        ConfigError: an unknown rule, or no stage at all.
        BudgetError: the budget or the widths do not fit.
        ArtifactError: ``out`` holds the state of other settings.
    """
    told = (callback or Callback()).training
    choose, stages = _chooser(experiment, rule, stages)
    if stages < 1 or steps < 0:
        raise ConfigError(f"stages: at least 1 stage and 0 steps are needed, got {stages} and {steps}")
    space = experiment.space
    now = Now(experiment.workload.model, space, tuple(np.arange(g.units) for g in space.groups))
    method = rule if isinstance(rule, str) else experiment.config.search.agent if callable(rule) else "widths"
    label = rule if not callable(rule) else experiment.config.search
    kept = _Rounds(out, experiment, label, (stages, steps, seed, part, whole))
    memory: Memory = {}
    history, rounds = list[Widths](), []
    for stage in range(1, stages + 1):
        folder = None if out is None else Path(out) / f"round-{stage}.state"
        finished = kept.load(stage, now)
        if finished is None:
            for cost in _costs(experiment, now, stage, stages, part if isinstance(rule, str) else 0.0):
                widths, memory = choose(now, stage, cost, memory)
                now = _cut(experiment, now, widths)
            job = TuneJob(seed, steps, folder, told, f"round {stage}/{stages}", (stage - 1) * steps)
            job = replace(job, whole=stages * steps) if whole else job
            finished = _trained(experiment, now, job) | {"memory": memory}
            kept.save(stage, now, finished)
        memory = finished["memory"]
        history.append(tuple(space.widths_of(now.kept).tolist()))
        rounds.append(finished)
    origin: dict[str, object] = {"method": method, "stages": stages, "steps": steps}
    origin |= {"budget": str(experiment.budget), "metric": experiment.metric}
    plan = Plan(space, final_widths(tuple(history)), now.kept, origin | experiment.evaluator.ranking_facts)
    return Incremental(now.model, plan, tuple(history), tuple(rounds))


def _chooser(
    experiment: Experiment, rule: str | Sequence[Sequence[int]] | Choose, stages: int
) -> tuple[Choose, int]:
    """Who chooses the widths of each round, and how many rounds there are."""
    if callable(rule):
        return rule, stages
    if isinstance(rule, str):
        find_rule(rule)
        return lambda now, stage, cost, memory: (_widths(experiment, rule, now, cost), {}), stages
    wanted = [np.asarray(w, dtype=np.int64) for w in rule]
    return lambda now, stage, cost, memory: (wanted[stage - 1], {}), len(wanted)


def _costs(experiment: Experiment, now: Now, stage: int, stages: int, part: float) -> list[float]:
    """Absolute costs that a round cuts to, one after the other, the last of them its own."""
    dense, metric = experiment.space.dense_cost(experiment.metric), experiment.metric
    last = dense - stage / stages * (dense - experiment.target)
    begin = now.space.dense_cost(metric)
    cuts = 1 if part == 0 else max(1, math.ceil((begin - last) / (part * dense) - 1e-9))
    return [begin - i / cuts * (begin - last) for i in range(1, cuts)] + [last]


def _trained(experiment: Experiment, now: Now, job: TuneJob) -> dict[str, Any]:
    """Train where ``job`` has steps, and validate: the facts of the round."""
    if job.steps:
        experiment.workload.fine_tune(now.model, experiment.config.finish, job)
    quality = experiment.workload.evaluate(now.model, "validation")
    cost = now.space.dense_cost(experiment.metric)
    return {"cost": cost, "loss": quality.loss, "metric": quality.metric}


def _widths(experiment: Experiment, rule: str, now: Now, cost: float) -> Ints:
    """What the rule keeps at a cost, judged by the model as it stands now."""
    metric = experiment.metric
    # The costs count kept units, so an absolute target means the same in every round's space.
    share = min(1.0, cost / now.space.dense_cost(metric))
    context = Context(
        space=now.space,
        model=now.model,
        importance=_importance(experiment, now),
        budget=share,
        metric=metric,
        workload=experiment.workload,
        seed=experiment.config.seed,
    )
    return rule_widths(find_rule(rule), context)


def _importance(experiment: Experiment, now: Now) -> Any:
    if now.model is experiment.workload.model:
        return experiment.evaluator.importance
    return compute(experiment.importance, experiment.workload, now.space, experiment.config.seed, now.model)


def _cut(experiment: Experiment, now: Now, widths: Ints) -> Now:
    """The next smaller model, recovered without gradient steps."""
    settings = experiment.config.recovery
    closed = tuple(step for step in settings.steps if step != "finetune") or ("none",)
    settings = replace(settings, steps=closed, finetune_steps=0)
    cut = make_plan(now.space, importance=_importance(experiment, now), widths=widths)
    slim = prune(now.model, cut)
    Recovery(experiment.workload, now.space, settings, now.model)(slim, cut)
    kept = tuple(before[units] for before, units in zip(now.kept, cut.kept, strict=True))
    return Now(slim, experiment.space.after(kept), kept)


class _Rounds:
    """The finished rounds in a state folder: weights and kept units of the last, the facts of all."""

    def __init__(
        self,
        out: str | Path | None,
        experiment: Experiment,
        label: object,
        lengths: tuple[object, ...],
    ) -> None:
        self._folder = None if out is None else Path(out)
        config = experiment.config
        facts = [
            config.finish,
            config.recovery,
            config.prune,
            experiment.budget,
            experiment.metric,
            label,
            *lengths,
        ]
        self._key = repr([*facts, experiment.space.fingerprint])
        self._done: list[dict[str, Any]] = []
        self._last: dict[str, Any] | None = None
        if self._folder is not None and (self._folder / "rounds.json").is_file():
            content = read_json(self._folder / "rounds.json")
            require_same(self._folder, content, {"key": self._key})
            self._done, self._last = _rounds(content, self._folder), content
        self._experiment = experiment

    def load(self, stage: int, now: Now) -> dict[str, Any] | None:
        """The facts of a finished round; with the last of them ``now`` becomes the model that it left."""
        if self._last is None or stage > len(self._done):
            return None
        self._forget_before(stage)
        # The rounds before the last give their widths only: their weights are gone, and nobody needs them.
        now.kept = tuple(np.array(k, dtype=np.int64) for k in self._done[stage - 1]["kept"])
        if stage == len(self._done) and self._folder is not None:
            space = self._experiment.space
            cut = Plan(space, space.widths_of(now.kept), now.kept)
            now.model = prune(self._experiment.workload.model, cut)
            now.space = space.after(now.kept)
            _put(now.model, read_tensors(self._folder / f"round-{stage}.safetensors"))
        return {k: v for k, v in self._done[stage - 1].items() if k != "kept"}

    def save(self, stage: int, now: Now, facts: dict[str, Any]) -> None:
        if self._folder is None:
            return
        tensors = {name: p.detach() for name, p in now.model.named_parameters()}
        tensors |= dict(now.model.named_buffers())
        write_tensors_atomic(self._folder / f"round-{stage}.safetensors", tensors)
        self._done.append(facts | {"kept": [k.tolist() for k in now.kept]})
        write_json_atomic(self._folder / "rounds.json", {"key": self._key, "rounds": self._done})
        self._forget_before(stage)

    def _forget_before(self, stage: int) -> None:
        """Remove what a finished round no longer needs: its training's state, and the weights that it started from."""
        if self._folder is not None:
            forget(self._folder / f"round-{stage - 1}.safetensors")
            forget(self._folder / f"round-{stage}.state")


def _rounds(content: Mapping[str, Any], folder: Path) -> list[dict[str, Any]]:
    """The finished rounds of a state: the facts of each, and the units that its groups kept."""
    rounds = content.get("rounds")
    for done in rounds if isinstance(rounds, list) else [None]:
        kept = done.get("kept") if isinstance(done, dict) else None
        if not isinstance(kept, list) or not all(map(are_whole, kept)):
            raise ArtifactError(
                f"{folder / 'rounds.json'}: damaged: a round without its kept units; delete it"
            )
    return list(rounds or ())


def _put(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put tensors in by name; a bias that the recovery gave a layer is made."""
    with torch.no_grad():
        for name, tensor in tensors.items():
            parent, _, last = name.rpartition(".")
            module = model.get_submodule(parent)
            old = getattr(module, last)
            if old is None:
                setattr(module, last, nn.Parameter(tensor.to(next(model.parameters()).device)))
            else:
                old.copy_(tensor)
