"""Which of a search's plans is the winner: by their scores on the whole validation split, or after their fine-tunes.

A score says how good a plan is before the final fine-tune, which changes the order: plans that the score puts far apart
may end alike, and the other way round. `finish.choice: tuned` trains the finalists and lets validation decide then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..config.config import Config
from ..pruning.history import final_widths
from ..utils.progress import Callback
from ..workloads.adapter import ModelAdapter
from .fine_tunes import FineTune
from .methods import MethodResult, finalists
from .prepare import Experiment

SCORE, TUNED = "score", "tuned"


def takes_own_choice(config: Config) -> bool:
    """Whether a run takes what the agent itself chose: no rule is scored, and there are no finalists."""
    return config.search.starts == "none" or config.rounds.count > 1


def trains_finalists(config: Config, adapter: ModelAdapter | None) -> bool:
    """Whether a choice takes fine-tunes; ``adapter`` None where the model is not known yet."""
    if config.finish.choice != TUNED:
        return False
    if adapter is None:
        return config.finish.epochs + config.finish.steps > 0
    return adapter.fine_tune_length(config.finish)[0] > 0


def choose(
    experiment: Experiment,
    found: MethodResult,
    fallback: Sequence[MethodResult] = (),
    *,
    state: Path | None = None,
    callback: Callback | None = None,
) -> MethodResult:
    """The best of a method's finalists by ``finish.choice``, and of the ``fallback`` (the rules).

    The fallback joins only now, so that by ``score`` the final plan is never worse on validation than any of them, and
    by ``tuned`` never after its fine-tune; a plan that only ties with a rule's is not replaced. ``state`` is the folder
    where fine-tunes are kept.
    """
    if trains_finalists(experiment.config, experiment.workload.adapter):
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
    """Fine-tune the finalists, and take the one that is best on validation then.

    Of the fallback those join that get their fine-tune in any case (`finish.rules`), else the best-scoring one.
    """
    finish = experiment.config.finish
    histories = finalists(experiment, found.account, finish.candidates)
    joining = [other.history for other in fallback]
    if joining and not finish.rules:
        joining = [max(joining, key=lambda h: experiment.evaluator.evaluate_full(h).score)]
    histories = list(dict.fromkeys([*histories, *joining]))
    tunes = {history: FineTune(experiment, found.seed, history, state) for history in histories}
    quality, stage = {}, stage_of(found.method)
    for number, history in enumerate(histories):
        callback.stage(stage, number, len(histories))
        phase = f"{found.method}, finalist {number + 1} of {len(histories)}"
        quality[history] = tunes[history].quality(callback, phase)
    callback.close()
    best = max(histories, key=lambda history: quality[history].value)
    for history, tune in tunes.items():
        if history != best and history not in joining:
            tune.forget_weights()
    facts = [
        {
            "widths": [int(w) for w in final_widths(h)],
            "tuned": round(q.value, 6),
            "seconds": round(q.seconds, 2),
        }
        for h, q in quality.items()
    ]
    return replace(found, history=best, trained=facts)


def stage_of(method: str) -> str:
    """The stage of a run in which a method's finalists are trained."""
    return f"finalists of {method}"
