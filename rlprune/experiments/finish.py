"""Choosing the winner on validation, the final fine-tune, and the one look at the test split."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config.names import SCORE_KINDS
from ..errors import ArtifactError
from ..pruning.history import History
from ..pruning.plan import Plan
from ..pruning.surgery import prune
from ..utils.checkpoints import forget
from ..utils.files import read_json, read_tensors, write_json_atomic, write_tensors_atomic
from ..utils.progress import Callback
from ..utils.timing import measure
from ..workloads.adapter import TuneJob
from ..workloads.outcomes import Outcomes
from .methods import MethodResult, finalists
from .prepare import Experiment
from .saving import round_weights
from .tuning_start import tuning_start


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


def choose(
    experiment: Experiment, found: MethodResult, fallback: Sequence[MethodResult] = ()
) -> MethodResult:
    """Score the best few on the whole validation split and take the best of them.

    ``fallback`` (the rules) joins only now, so that the final plan is never worse on validation than any
    of them; a plan that only ties with a rule's is not replaced.
    """
    count = experiment.config.finish.candidates
    histories = finalists(experiment, found.account, count)
    experiment.evaluator.prefetch([*histories, *(other.history for other in fallback)], full=True)
    scores = {h: experiment.evaluator.evaluate_full(h).score for h in histories}
    best = max(histories, key=scores.__getitem__)
    chosen = replace(found, history=best)
    for other in fallback:
        score = experiment.evaluator.evaluate_full(other.history).score
        if score > scores[best]:
            chosen, scores[best] = replace(found, history=other.history), score
    return chosen


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
    one_stage = found is not None and len(found.history) == 1
    return finish_model(
        experiment, model, plan, head, seed=seed, state=state, callback=callback, one_stage=one_stage
    )


def finish_model(
    experiment: Experiment,
    model: nn.Module,
    plan: Plan | None,
    head: Mapping[str, object],
    *,
    seed: int,
    state: Path | None = None,
    callback: Callback | None = None,
    one_stage: bool = False,
) -> FinalModel:
    """`finish` of a model that is there already; ``plan`` is None for the dense one.

    ``one_stage``: the model is the dense one's cut by the plan, so that its fine-tune may start elsewhere
    (`finish.start`).

    ``head`` is the part of its row that the method knows: method, kind, seed, evaluations, seconds, score, validation,
    validation_loss.
    """
    callback = callback or Callback()
    method, kind = str(head["method"]), str(head["kind"])
    keep = _Kept(state, f"{method}-{0 if kind == 'dense' else head['seed']}")
    # Only the same plan under the same settings may be taken from an earlier try.
    mark = {
        "widths": list(plan.widths.tolist()) if plan else [],
        "finish": repr(experiment.config.finish),
        "seed": seed,
    }
    facts = keep.load(mark, model)
    if facts is None:
        wanted = None if kind == "dense" else experiment.config.finish.dtype
        job = TuneJob(seed, None, keep.training, callback.training, f"fine-tune {method}")
        model, facts = _measured(experiment, model, plan if one_stage else None, job, wanted)
        keep.save(mark, facts, model)
    callback.close()
    kept_outcomes = facts.pop("outcomes", None)
    outcomes = None if kept_outcomes is None else Outcomes.from_dict(kept_outcomes)
    row = _row(experiment, head, model, plan, facts)
    kept = experiment.workload.adapter.keeps_models or kind in ("dense", "agent")
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
    experiment: Experiment, model: nn.Module, plan: Plan | None, job: TuneJob, dtype: str | None
) -> tuple[nn.Module, dict[str, Any]]:
    """The fine-tuned model, and test figures before and after, with the weights that ``dtype`` saves (None: not saved).

    ``plan`` is that of a model of one stage, whose fine-tune may start elsewhere (`finish.start`).
    """
    workload = experiment.workload
    if dtype is not None:
        round_weights(workload, model, dtype)
    started = time.perf_counter()
    with workload.test_opened():
        before = workload.evaluate(model, "test")
    facts: dict[str, Any] = {"test": before.metric, "test_loss": before.loss}
    facts |= workload.test_facts(before.count) | workload.adapter.finish_facts(experiment.config.finish)
    after = before
    if workload.adapter.fine_tune_length(experiment.config.finish)[0]:
        model, chosen = tuning_start(experiment, model, plan, job.seed)
        facts |= chosen
        workload.fine_tune(model, experiment.config.finish, job)
        if dtype is not None:
            round_weights(workload, model, dtype)
        with workload.test_opened():
            after = workload.evaluate(model, "test")
    facts |= {"test_finetuned": after.metric, "test_loss_finetuned": after.loss}
    # What a plan costs is told against the dense model as it came.
    outcomes = (before if dtype is None else after).outcomes
    if outcomes is not None:
        facts["outcomes"] = outcomes.to_dict()
    return model, facts | {"finish_seconds": time.perf_counter() - started}


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


class _Kept:
    """The outcome of one fine-tune in the run's state folder, so that a resumed run does not repeat it."""

    def __init__(self, folder: Path | None, label: str) -> None:
        self._facts = folder / f"finish-{label}.json" if folder else None
        self._weights = folder / f"finish-{label}.safetensors" if folder else None
        self.training = folder / f"finish-{label}.state" if folder else None

    def load(self, mark: Mapping[str, object], model: nn.Module) -> dict[str, Any] | None:
        """The facts of an earlier try with the same mark, its weights put into ``model``; None without one."""
        if self._facts is None or self._weights is None or not self._facts.exists():
            return None
        try:
            kept = read_json(self._facts)
            if kept["mark"] != mark or not isinstance(kept["facts"], dict):
                return None
            model.load_state_dict(read_tensors(self._weights))
        except (ArtifactError, KeyError, RuntimeError, TypeError):
            return None  # a private file of this run that is not whole: the fine-tune is done again
        forget(self.training)
        facts: dict[str, Any] = kept["facts"]
        return facts

    def save(self, mark: Mapping[str, object], facts: Mapping[str, object], model: nn.Module) -> None:
        if self._facts is None or self._weights is None or self.training is None:
            return
        self._facts.unlink(missing_ok=True)
        write_tensors_atomic(self._weights, {k: v.detach().cpu() for k, v in model.state_dict().items()})
        write_json_atomic(self._facts, {"mark": mark, "facts": facts})
        forget(self.training)
