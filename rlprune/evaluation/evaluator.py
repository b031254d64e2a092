"""From a plan to a scored candidate, and the memo of all of them."""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from ..config.config import AUTO, ScoreConfig
from ..config.training import RecoveryConfig
from ..errors import ConfigError
from ..importance.calibration_cache import CURVES
from ..pruning.budget import BudgetLike
from ..pruning.history import History, PlanLike, as_history
from ..pruning.plan import Plan, make_plan
from ..pruning.space import PruningSpace
from ..rules.context import Context
from ..tracing.trace import TraceOptions
from ..utils.arrays import Floats, Ints
from ..utils.timing import quiet_clock
from ..workloads.adapter import DefaultImportance
from ..workloads.base import Workload
from ..workloads.judge import Judgement
from ..workloads.scoring_format import ScoringFormat
from .builder import Builder, Change
from .candidate import Candidate, Scored
from .checks import ENOUGH, check_whole, equal_scores
from .format_trial import FormatTrial, kept_trial, trial_key, trial_samples, try_format
from .judging import Judging
from .logit_cache import LogitCache
from .parallel import Ahead, Answer, Asked, Key, Workers
from .recovery import Recovery
from .unlabelled import Rows, unlabelled

Probes = TypeVar("Probes")
Build = Callable[[PlanLike], nn.Module]


