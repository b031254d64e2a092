"""RL-Pruner's search over a probability vector (Wang and Kindratenko, arXiv 2411.06463), at an exact budget."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ...envs.task import Task
from ...pruning.history import as_history, final_widths
from ...surrogates.proposals import fresh
from ...utils.arrays import Floats, Ints
from ..base import TrialRecorder
from .gradient_free import PATIENCE, GradientFree, spend_rest

# The constants of the paper and its code.
_FLOOR = 1e-5
_BUFFER = 10
_CLIP = 0.25
_FIRST_STAGES = 0.1
_WORST_FALL = 0.1


@dataclass
class _Best:
    """The ten best samples of a stage, as (score, widths (G,), probabilities (G,))."""

    entries: list[tuple[float, Ints, Floats]] = field(default_factory=list)

    def add(self, score: float, widths: Ints, probabilities: Floats) -> None:
        """Fill up, then replace the lowest score by a higher one."""
        self.entries.append((score, widths, probabilities))
        self.entries.sort(key=lambda entry: -entry[0])
        del self.entries[_BUFFER:]

    @property
    def score(self) -> float:
        return self.entries[0][0] if self.entries else -math.inf


class RLPruner(GradientFree):
    """Stages of removal; in each of them rounds of noisy samples around a vector that follows the best ones.

    The groups' probabilities PD start in proportion to their widths (``start: widths``, as published) or to
    the units that the best start removes (``rule``, as every method here may start). A sample is PD + N(0, 1) * noise *
    U(0, 1), at least 1e-5 and normalised: the share of a stage's removed units that each group gives. When
    a round's best beats the stage's best, PD moves by ``step`` of the way to it, each entry by a quarter of
    itself at most. A stage ends with the best of its ten best samples, or with probability epsilon with any
    of them (``epsilon``, falling to 0 by a cosine over the first tenth of the stages). Where the choice is
    more than 10% worse than the stage before, PD starts anew and the stage is sampled once more.

    What differs from the paper and its code: a stage removes what takes the cost from one of ``stages``
    equal steps to the next, not 1% of the filters, so that the budget is met exactly and hundreds of
    evaluations suffice (the paper's 100 samples for each percent are thousands); rewards and choices
    are the score on the validation split, not top-1 on the test split; a stage's choice is not fine-tuned,
    since every method's candidates get one recovery, and units are therefore ranked once; "10% worse"
    is the likelihood exp(-loss), which language models have too. Plans of all stages but the last exceed
    the budget and are charged nevertheless.
    """

    name = "rl_pruner"

    def spend(self, task: Task, recorder: TrialRecorder, seed: Sequence[int]) -> None:
        """See :class:`GradientFree`."""
        stages = self.settings.rl_pruner.stages
        generator = np.random.default_rng(seed)
        initial = _initial(task, recorder, self.settings.rl_pruner.start)
        probabilities, widths = initial, task.space.widths
        quality = math.exp(-task.evaluator.dense.loss)
        for stage in range(1, stages + 1):
            for attempt in range(2):
                allowance = recorder.account.left // (stages - stage + 1)
                best, updated = self._sample(
                    task, recorder, stage, widths, probabilities, allowance, generator
                )
                if not best.entries:  # fewer evaluations than stages
                    spend_rest(task, recorder, (), generator)
                    return
                chosen = best.entries[self._choice(stage, len(best.entries), generator)][1]
                found = math.exp(-recorder.scores[as_history(chosen)].loss)
                if attempt or found >= (1.0 - _WORST_FALL) * quality:
                    break
                updated = probabilities = initial
            probabilities, widths, quality = updated, chosen, found
        spend_rest(task, recorder, (), generator)

    def _sample(
        self,
        task: Task,
        recorder: TrialRecorder,
        stage: int,
        before: Ints,
        probabilities: Floats,
        allowance: int,
        generator: np.random.Generator,
    ) -> tuple[_Best, Floats]:
        """Spend ``allowance`` on rounds of one stage: its best samples, and PD after it."""
        settings = self.settings.rl_pruner
        best, idle = _Best(), 0
        end = recorder.account.spent + allowance
        while recorder.account.spent < end and idle < PATIENCE:
            spent, earlier = recorder.account.spent, best.score
            count = min(settings.samples, end - spent)
            samples = _noisy(probabilities, settings.noise, count, generator)
            plans = stage_plans(task, samples, before, stage, settings.stages)
            # Scored plans are not asked for again: in a small space their repeats would use up the account's calls.
            recorder.evaluate_batch(fresh(plans, recorder.scores))
            for plan, sample in zip(plans, samples, strict=True):
                key = as_history(plan)
                if key in recorder.scores:  # not dropped by successive halving
                    best.add(recorder.scores[key].score, plan, sample)
            if best.score > earlier:
                probabilities = _towards(probabilities, best.entries[0][2], settings.step)
            idle = 0 if recorder.account.spent > spent else idle + 1
        return best, probabilities

    def _choice(self, stage: int, count: int, generator: np.random.Generator) -> int:
        settings = self.settings.rl_pruner
        progress = min((stage - 1) / (_FIRST_STAGES * settings.stages), 1.0)
        epsilon = settings.epsilon * 0.5 * (1.0 + math.cos(math.pi * progress))
        return int(generator.integers(count)) if generator.random() < epsilon else 0


def _initial(task: Task, recorder: TrialRecorder, start: str) -> Floats:
    """PD (G,) before the first stage."""
    counts = task.space.widths.astype(np.float64)
    within = recorder.within(task, task.highest_budget)
    if start == "rule" and within:
        counts = counts - final_widths(within[0])
    counts = np.maximum(counts, _FLOOR * task.space.widths.sum())
    shares: Floats = counts / counts.sum()
    return shares


def stage_plans(task: Task, probabilities: Floats, before: Ints, stage: int, stages: int) -> Ints:
    """Widths (N, G) after a stage whose removed units are shared out by probabilities (N, G)."""
    # The projection takes shares of what is there; the probabilities count units.
    shares = probabilities / np.maximum(before, 1)
    return task.project_stage(shares, task.highest_budget, stage, stages, before)


def _noisy(probabilities: Floats, noise: float, count: int, generator: np.random.Generator) -> Floats:
    """Samples (N, G) around PD (G,)."""
    shape = count, len(probabilities)
    drawn = probabilities + generator.normal(size=shape) * noise * generator.random((count, 1))
    drawn = np.maximum(drawn, _FLOOR)
    samples: Floats = drawn / drawn.sum(axis=1, keepdims=True)
    return samples


def _towards(probabilities: Floats, best: Floats, step: float) -> Floats:
    """PD moved towards the best sample's, each entry by a quarter of itself at most."""
    ratio = (probabilities + step * (best - probabilities)) / probabilities
    moved = probabilities * np.clip(ratio, 1.0 - _CLIP, 1.0 + _CLIP)
    shares: Floats = moved / moved.sum()
    return shares
