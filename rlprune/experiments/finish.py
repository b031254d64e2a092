"""The final fine-tune, and the one look at the test split."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config.names import SCORE_KINDS
from ..pruning.history import History
from ..pruning.plan import Plan
from ..pruning.surgery import prune
from ..utils.files import write_tensors_atomic
from ..utils.progress import Callback
from ..utils.timing import measure
from ..workloads.outcomes import Outcomes
from .fine_tunes import FineTune
from .methods import MethodResult
from .prepare import Experiment


@dataclass(frozen=True)
class FinalModel:
    """A method's model after the final fine-tune, its plan in units of the dense model, and its table row.

    ``model`` is None for rules and baselines where models are large (``ModelAdapter.keeps_models``): with all of them
    in memory a table of twenty methods would need the weights twenty times.
    """

    row: dict[str, Any]
    model: Any
    plan: Plan | None
    outcomes: Outcomes | None = None
    """Quality of each test sample, where it is known: after the fine-tune, and of the dense model as it came."""


def finish(
    experiment: Experiment,
    found: MethodResult | None,
    *,
    seed: int,
    state: Path | None = None,
    callback: Callback | None = None,
) -> FinalModel:
    """Fine-tune a method's plan (the dense model for ``found = None``) and report it on test, before and after.

    The test split is read here and nowhere else, after everything has been chosen. With ``state`` the
    outcome is kept in that folder and a killed fine-tune goes on where it was.
    """
    model, plan = _built(experiment, found.history if found else None)
    head = _head(experiment, found, seed)
    tune = FineTune(experiment, seed, None if found is None else found.history, state)
    one_stage = found is not None and len(found.history) == 1
    done = finish_model(tune, model, plan, head, callback=callback, one_stage=one_stage)
    if found is not None and found.trained:  # the other finalists' fine-tunes are part of the method's
        own = done.row["widths"]
        done.row["finish_seconds"] += sum(f["seconds"] for f in found.trained if f["widths"] != own)
    return done


def finish_model(
    tune: FineTune,
    model: nn.Module,
    plan: Plan | None,
    head: Mapping[str, object],
    *,
    callback: Callback | None = None,
    one_stage: bool = False,
) -> FinalModel:
    """`finish` of a model that is there already; ``plan`` is None for the dense one.

    ``one_stage``: the model is the dense one's cut by the plan, so that its fine-tune may start elsewhere
    (`finish.start`).

    ``head`` is the part of its row that the method knows: method, kind, seed, evaluations, seconds, score, validation,
    validation_loss.
    """
    callback, experiment = callback or Callback(), tune.experiment
    tune.as_saved(model)
    facts = tune.load(model, needs="test_loss")
    phase = f"fine-tune {head['method']}"
    if facts is not None and tune.has_length:
        callback.training(phase, 1, 1, {})
    if facts is None:
        model, facts = _measured(tune, model, plan if one_stage else None, callback, phase)
    callback.close()
    facts.pop("tuned", None)  # what the choice went by; the row has it of all finalists
    kept_outcomes = facts.pop("outcomes", None)
    outcomes = None if kept_outcomes is None else Outcomes.from_dict(kept_outcomes)
    row = _row(experiment, head, model, plan, facts)
    kept = experiment.workload.adapter.keeps_models or head["kind"] in ("dense", "agent")
    return FinalModel(row, model if kept else None, plan, outcomes)


def add_latency(finished: Sequence[FinalModel], experiment: Experiment, budget_seconds: float = 15.0) -> None:
    """Measure all models that are in memory in turns and put the medians, in milliseconds, into their rows."""
    models = {str(i): f.model for i, f in enumerate(finished) if f.model is not None}
    how = experiment.workload.adapter.latency
    times = measure(
        models,
        experiment.workload.example_inputs,
        batch_sizes=how.batch_sizes,
        budget_seconds=budget_seconds,
        warmup=how.warmup,
    )
    for i, found in times.items():
        finished[int(i)].row["latency_ms"] = {str(batch): round(ms, 4) for batch, ms in found.items()}


def _built(experiment: Experiment, history: History | None) -> tuple[nn.Module, Plan | None]:
    if history is None:
        # A cut that keeps everything is a copy that shares no tensor with the dense model.
        space = experiment.space
        return prune(experiment.workload.model, experiment.evaluator.plan(space.widths)), None
    origin = {"budget": str(experiment.budget), "metric": experiment.metric}
    if len(history) == 1:
        return experiment.evaluator.build(history[0]), experiment.evaluator.plan(history[0], origin)
    return experiment.evaluator.build(history), experiment.evaluator.staged_plan(history, origin)


def _measured(
    tune: FineTune, model: nn.Module, plan: Plan | None, callback: Callback, phase: str
) -> tuple[nn.Module, dict[str, Any]]:
    """The fine-tuned model, and test figures before and after, with the weights that ``finish.dtype`` saves.

    ``plan`` is that of a model of one stage, whose fine-tune may start elsewhere (`finish.start`).
    """
    experiment, workload = tune.experiment, tune.experiment.workload
    started = time.perf_counter()
    with workload.test_opened():
        before = workload.evaluate(model, "test")
    seconds = time.perf_counter() - started
    facts: dict[str, Any] = {"test": before.metric, "test_loss": before.loss}
    facts |= workload.test_facts(before.count) | workload.adapter.finish_facts(experiment.config.finish)
    after = before
    if tune.has_length:
        model, trained = tune.train(model, plan, callback, phase)
        facts |= trained
        started = time.perf_counter()
        with workload.test_opened():
            after = workload.evaluate(model, "test")
        seconds += time.perf_counter() - started + facts["finish_seconds"]
    facts |= {"test_finetuned": after.metric, "test_loss_finetuned": after.loss}
    # What a plan costs is told against the dense model as it came.
    outcomes = (before if tune.history is None else after).outcomes
    if outcomes is not None:
        facts["outcomes"] = outcomes.to_dict()
    facts |= {"finish_seconds": seconds}
    tune.save(facts, None if tune.has_length else model)
    return model, facts


def save_outcomes(finished: Sequence[FinalModel], path: Path) -> str | None:
    """Write the quality of each test sample under "METHOD/SEED", shape (2, n): values, then weights.

    Returns what a value is, "metric" or "loss"; None where no sample has one, and no file is written.
    """
    known = {
        f"{done.row['method']}/{done.row['seed']}": torch.stack([done.outcomes.values, done.outcomes.weights])
        for done in finished
        if done.outcomes is not None
    }
    kinds = {done.outcomes.kind for done in finished if done.outcomes is not None}
    if len(kinds) != 1:
        return None
    # Right or wrong fits a byte; a file of all methods stays small.
    small = all(bool(((t == 0) | (t == 1)).all()) for t in known.values())
    write_tensors_atomic(path, {n: t.to(torch.uint8 if small else torch.float32) for n, t in known.items()})
    return kinds.pop()


def tensor_bytes(model: nn.Module) -> int:
    """Bytes of a model's tensors in its file: parameters and buffers in their own format, shared ones once."""
    tensors = {(t.data_ptr(), t.shape): t for t in model.state_dict().values() if isinstance(t, Tensor)}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def _head(experiment: Experiment, found: MethodResult | None, seed: int) -> dict[str, Any]:
    """What a method, or the dense model, knows of its row before the test split is read."""
    if found is None:
        quality = experiment.workload.evaluate(experiment.workload.model, "validation")
        head: dict[str, Any] = {
            "method": "dense",
            "kind": "dense",
            "seed": seed,
            "evaluations": 0,
            "seconds": 0.0,
        }
        score, validation, validation_loss = 0.0, quality.metric, quality.loss
        kind = experiment.evaluator.score_settings.kind
        if SCORE_KINDS.source(kind) is not None or experiment.workload.score_fn is not None:
            score = float(experiment.workload.judge(kind)(experiment.workload.model).scores.mean())
        elif kind != "kl":  # KL of the dense model to itself is 0
            score = validation if kind == "accuracy" else -validation_loss
    else:
        head = {"method": found.method, "kind": found.kind, "seed": seed}
        head |= {"evaluations": found.account.spent, "seconds": round(found.seconds, 2)}
        head |= {"learning": dict(found.learning)} if found.learning else {}
        head |= {"finalists": list(found.trained)} if found.trained else {}
        full = experiment.evaluator.evaluate_full(found.history)
        score, validation, validation_loss = full.score, full.metric, full.loss
        if experiment.evaluator.format_trial is not None:
            head["scoring"] = experiment.evaluator.scoring_facts["format"]
    return head | {"score": score, "validation": validation, "validation_loss": validation_loss}


def _row(
    experiment: Experiment,
    head: Mapping[str, object],
    model: nn.Module,
    plan: Plan | None,
    facts: Mapping[str, object],
) -> dict[str, Any]:
    space = experiment.space
    widths = space.widths if plan is None else plan.widths
    costs = {metric: space.cost(widths, metric) for metric in space.costs}
    row = {**head, "cost": costs[experiment.metric], **costs, **facts, "bytes": tensor_bytes(model)}
    row["widths"] = [int(w) for w in widths]
    if plan is not None and "importance" in plan.origin:
        row["importance"] = plan.origin["importance"]
    dense = {name for name, _ in experiment.workload.model.named_parameters()}
    # The recovery step `bias` gives some layers a bias that the dense model has not.
    if sum(p.numel() for name, p in model.named_parameters() if name in dense) != costs["params"]:
        raise AssertionError("the built model does not have the parameters that its widths say")
    return row