class Evaluator:
    """Builds, recovers and scores candidates of one workload; every distinct plan once.

    Where the adapter scores candidates in a format of their own (``score.dtype``), only what is scored is in it (and
    shares what no plan cuts, where the weights are cast); what is built for keeps is a full copy in the dense model's.

    Args:
        space: traced from the workload's model when not given.
        importance: a name (``rlprune list importances``), "auto" (as ``prune.importance``), or G arrays of unit scores.
        metric: the cost that candidates report.
    """

    def __init__(
        self,
        workload: Workload,
        space: PruningSpace | None = None,
        *,
        importance: str | Sequence[ArrayLike] = AUTO,
        recovery: RecoveryConfig | None = None,
        score: ScoreConfig | None = None,
        metric: str = "macs",
        seed: int = 0,
    ) -> None:
        self.workload = workload
        self.adapter = workload.adapter
        if space is None:
            space = self.adapter.trace(workload.model, workload.example_inputs, TraceOptions())
        self.space = space
        self.metric = metric
        self.score_settings = score or ScoreConfig()
        self.seed = seed
        check_whole(workload, self.score_settings)
        self.adapter.keep_memory()
        self._formats = self.adapter.scoring_formats(workload, space, self.score_settings.dtype)
        self._format = self._formats[-1]
        self.format_trial: FormatTrial | None = None
        self._judging = Judging(workload, self.score_settings)
        self._logit_probes: dict[float, object] = {}
        self._logit_cache: LogitCache | None = None
        self._builder = Builder(workload, space, importance, recovery or RecoveryConfig(), seed)
        self.calibration, self.importance = self._builder.calibration, self._builder.dense.importance
        # What has been scored for this evaluator's forks, by plan, split (whole or not) and samples.
        self._bank: dict[Key, Candidate] = {}
        self._memo: dict[History, Candidate] = {}
        self._full: dict[History, Candidate] = {}
        self._partial: dict[tuple[History, int], Candidate] = {}
        self._begun: dict[History, list[Judgement]] = {}
        self._ahead: Ahead | None = None
        self.reused = 0.0
        self._prepared_names = self.calibration.names
        self._visible: frozenset[str] | None = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        """In the process that it arrives in: a worker's C library is told what ours was told."""
        self.__dict__.update(state)
        self.adapter.keep_memory()

    def fork(self) -> Evaluator:
        """This evaluator as it was when it had been prepared, for one of several methods that are compared.

        Forks share the prepared statistics and score no plan twice. What one of them does changes nothing
        for the others: each counts in ``reused`` the seconds that it was spared, so that a method's time does
        not depend on who came before, and ``has_measured`` only what the preparation has measured.
        """
        other = copy.copy(self)
        other._memo, other._full, other._partial, other._begun = {}, {}, {}, {}
        other._builder = self._builder.fork()
        other._logit_probes, other._logit_cache = {}, None
        other._ahead = None if self._ahead is None else self._ahead.fork()
        other.reused = 0.0
        other._visible = self._prepared_names
        return other

    def bare(self) -> Evaluator:
        """A fork that knows no candidate, for another process."""
        other = self.fork()
        other._bank, other._ahead = {}, None
        return other

    def use_workers(self, workers: Workers | None) -> None:
        """Let workers score what `prefetch` is told of (see `evaluation.parallel`); None: this process alone."""
        self._ahead = None if workers is None else Ahead(workers)

    @property
    def workers(self) -> int:
        """Candidates that are scored at the same time."""
        return 1 if self._ahead is None else self._ahead.workers.executor.workers

    def prefetch(self, plans: Sequence[PlanLike], *, full: bool = False, samples: int | None = None) -> None:
        """Let workers begin with plans that will be asked for: on the whole split, or on a rung's ``samples``.

        Without workers nothing happens. What is known is left out, and `evaluate` and its like give what they would
        give without: candidates are charged, checked and kept when they are asked for.
        """
        if self._ahead is None:
            return
        images = self.score_settings.samples
        full = full and images is not None and images < self.workload.size("validation")
        if samples is not None and samples >= self.samples:
            samples = None
        known = (
            self._full
            if full
            else self._memo
            if samples is None
            else {k for k, n in self._partial if n == samples}
        )
        for key in map(as_history, plans):
            if key not in known and (key, full, samples) not in self._bank:
                begun = () if full else self._begun.get(key, ())
                logits = self._logit_cache is not None and not full
                self._ahead.ask(Asked(key, full, samples, tuple(begun), logits))

    def answer(self, asked: Asked) -> Answer:
        """In a worker: score a candidate, and hand over what the evaluator that asked keeps of it."""
        cache = self.logit_cache() if asked.logits else None
        self._begun[asked.history] = list(asked.parts)
        candidate = self._scored(asked.history, full=asked.full, samples=asked.samples)
        parts = self._begun.pop(asked.history, [])
        return Answer(
            candidate,
            parts if asked.samples is not None else (),
            None if cache is None or asked.full else cache.take(asked.history),
        )

    @property
    def dense(self) -> Candidate:
        """The dense model under the same recovery."""
        return self.evaluate(self.space.widths)

    def evaluate(self, widths: PlanLike) -> Candidate:
        """Score widths (G,) in units; the same widths give the same object again, at no cost."""
        return self.evaluate_staged((np.asarray(widths).ravel(),))

    def evaluate_staged(self, history: PlanLike) -> Candidate:
        """Score the last of several stages: cut, recover, rank the units anew, cut again.

        ``history`` holds the widths (G,) after each stage, none above the one before it.
        """
        key = as_history(history)
        if key not in self._memo:
            self._memo[key] = self._candidate(key, full=False)
            self.refuse_equal_scores(ENOUGH)
        return self._memo[key]

    def refuse_equal_scores(self, least: int) -> None:
        """DataError with the reason where ``least`` different pruned plans, or more, all have the same score: a search
        among them would find nothing."""
        dense = as_history(self.space.widths)
        scores = {history: c.score for history, c in self._memo.items() if history != dense}
        if len(scores) >= least and len({*scores.values()}) == 1:
            raise equal_scores(
                self.workload, self.score_settings.kind, next(iter(scores.values())), len(scores)
            )

    def evaluate_partial(self, widths: PlanLike, samples: int) -> Candidate:
        """Score widths (G,), or a history of stages, on the first ``samples`` validation samples only.

        ``samples`` is one of ``score.rungs`` (successive halving). What was scored is kept: a later
        ``evaluate`` or a larger rung reads only the samples that are left, with the same result as at once.
        """
        key = as_history(widths)
        rungs = self.score_settings.rungs
        if samples >= self.samples:
            return self.evaluate_staged(key)
        if samples not in rungs:
            allowed = ", ".join(str(r) for r in rungs) or "none"
            raise ConfigError(f"score.rungs: no rung of {samples} samples; there are: {allowed}")
        if (key, samples) not in self._partial:
            self._partial[key, samples] = self._candidate(key, full=False, samples=samples)
        return self._partial[key, samples]

    @property
    def samples(self) -> int:
        """Validation samples (images, sequences) that a whole score in the search reads."""
        return self._judging.samples

    @property
    def rungs(self) -> tuple[int, ...]:
        """Sample counts at which successive halving may drop a candidate, rising, all below ``samples``."""
        return self._judging.rungs

    def evaluate_full(self, widths: PlanLike) -> Candidate:
        """Score on the whole validation split (the search may look at its first images only)."""
        key = as_history(widths)
        images = self.score_settings.samples
        if images is None or images >= self.workload.size("validation"):
            return self.evaluate_staged(key)
        if key not in self._full:
            self._full[key] = self._candidate(key, full=True)
        return self._full[key]

    def score_of(self, model: nn.Module) -> float:
        """Score of a model that is there already, on what `evaluate_full` reads."""
        return float(self._judging.of(True)(model).scores.mean())

    def divergence(self, candidate: Scored) -> float:
        """How far a candidate's outputs are from the dense model's, in nats: the score where that is a divergence, else
        how much higher its loss is (below 0 where it is lower)."""
        if self.score_settings.kind == "kl":
            return self.dense.score - candidate.score
        return candidate.loss - self.dense.loss

    def remember(self, history: History, candidate: Candidate) -> None:
        """Take a candidate that was scored earlier, on all samples or on a rung's, instead of scoring it again."""
        partial = self.rungs and 0 < candidate.samples < self.samples
        self._bank.setdefault((history, False, candidate.samples if partial else None), candidate)

    def plan(self, widths: ArrayLike, origin: Mapping[str, object] | None = None) -> Plan:
        """The plan of widths (G,): the most important units of each group; its origin names their ranking."""
        facts = dict(origin or {}) | self.ranking_facts
        return make_plan(self.space, importance=self.importance, widths=widths, origin=facts)

    def build(self, widths: PlanLike, *, scoring: bool = False) -> nn.Module:
        """The cut and recovered model of widths (G,) or of a history of stages; new at every call.

        ``scoring``: as a candidate is scored, not for keeps: where there is a scoring format, the model is in it and
        shares what no plan cuts.
        """
        return self._builder(as_history(widths), self._format if scoring else None)[0]

    def staged_plan(self, history: PlanLike, origin: Mapping[str, object] | None = None) -> Plan:
        """The plan, in units of the dense model, that a history of stages ends in."""
        plan = self._builder(as_history(history))[1]
        return dataclasses.replace(plan, origin=dict(origin or {}) | self.ranking_facts)

    def rerank(self, scores: Sequence[Floats], change: Change | None = None) -> None:
        """From now on rank units by these G arrays of scores, which an agent has learned; before any plan is scored.

        What other methods have scored, and workers, know another ranking: from now on this process scores all plans.

        Args:
            change: ``change(cut model, its plan)`` puts weights in place that were learned with the units, in every
                model that loses any; before the recovery.

        Raises:
            ConfigError: plans have been scored already, or a step of the recovery is made for another ranking or for
                the dense weights.
        """
        dense = as_history(self.space.widths)
        if any(history != dense for history in self._memo):
            raise ConfigError("rerank: plans have been scored with another ranking of the units")
        self._builder.rerank(scores, change)
        self.importance = self._builder.dense.importance
        self._bank = {key: candidate for key, candidate in self._bank.items() if key[0] == dense}
        self._ahead = None

    def context(
        self,
        budget: BudgetLike,
        metric: str | None = None,
        evaluate: Callable[[Ints], Scored] | None = None,
    ) -> Context:
        """What a rule sees of this workload; its probes are scored here unless ``evaluate`` charges for them."""
        scored: Callable[[Ints], Scored] = evaluate or self.evaluate
        return Context(
            space=self.space,
            model=self.workload.model,
            importance=self.importance,
            budget=budget,
            metric=metric or self.metric,
            workload=self.workload,
            probe=lambda widths: scored(widths).loss,
            divergence=lambda widths: self.divergence(scored(widths)),
            seed=self.seed,
            expect=self.prefetch,
            calibration=self.calibration,
        )

    @property
    def ranking(self) -> DefaultImportance | None:
        """The importance that ranks the units by name, never "auto"; None where scores were given or an agent learned
        them."""
        return self._builder.ranking

    @property
    def ranking_facts(self) -> dict[str, object]:
        """What the origin of a plan says of the ranking."""
        return {} if self.ranking is None else {"importance": self.ranking.name}

    @property
    def dtype(self) -> torch.dtype | None:
        """Number format that the weights of scored candidates are cast to; None for the dense model's own."""
        return self._format.weights

    @property
    def scoring_format(self) -> ScoringFormat:
        """How candidates compute while they are scored."""
        return self._format

    @property
    def scoring_facts(self) -> dict[str, Any]:
        """The format of scored candidates, what a trial found of it, and how many training samples are scored as well,
        as plain values."""
        trial = None if self.format_trial is None else self.format_trial.facts()
        return {"format": self._named(self._format), "trial": trial, "unlabelled": self._judging.unlabelled}

    def _named(self, chosen: ScoringFormat) -> str:
        first = next(self.workload.model.parameters(), None)
        return chosen.named(torch.get_default_dtype() if first is None else first.dtype)

    @property
    def settled(self) -> ScoreConfig:
        """The settings of the score with the format that was chosen, for an evaluator that is to score alike."""
        chosen = self._format.weights or self._format.autocast or torch.float32
        name = "bfloat16" if chosen == torch.bfloat16 else "float32"
        return dataclasses.replace(self.score_settings, dtype=name)

    def settle_format(self, budget: BudgetLike) -> FormatTrial | None:
        """Choose the format of scored candidates where there is a faster one than the surest, before the first score.

        A trial of random plans of the budget decides (`evaluation.format_trial`); it is kept in the cache folder, by
        model, data and settings, so that a resumed run decides as the first did. None where there is no choice.

        Raises:
            ConfigError: candidates have been scored already; their scores would not compare.
        """
        if len(self._formats) == 1 or self.format_trial is not None:
            return self.format_trial
        if self._bank:
            raise ConfigError("settle_format: comes before the first score")
        about = (self.score_settings, self._builder.settings, str(budget), self.metric)
        names = [*map(self._named, self._formats)]
        size = self.workload.size("calibration")
        samples = trial_samples(self.space, min(self._builder.settings.samples or size, size), self.samples)
        key = trial_key(self.workload, self.space, self.importance, self._formats, about)
        self.format_trial = kept_trial(
            key,
            lambda: try_format(self._trial, self.space, budget, self.metric, self._formats, names, samples),
        )
        if self.format_trial.taken:
            self._format = self._formats[0]
        return self.format_trial

    def _trial(
        self, widths: Ints, chosen: ScoringFormat, calibration: int, validation: int
    ) -> tuple[float, float]:
        """Score and seconds of a rough candidate in a format, that nothing remembers."""
        clock = quiet_clock(self.workload.device)
        started = clock()
        slim = self._builder(as_history(widths), chosen, calibration)[0]
        whole = self.workload.whole_score(self.score_settings.kind) is not None
        found = self._judging.of(False)(slim, 0, None if whole else validation)
        return float(found.scores.mean()), clock() - started

    @property
    def recovery_settings(self) -> RecoveryConfig:
        return self._builder.settings

    @property
    def recovery(self) -> Recovery:
        """What a candidate of one stage receives before it is scored."""
        return self._builder.dense.recovery

    def has_measured(self, name: str) -> bool:
        """Whether something that an importance or a rule measures of the dense model is there (see `fork`)."""
        return self.calibration.known(name) and (self._visible is None or name in self._visible)

    @property
    def ranks_by_divergence(self) -> bool:
        """Whether what cuts are expected to cost was measured for the ranking of the units itself (`obs_fisher`)."""
        return CURVES in self._prepared_names

    def expected(self, widths: ArrayLike) -> Floats | None:
        """Divergence (N, G) that each group's cut is expected to cost at widths (N, G), before any evaluation.

        Known where an importance or a rule has measured it (see ``CalibrationCache.curves``); None elsewhere, and 0
        for groups without such a curve.
        """
        curves = self.calibration.curves if self.has_measured(CURVES) else None
        if curves is None:
            return None
        cut = self.space.widths - np.asarray(widths, dtype=np.int64)
        costs = np.zeros(cut.shape)
        for group, curve in curves.items():
            costs[:, group] = curve[cut[:, group]]
        return costs

    def logit_probes(
        self, target: float, make: Callable[[PruningSpace, Build, Tensor], Probes]
    ) -> Probes | None:
        """What this checkpoint's logits tell of plans of a cost (absolute), made once for each cost.

        ``make(space, build, images)`` gets what it may build and unlabelled images of the calibration and the train
        split. None where builds on them tell nothing (``ModelAdapter.unlabelled_builds``).
        """
        if not self.adapter.unlabelled_builds:
            return None
        if target not in self._logit_probes:
            images = unlabelled(self.workload)
            self._logit_probes[target] = None if images is None else make(self.space, self._rows_of, images)
        return cast("Probes | None", self._logit_probes[target])

    def _rows_of(self, widths: PlanLike) -> nn.Module:
        """The model of some widths as a function of inputs that gives its rows of logits."""
        return Rows(self.build(widths), self.workload)

    def logit_cache(self) -> LogitCache | None:
        """The logits of what is scored from the first call on; None where a search cannot do with them.

        That is for outputs that are neither one row a sample nor one a token, for other scores than `kl`, and where
        a rung may drop a candidate half-scored.
        """
        if self._logit_cache is None and not self.rungs and self.score_settings.kind == "kl":
            dense = self._judging.of(False)(self.workload.model).outputs
            if dense is not None:
                self._logit_cache = LogitCache(dense, self._outputs)
        return self._logit_cache

    def _outputs(self, history: History) -> Tensor:
        model = self._builder(history, self._format)[0]
        found: Tensor = self._judging(model, [], full=False, samples=None).outputs
        del model
        self.adapter.release_memory()
        return found

    def standard_error(self, candidate: Candidate) -> float:
        """Standard error of a candidate's score over the samples that it was scored on."""
        return candidate.error

    def _candidate(self, history: History, *, full: bool, samples: int | None = None) -> Candidate:
        """Scored now, or taken from the bank with its seconds counted in ``reused``."""
        asked = (history, full, samples)
        if asked in self._bank:
            self.reused += self._bank[asked].seconds
        elif (answer := None if self._ahead is None else self._ahead.take(asked)) is not None:
            self._bank[asked] = self._taken(asked, answer)
        else:
            limit = {} if samples is None else {"samples": samples}
            self._bank[asked] = self._scored(history, full=full, **limit)
        return self._bank[asked]

    def _taken(self, asked: Key, answer: Answer) -> Candidate:
        """A worker's candidate, with all that scoring it here would have left."""
        history, full, samples = asked
        if not full:
            self._begun.pop(history, None)
        if samples is not None:
            self._begun[history] = list(answer.parts)
        if self._logit_cache is not None and answer.logits is not None:
            self._logit_cache.keep_rows(history, answer.logits)
        return answer.candidate

    def _scored(self, history: History, *, full: bool, samples: int | None = None) -> Candidate:
        started = time.perf_counter()
        parts = [] if full else self._begun.pop(history, [])
        self._judging.ask_dense(parts, full, samples)
        slim, plan = self._builder(history, self._format)
        self.adapter.release_memory()  # what cutting has left behind is not to lie below the activations
        joint = self._judging(slim, parts, full, samples)
        if samples is not None:
            self._begun[history] = parts
        del slim
        self.adapter.release_memory()  # candidates of many sizes leave holes that add up to a second model
        if self._logit_cache is not None and not full:
            self._logit_cache.keep(history, joint.outputs)
        values = joint.scores
        score = float(values.mean())
        return Candidate(
            widths=history[-1],
            cost=self.space.cost(plan.widths, self.metric),
            # A diverged candidate is the worst there is, not a hole in the ledger.
            score=score if math.isfinite(score) else -1e9,
            loss=joint.loss,
            metric=joint.metric,
            error=float(values.std(unbiased=False)) / math.sqrt(len(values)),
            seconds=time.perf_counter() - started,
            samples=len(values),
        )
