"""The measurements that importances, rules and the recovery of language models share."""

from __future__ import annotations

from collections.abc import Sequence

from ...config.training import RecoveryConfig
from ...errors import ConfigError
from ...importance.calibration_cache import CURVES, CalibrationCache, Curves
from ...importance.importance import l2
from ...importance.unit_scores import Scores
from ...pruning.space import PruningSpace
from ...utils.arrays import Floats
from ...utils.memory import return_freed_memory
from ...workloads.adapter import DefaultImportance
from ..expert_groups import EXPERTS
from .fisher import divergence_curves, fisher_eliminations, output_moments
from .grams import Consumer, Grams, GramSource, GramWalk, InputGram, UsedUp, group_consumers, unit_consumers
from .nested import Factors, NestedReconstruction
from .routing import contributions
from .statistics import Statistics
from .statistics import collect as collect_statistics

STATISTICS, CONTRIBUTIONS = "statistics", "contributions"
# Calibration samples of the backward pass of `obs_fisher`: (O, O) moments need fewer than (I, I) ones.
FISHER_SAMPLES = 64
# Penalty of the regressions where the rule `fisher` measures the curves by itself.
RIDGE = 1e-3


class LanguageCalibration(CalibrationCache):
    """Input moments, Gram matrices and expected divergences of a causal language model.

    Gram matrices are made one block at a time and kept by nobody. Where the recovery wants them as well
    (``self.recovery``), an importance that has ranked a layer's units leaves the factor of its matrix here
    (:meth:`factorise`), so that the data are read once.
    """

    _given: Grams | None = None
    _factors: Factors | None = None

    def statistics(self) -> Statistics:
        """Input moments and cosines of the blocks, over all that importances read."""
        return self.cached(
            STATISTICS, lambda: collect_statistics(self.model, self.space, self.batches(self.limit))
        )

    def contributions(self) -> dict[int, Floats]:
        """What each expert adds, {group of whole experts: (experts,)}, over all that importances read."""
        return self.cached(
            CONTRIBUTIONS, lambda: contributions(self.model, self.space, self.batches(self.limit))
        )

    def grams(self) -> GramSource:
        """Gram matrices of what the units' consumers read, over what the recovery reads."""
        if self._given is not None:
            return self._given
        limit = self.recovery_limit if self.limit is None else self.limit
        return GramWalk(self.model, lambda: self.batches(limit))

    def collect_grams(self) -> Grams:
        """All of :meth:`grams` at once, for callers that need them more than once."""
        return Grams({c.name: gram for c, gram in self.grams().each(unit_consumers(self.space))})

    def ranked_by_divergence(self) -> tuple[Scores, Curves]:
        most = FISHER_SAMPLES if self.limit is None else min(self.limit, FISHER_SAMPLES)
        group_consumers(self.space, "prune.importance: 'obs_fisher'")  # refused before the data are read
        moments = output_moments(self.model, self.space, self.batches(most), self.seed)
        return_freed_memory()
        found = fisher_eliminations(self.model, self.space, self.grams(), moments, self.ridge, self.factorise)
        spare = l2(self.model, self.space) if len(found) < len(self.space.groups) else []
        # Whole experts are ranked by what each of them adds.
        added = self.contributions() if any(g.kind == EXPERTS for g in self.space.groups) else {}
        scores = [
            added[g] if g in added else found[g].ranks if g in found else spare[g]
            for g in range(len(self.space.groups))
        ]
        return scores, divergence_curves(found)

    def divergence_curves(self, importance: Sequence[Floats]) -> Curves:
        """Curves of the elimination's own order, whatever the ranking."""

        def measure() -> Curves:
            moments = output_moments(self.model, self.space, self.batches(), self.seed)
            grams = GramWalk(self.model, self.batches)
            return divergence_curves(fisher_eliminations(self.model, self.space, grams, moments, RIDGE))

        return self.cached(CURVES, measure)

    def give_grams(self, grams: Grams) -> None:
        """Take Gram matrices that were collected elsewhere; the recovery uses them up."""
        self._given = grams

    def factorise(self, consumer: Consumer, gram: InputGram, scores: Floats) -> None:
        """Keep what the recovery will want of a consumer whose units have been ranked; nothing where it wants none."""
        if self.recovery is None or "reconstruct" not in self.recovery.steps or self._given is not None:
            return
        if self._factors is None:
            self._factors = self._new_factors(self.recovery)
        self._factors.add(consumer, gram, scores)

    def reconstruction(self, settings: RecoveryConfig, importance: Scores | None) -> NestedReconstruction:
        """The closed form, from the factors that are here or from a pass over the data; nothing of it stays here."""
        kept, given = self._factors, self._given
        self._factors = self._given = None
        consumers = unit_consumers(self.space)
        if kept is not None and settings == self.recovery and kept.fit(consumers, importance):
            return NestedReconstruction(self.space, kept)
        del kept
        source = self.grams() if given is None else UsedUp(given)
        return NestedReconstruction.of(self.space, source, self._new_factors(settings), importance)

    def forget(self) -> None:
        """Free what only a recovery would need."""
        self._factors = self._given = None

    def _new_factors(self, settings: RecoveryConfig) -> Factors:
        return Factors(
            self.model,
            settings.ridge,
            intercept="bias" in settings.steps,
            shrink=settings.shrink,
            spill=settings.spill,
        )


def default_importance(space: PruningSpace) -> DefaultImportance:
    """`obs_fisher` for attention heads and neurons, which takes less memory than gradients of the weights."""
    obstacle = _divergence_obstacle(space)
    return DefaultImportance("obs_fisher" if obstacle is None else "taylor", obstacle)


def _divergence_obstacle(space: PruningSpace) -> str | None:
    """Why units cannot be ranked by expected divergence, in a few words; None where they can be."""
    try:
        found = group_consumers(space, "prune.importance: 'obs_fisher'")
    except ConfigError:
        return "only attention and feed-forward parts have expected divergences"
    return None if found else "no attention or feed-forward part is cut by units"


def language_calibration(cache: CalibrationCache, who: str) -> LanguageCalibration:
    """The cache of a language model; ConfigError naming who asked where it is another model's."""
    if not isinstance(cache, LanguageCalibration):
        raise ConfigError(f"{who}: works on attention and feed-forward groups of language models")
    return cache
