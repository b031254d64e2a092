"""From a plan to a cut and repaired model, in one stage or in several."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor, nn

from ..config.training import RecoveryConfig
from ..errors import BudgetError, ConfigError
from ..importance.calibration_cache import CalibrationCache
from ..importance.importance import find_importance
from ..importance.unit_scores import Scores
from ..pruning.history import History, final_widths
from ..pruning.plan import Plan, make_plan
from ..pruning.space import PruningSpace
from ..pruning.surgery import prune
from ..recovery.folding import Pair, fold, foldable_pairs
from ..workloads.base import Workload
from ..workloads.scoring_format import ScoringFormat
from .importance import resolved
from .recovery import Recovery

Change = Callable[[nn.Module, Plan], None]
"""``change(cut model, its plan)``: puts weights in place that an agent has learned together with the units."""
# Recovery steps that suit any weights: batch-norm statistics are corrected by what is measured of both models.
_OF_ANY_WEIGHTS = ("none", "bn", "finetune")


@dataclass
class Stage:
    """A model after some stages of incremental pruning, the matrices that its candidates share, and what is folded.

    ``change`` is made to every model that is cut from it, before the recovery.
    """

    model: nn.Module
    plan: Plan | None
    space: PruningSpace
    importance: Scores
    recovery: Recovery
    shared: dict[str, Tensor] = field(default_factory=dict)
    foldable: list[Pair] | None = None
    change: Change | None = None


class Builder:
    """Builds models of one workload from plans; what all of them share is measured once.

    Args:
        importance: a name (``rlprune list importances``), "auto", or G arrays of unit scores.
        settings: what every candidate receives after its cut.
    """

    def __init__(
        self,
        workload: Workload,
        space: PruningSpace,
        importance: str | Sequence[ArrayLike],
        settings: RecoveryConfig,
        seed: int,
    ) -> None:
        self._workload, self._space, self._seed = workload, space, seed
        self.settings = settings
        given = None if isinstance(importance, str) else [np.asarray(s, dtype=np.float64) for s in importance]
        # What importances and rules measure once, for all contexts.
        self.calibration = self._calibration(workload.model, space)
        # Of stages of a candidate too: a name, whatever `auto` is for the dense model.
        self.ranking = (
            resolved(importance, workload.adapter, self.calibration) if isinstance(importance, str) else None
        )
        scores, recovery = self._prepared(self.calibration, given)
        self.dense = Stage(workload.model, None, space, scores, recovery)
        self._last: dict[History, Stage] = {}

    def rerank(self, scores: Scores | Sequence[ArrayLike], change: Change | None = None) -> None:
        """Rank the units of the dense model anew, and change the weights of what is cut from it.

        Raises ConfigError where its recovery was made for another ranking or for the dense weights.
        """
        wrong = [step for step in self.settings.steps if step not in _OF_ANY_WEIGHTS]
        if change is not None and wrong:
            raise ConfigError(
                f"recovery.steps: {wrong[0]!r} is measured on the dense model, and the agent has learned other weights"
                f"; allowed here: {', '.join(_OF_ANY_WEIGHTS)}"
            )
        if "reconstruct" in self.settings.steps:
            raise ConfigError(
                "recovery.steps: 'reconstruct' is prepared for the ranking of prune.importance; leave it out where the "
                "agent ranks the units"
            )
        given = [np.asarray(s, dtype=np.float64) for s in scores]
        self.ranking = None
        self.dense = dataclasses.replace(self.dense, importance=given, change=change)

    def fork(self) -> Builder:
        """One that shares what was measured of the dense model, and no stage after it."""
        other = copy.copy(self)
        other._last = {}
        return other

    def _calibration(self, model: nn.Module, space: PruningSpace) -> CalibrationCache:
        settings = self.settings
        return self._workload.adapter.calibration(
            self._workload,
            space,
            model,
            seed=self._seed,
            ridge=settings.ridge,
            recovery_limit=settings.samples,
            recovery=settings,
        )

    def _prepared(self, calibration: CalibrationCache, given: Scores | None) -> tuple[Scores, Recovery]:
        """Unit scores (computed unless ``given``) and the recovery of a model; what is measured serves both."""
        if given is None:
            assert self.ranking is not None
            found = find_importance(self.ranking.name).function(calibration)
            given = [np.asarray(s, dtype=np.float64) for s in found]
        recovery = Recovery(
            self._workload,
            calibration.space,
            self.settings,
            calibration.model,
            importance=given,
            calibration=calibration,
        )
        self._workload.adapter.release_memory()
        return given, recovery

    def __call__(
        self, history: History, chosen: ScoringFormat | None = None, limit: int | None = None
    ) -> tuple[nn.Module, Plan]:
        """Cut and recovered model, and its plan in units of the dense model.

        ``chosen``: in that format and cheap, not for keeps; ``limit``: see `Recovery`.
        """
        stage = self.dense if len(history) == 1 else self._after(history[:-1])
        widths = final_widths(history)
        if widths.shape != stage.space.widths.shape or (widths > stage.space.widths).any():
            raise BudgetError(
                f"widths {list(history[-1])} do not fit the model; allowed: up to {stage.space.widths}"
            )
        cut = make_plan(stage.space, importance=stage.importance, widths=widths)
        slim = self._cut(stage, cut, chosen)
        stage.recovery(slim, cut, limit)
        if chosen is not None and chosen.folded:
            if stage.foldable is None:
                stage.foldable = foldable_pairs(stage.model, self._workload.example_inputs)
            fold(slim, stage.foldable)
        if stage.plan is None:
            return slim, cut
        kept = tuple(before[now] for before, now in zip(stage.plan.kept, cut.kept, strict=True))
        return slim, Plan(self._space, widths, kept)

    def _cut(self, stage: Stage, cut: Plan, chosen: ScoringFormat | None) -> nn.Module:
        """The cut model before its recovery; a plan that keeps everything leaves the dense weights."""
        if stage.change is None or (cut.widths == stage.space.widths).all():
            return prune(stage.model, cut) if chosen is None else self._for_scoring(stage, cut, chosen)
        slim = prune(stage.model, cut)
        stage.change(slim, cut)
        if chosen is None:
            return slim
        if chosen.weights is not None:  # not the buffers: positions are kept in their own format
            for parameter in slim.parameters():
                parameter.data = parameter.data.to(chosen.weights)
        return chosen.put_on(slim)

    def _for_scoring(self, stage: Stage, cut: Plan, chosen: ScoringFormat) -> nn.Module:
        """A candidate in a scoring format; where that casts weights, without copies of what is never cut."""
        if chosen.weights is None or stage.recovery.changes_all:  # also what would be shared
            return chosen.put_on(prune(stage.model, cut, dtype=chosen.weights))
        slim = prune(stage.model, cut, dtype=chosen.weights, shared=stage.shared)
        # Matrices that other plans cut would add up to a second model.
        for name in {c.tensor for c in stage.space.cuts}:
            stage.shared.pop(name, None)
        return chosen.put_on(slim)

    def _after(self, history: History) -> Stage:
        """The stage that a history leaves; the latest one is kept, as an episode asks for it again."""
        if history not in self._last:
            model, plan = self(history)
            space = self._space.after(plan.kept)
            given = None
            if self.ranking is None:
                given = [s[k] for s, k in zip(self.dense.importance, plan.kept, strict=True)]
            importance, recovery = self._prepared(self._calibration(model, space), given)
            self._last = {h: s for h, s in self._last.items() if h == history[:-1]}
            self._last[history] = Stage(model, plan, space, importance, recovery)
        return self._last[history]
