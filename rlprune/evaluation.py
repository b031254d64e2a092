"""From a plan to a scored candidate, and the memo of all of them."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import RecoveryConfig, ScoreConfig
from .errors import BudgetError, DataError
from .pruning.importance import Scores, compute
from .pruning.plan import Plan, make_plan
from .pruning.reconstruct import evaluating
from .pruning.recovery import Recovery
from .pruning.space import PruningSpace
from .pruning.surgery import prune
from .pruning.tracing import trace
from .rules.context import Context

History = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Candidate:
    """A plan that has been built, recovered and scored on the validation split.

    ``cost`` is absolute, in the metric of the evaluator; ``score`` higher is better; ``error`` the
    standard error of the score over the images; ``loss`` and ``metric`` are means per image.
    """

    widths: tuple[int, ...]
    cost: float
    score: float
    loss: float
    metric: float
    error: float
    seconds: float


@dataclass
class _Stage:
    """A model after some stages of incremental pruning."""

    model: nn.Module
    plan: Plan | None
    space: PruningSpace
    importance: Scores
    recovery: Recovery


class Evaluator:
    """Builds, recovers and scores candidates of one workload; every distinct plan once.

    Args:
        space: traced from the workload's model when not given.
        importance: a name (``rlprune list importances``) or G arrays of unit scores.
        metric: the cost that candidates report.
    """

    def __init__(
        self,
        workload: Any,
        space: PruningSpace | None = None,
        *,
        importance: str | Sequence[Any] = "taylor",
        recovery: RecoveryConfig | None = None,
        score: ScoreConfig | None = None,
        metric: str = "macs",
        seed: int = 0,
    ) -> None:
        self.workload = workload
        self.space = space or trace(workload.model, workload.example_inputs)
        self.metric = metric
        self.score_settings = score or ScoreConfig()
        self.seed = seed
        self._recovery_settings = recovery or RecoveryConfig()
        self._importance_name = importance if isinstance(importance, str) else None
        scores = (
            compute(importance, workload, self.space, seed) if isinstance(importance, str) else importance
        )
        self.importance: Scores = [np.asarray(s, dtype=np.float64) for s in scores]
        recover = Recovery(workload, self.space, self._recovery_settings)
        self._dense_stage = _Stage(workload.model, None, self.space, self.importance, recover)
        self._memo: dict[History, Candidate] = {}
        self._full: dict[History, Candidate] = {}
        self._last: dict[History, _Stage] = {}
        self._dense_logs: dict[bool, list[Tensor]] = {}

    @property
    def dense(self) -> Candidate:
        """The dense model under the same recovery."""
        return self.evaluate(self.space.widths)

    def evaluate(self, widths: Any) -> Candidate:
        """Score widths (G,) in units; the same widths give the same object again, at no cost."""
        return self.evaluate_staged((tuple(int(w) for w in np.asarray(widths).ravel()),))

    def evaluate_staged(self, history: Any) -> Candidate:
        """Score the last of several stages: cut, recover, rank the units anew, cut again.

        ``history`` holds the widths (G,) after each stage, none above the one before it.
        """
        key: History = tuple(tuple(int(w) for w in widths) for widths in history)
        if key not in self._memo:
            self._memo[key] = self._scored(key, full=False)
        return self._memo[key]

    def evaluate_full(self, widths: Any) -> Candidate:
        """Score on the whole validation split (the search may look at its first images only)."""
        history = widths if len(widths) and np.ndim(widths[0]) else (widths,)
        key: History = tuple(tuple(int(w) for w in stage) for stage in history)
        images = self.score_settings.images
        if images is None or images >= self.workload.size("validation"):
            return self.evaluate_staged(key)
        if key not in self._full:
            self._full[key] = self._scored(key, full=True)
        return self._full[key]

    def remember(self, history: History, candidate: Candidate) -> None:
        """Put a candidate that was scored earlier into the memo."""
        self._memo.setdefault(history, candidate)

    def plan(self, widths: Any, origin: dict[str, Any] | None = None) -> Plan:
        """The plan of widths (G,): the most important units of each group."""
        return make_plan(self.space, importance=self.importance, widths=widths, origin=origin)

    def build(self, widths: Any) -> nn.Module:
        """The cut and recovered model of widths (G,) or of a history of stages; new at every call."""
        history = widths if len(widths) and np.ndim(widths[0]) else (widths,)
        return self._built(tuple(tuple(int(w) for w in stage) for stage in history))[0]

    def staged_plan(self, history: Any, origin: dict[str, Any] | None = None) -> Plan:
        """The plan, in units of the dense model, that a history of stages ends in."""
        plan = self._built(tuple(tuple(int(w) for w in stage) for stage in history))[1]
        return dataclasses.replace(plan, origin=dict(origin or {}))

    def context(self, budget: Any, metric: str | None = None, probe: Any = None) -> Context:
        """What a rule sees of this workload; its probes are scored here unless ``probe`` charges for them."""
        return Context(
            space=self.space,
            model=self.workload.model,
            importance=self.importance,
            budget=budget,
            metric=metric or self.metric,
            workload=self.workload,
            probe=probe or (lambda widths: self.evaluate(widths).loss),
            seed=self.seed,
        )

    def standard_error(self, candidate: Candidate) -> float:
        """Standard error of a candidate's score over the validation images."""
        return candidate.error

    def _scored(self, history: History, *, full: bool) -> Candidate:
        started = time.perf_counter()
        slim, plan = self._built(history)
        score, error, loss, metric = self._judge(slim, full)
        return Candidate(
            widths=history[-1],
            cost=self.space.cost(plan.widths, self.metric),
            score=score,
            loss=loss,
            metric=metric,
            error=error,
            seconds=time.perf_counter() - started,
        )

    def _built(self, history: History) -> tuple[nn.Module, Plan]:
        """Cut and recovered model, and its plan in units of the dense model."""
        stage = self._dense_stage if len(history) == 1 else self._after(history[:-1])
        widths = np.array(history[-1], dtype=np.int64)
        if widths.shape != stage.space.widths.shape or (widths > stage.space.widths).any():
            raise BudgetError(
                f"widths {list(history[-1])} do not fit the model; allowed: up to {stage.space.widths}"
            )
        cut = make_plan(stage.space, importance=stage.importance, widths=widths)
        slim = prune(stage.model, cut)
        stage.recovery(slim, cut)
        if stage.plan is None:
            return slim, cut
        kept = tuple(before[now] for before, now in zip(stage.plan.kept, cut.kept, strict=True))
        return slim, Plan(self.space, widths, kept)

    def _after(self, history: History) -> _Stage:
        """The stage that a history leaves; the latest one is kept, as an episode asks for it again."""
        if history not in self._last:
            model, plan = self._built(history)
            space = self.space.after(plan.kept)
            name = self._importance_name
            if name is None:
                importance = [s[k] for s, k in zip(self.importance, plan.kept, strict=True)]
            else:
                importance = compute(name, self.workload, space, self.seed, model)
            recovery = Recovery(self.workload, space, self._recovery_settings, model)
            self._last = {h: s for h, s in self._last.items() if h == history[:-1]}
            self._last[history] = _Stage(model, plan, space, importance, recovery)
        return self._last[history]

    def _judge(self, model: nn.Module, full: bool) -> tuple[float, float, float, float]:
        """(score, its standard error, mean loss, mean metric) on the validation split."""
        limit = None if full else self.score_settings.images
        kind = self.score_settings.kind
        scores, loss, metric, count = [], 0.0, 0.0, 0
        dense = self._dense_outputs(full) if kind == "kl" else []
        with torch.no_grad(), evaluating(model):
            for i, (inputs, targets) in enumerate(self.workload.batches("validation", limit)):
                outputs = model(inputs)
                batch_loss = self.workload.loss(outputs, targets)
                batch_metric = self.workload.metric(outputs, targets)
                if kind == "kl":
                    scores.append(-_divergence(dense[i], outputs))
                else:
                    value = -batch_loss if kind == "loss" else batch_metric / len(targets)
                    scores.append(value.reshape(1).expand(len(targets)))
                loss += float(batch_loss) * len(targets)
                metric += float(batch_metric)
                count += len(targets)
        if not count:
            raise DataError(f"workload {self.workload.name!r}: the split 'validation' is empty")
        values = torch.cat(scores).double()
        error = float(values.std(unbiased=False)) / math.sqrt(count)
        score = float(values.mean())
        # A diverged candidate is the worst there is, not a hole in the ledger.
        return (score if math.isfinite(score) else -1e9), error, loss / count, metric / count

    def _dense_outputs(self, full: bool) -> list[Tensor]:
        if full not in self._dense_logs:
            limit = None if full else self.score_settings.images
            with torch.no_grad(), evaluating(self.workload.model):
                batches = self.workload.batches("validation", limit)
                logs = [F.log_softmax(self.workload.model(x).float(), dim=-1) for x, _ in batches]
            self._dense_logs[full] = logs
        return self._dense_logs[full]


def _divergence(dense_log: Tensor, outputs: Tensor) -> Tensor:
    """KL(dense || pruned) of each sample, (N,); further dimensions (the tokens of a text) are averaged."""
    each = (dense_log.exp() * (dense_log - F.log_softmax(outputs.float(), dim=-1))).sum(dim=-1)
    return each.flatten(1).mean(dim=1) if each.ndim > 1 else each
