"""Importances that read the inputs of o_proj and down_proj: for language models only."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch import nn

from ...importance.calibration_cache import CalibrationCache
from ...importance.importance import IMPORTANCES, first_sentence, l2, register
from ...importance.unit_scores import Floats, Scores
from ...pruning.space import PruningSpace
from ..expert_groups import EXPERTS
from .cache import LanguageCalibration, language_calibration
from .elimination import Ranked, eliminations
from .grams import Consumer, GramSource, group_consumers
from .statistics import Statistics

WING = "language"
FLAP_METRIC = "flap metric"
"""The name that the metric of FLAP is kept under where one of its importances ranks the units."""


def _by_column(
    model: nn.Module, space: PruningSpace, name: str, score: Callable[[Consumer, Floats], Floats]
) -> Scores:
    """``score(consumer, weights (I, O))`` gives scores (units,); hidden size and whole experts get their L2 norm."""
    consumers = group_consumers(space, f"prune.importance: {name!r}")
    known = {c.group for c in consumers}
    spare = l2(model, space) if len(known) < len(space.groups) else []
    scores = [np.zeros(g.units) if i in known else spare[i] for i, g in enumerate(space.groups)]
    for c in consumers:
        scores[c.group][c.place] = score(c, c.matrix(model).double().cpu().numpy())
    return scores


def wanda_sp(model: nn.Module, space: PruningSpace, statistics: Statistics) -> Scores:
    """Wanda-sp: mean over outputs i of |W_ij| * ||X_j||, summed over a unit's input columns j.

    Wanda's metric (Sun et al. 2023, arXiv 2306.11695) made structured as in FLAP's code (arXiv 2312.11983);
    ||X_j|| is the root mean square over tokens of the consumer's (o_proj's, down_proj's) input column.
    """

    def score(consumer: Consumer, weights: Floats) -> Floats:
        norms = np.sqrt(statistics.inputs[consumer.name].second)
        return (np.abs(weights).mean(axis=1) * norms)[consumer.columns].sum(axis=1)

    return _by_column(model, space, "wanda_sp", score)


def fluctuation(
    space: PruningSpace, statistics: Statistics, metric: str
) -> Callable[[Consumer, Floats], Floats]:
    """FLAP's metrics of the input columns j of a consumer: ``score(consumer, weights (I, O))`` gives (I,).

    `wifv` Var(X_j) * ||W_:j||^2, `ifv` Var(X_j), `wifn` the mean over outputs of |W_ij| * ||X_j||; squared in attention
    (the code: lib/prune.py).
    """

    def score(consumer: Consumer, weights: Floats) -> Floats:
        moments = statistics.inputs[consumer.name]
        if metric == "wifn":
            values = np.abs(weights).mean(axis=1) * np.sqrt(moments.second)
        else:
            values = moments.variance * ((weights**2).sum(axis=1) if metric == "wifv" else 1.0)
        return values**2 if space.groups[consumer.group].kind == "attention" else values

    return score


def flap(model: nn.Module, space: PruningSpace, statistics: Statistics, metric: str = "wifv") -> Scores:
    """FLAP's fluctuation: Var(X_j) * ||W_:j||^2, squared in attention, averaged over a unit's input columns j.

    An et al. 2023, arXiv 2312.11983, equation 5; the square is in the authors' code. Their standardisation
    within a layer changes no ranking within it and belongs to the rule `flap`. ``metric``: see `fluctuation`.
    """
    of_columns = fluctuation(space, statistics, metric)
    return _by_column(model, space, "flap", lambda c, weights: of_columns(c, weights)[c.columns].mean(axis=1))


def obs(
    model: nn.Module, space: PruningSpace, grams: GramSource, ridge: float = 1e-3, then: Ranked | None = None
) -> Scores:
    """Greedy elimination: the unit that the others replace best, by ridge regression, goes first.

    Structured Optimal Brain Surgeon (ZipLM, arXiv 2302.04089, see :mod:`.elimination`). Scores are the
    places in that order, 0 for the first unit to go; ``then`` is told of each consumer's.
    """
    found = eliminations(model, space, grams, ridge, then)
    return _by_column(
        model, space, "obs", lambda consumer, weights: found[consumer.group].ranks[consumer.place]
    )


def _checked(cache: CalibrationCache, name: str) -> LanguageCalibration:
    """The cache of a language model; refused before the data are read."""
    purpose = f"prune.importance: {name!r}"
    group_consumers(cache.space, purpose)
    return language_calibration(cache, purpose)


def _with_experts(cache: LanguageCalibration, scores: Scores) -> Scores:
    """Scores whose groups of whole experts are ranked by what each expert adds (`routing.contributions`)."""
    found = cache.contributions() if any(g.kind == EXPERTS for g in cache.space.groups) else {}
    return [found.get(index, own) for index, own in enumerate(scores)]


@register(first_sentence(wanda_sp), wing=WING, name="wanda_sp")
def _wanda_sp(cache: CalibrationCache) -> Scores:
    own = _checked(cache, "wanda_sp")
    return _with_experts(own, wanda_sp(cache.model, cache.space, own.statistics()))


def _flap(name: str, metric: str, summary: str) -> None:
    """Register FLAP with one of its metrics; the rules of FLAP read which one ranks the units."""

    def scores(cache: CalibrationCache) -> Scores:
        own = _checked(cache, name)
        cache.keep(FLAP_METRIC, metric)
        return _with_experts(own, flap(cache.model, cache.space, own.statistics(), metric))

    register(summary, wing=WING, name=name)(scores)


_flap("flap", "wifv", first_sentence(flap))
_flap("flap_ifv", "ifv", "FLAP's metric IFV: the variance of the input columns alone.")
_flap("flap_wifn", "wifn", "FLAP's metric WIFN: mean |W_ij| * ||X_j|| of the input columns.")


@register(first_sentence(obs), wing=WING, name="obs")
def _obs(cache: CalibrationCache) -> Scores:
    own = _checked(cache, "obs")
    return _with_experts(own, obs(cache.model, cache.space, own.grams(), cache.ridge, own.factorise))


OWN_IMPORTANCES = tuple(name for name, found in IMPORTANCES.items() if found.wing == WING)
