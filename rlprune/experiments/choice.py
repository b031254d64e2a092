"""Which of a search's plans is the winner: by their scores on the whole validation split, or after their fine-tunes.

A score says how good a plan is before the final fine-tune, which changes the order: plans that the score puts far apart
may end alike, and the other way round. `finish.choice: tuned` trains the finalists and lets validation decide then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from ..pruning.history import History, final_widths
from ..utils.progress import Callback
from .fine_tunes import FineTune
from .methods import MethodResult, finalists
from .prepare import Experiment

SCORE, TUNED = "score", "tuned"
APART = 0.05
"""Finalists that are trained differ by at least so much in their keep ratios, on average over the groups."""


def choose(
    experiment: Experiment,
    found: MethodResult,
    fallback: Sequence[MethodResult] = (),
    *,
    state: Path | None = None,
    callback: Callback | None = None,
) -> MethodResult:
    """The best of a method's finalists by ``finish.choice``, and of the ``fallback`` (the rules).

    The fallback joins only now, so that the final plan is never worse on validation than any of them; a plan that only
    ties with a rule's is not replaced. ``state`` is the folder where fine-tunes are kept.
    """
    if experiment.config.finish.choice == TUNED and FineTune(experiment, found.seed, None).has_length:
        return _after_fine_tune(experiment, found, fallback, state, callback or Callback())
    return _by_score(experiment, found, fallback)


def _by_score(experiment: Experiment, found: MethodResult, fallback: Sequence[MethodResult]) -> MethodResult:
    """Score the best few on the whole validation split and take the best of them."""
    histories = finalists(experiment, found.account, experiment.config.finish.candidates)
    experiment.evaluator.prefetch([*histories, *(other.history for other in fallback)], full=True)
    scores = {h: experiment.evaluator.evaluate_full(h).score for h in histories}
    best = max(histories, key=scores.__getitem__)
    chosen = replace(found, history=best)
    for other in fallback:
        score = experiment.evaluator.evaluate_full(other.history).score
        if score > scores[best]:
            chosen, scores[best] = replace(found, history=other.history), score
    return chosen


def _after_fine_tune(
    experiment: Experiment,
    found: MethodResult,
    fallback: Sequence[MethodResult],
    state: Path | None,
    callback: Callback,
) -> MethodResult:
    """Fine-tune finalists that differ, and take the one that is best on validation then.

    Of the fallback those join that get their fine-tune in any case (`finish.rules`), else the best-scoring one.
    """
    finish = experiment.config.finish
    ranked = finalists(experiment, found.account, len(found.account.plans))
    histories = apart(experiment, ranked, finish.candidates)
    joining = [other.history for other in fallback]
    if joining and not finish.rules:
        joining = [max(joining, key=lambda h: experiment.evaluator.evaluate_full(h).score)]
    histories = list(dict.fromkeys([*histories, *joining]))
    quality = {}
    for number, history in enumerate(histories, start=1):
        tune = FineTune(experiment, found.seed, history, state)
        quality[history] = tune.quality(callback, f"finalist {number} of {len(histories)}")
    best = max(histories, key=quality.__getitem__)
    facts = [{"widths": [int(w) for w in final_widths(h)], "tuned": round(quality[h], 6)} for h in histories]
    return replace(found, history=best, trained=facts)


def apart(experiment: Experiment, ranked: Sequence[History], count: int) -> list[History]:
    """The first ``count`` of some plans that each differ from those before; the next ones where too few do.

    The best plans of a search are neighbours: training five of them would tell next to nothing.
    """
    dense = np.maximum(experiment.space.widths, 1)
    taken: list[History] = []
    for history in ranked:
        ratios = final_widths(history) / dense
        if all(np.abs(ratios - final_widths(other) / dense).mean() >= APART for other in taken):
            taken.append(history)
        if len(taken) == count:
            return taken
    left = [history for history in ranked if history not in taken]
    return [*taken, *left[: count - len(taken)]]
