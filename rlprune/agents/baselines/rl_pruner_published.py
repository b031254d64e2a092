"""RL-Pruner as its authors' code has it, one stage of it to a round (Wang and Kindratenko, arXiv 2411.06463)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...config.search import SearchConfig
from ...envs.task import Task
from ...errors import ConfigError
from ...pruning.history import as_history
from ...utils.arrays import Floats, Ints
from ..base import Round, SearchRequest, SearchResult, TrialRecorder
from ..callbacks import SearchLogger

# Constants of the authors' code: the least probability, the share of the stages that explore.
_FLOOR = 1e-5
_EXPLORING = 0.1


@dataclass
class _Buffer:
    """The best samples of a stage, as many as one batch of samples: (Q, widths (G,), probabilities (G,))."""

    size: int
    entries: list[tuple[float, Ints, Floats]] = field(default_factory=list)

    def add(self, value: float, widths: Ints, probabilities: Floats) -> None:
        """Fill up, then replace the lowest Q by one that is no lower."""
        entry = (value, widths, probabilities)
        if len(self.entries) < self.size:
            self.entries.append(entry)
            return
        lowest = min(range(self.size), key=lambda i: self.entries[i][0])
        if value >= self.entries[lowest][0]:
            self.entries[lowest] = entry

    @property
    def best(self) -> tuple[float, Ints, Floats]:
        return max(self.entries, key=lambda entry: entry[0])


class RLPrunerPublished:
    """One stage: batches of noisy samples around a probability vector that follows the best of them.

    ``PD`` is a probability for each layer, in proportion to its filters at first; coupled layers (a group) have their
    mean. A sample is PD + N(0, 1) * noise * U(0, 1) a layer, at least 1e-5, normalised; a stage's filters are taken
    from the layers in these proportions. Q is the score, with `score.kind: accuracy` as published, plus the weighted
    shares of FLOPs and parameters that are gone. When a batch's best Q beats those before it, PD goes ``step`` of the
    way to the best sample, each entry within 1 +- ``clip`` of itself. The stage ends with the sample of the highest Q,
    or with probability epsilon with any in the buffer (a cosine to 0 over the first tenth of the stages). Where its
    score is more than ``fall`` lower than that of the stage before, PD begins anew and the stage is sampled once more.

    A stage is a round (section `rounds`): units are ranked and candidates cut on the model that the training of the
    round before left. What differs from the code: counts are rounded by the projection, so that the budget is met, and
    the scores are those of the validation split, where the authors read the test set.
    """

    def __init__(self, settings: SearchConfig | None = None) -> None:
        self.settings = (settings or SearchConfig()).rl_pruner_published

    def search(self, request: SearchRequest) -> SearchResult:
        """See :class:`rlprune.agents.base.Agent`; one task, ``request.round`` tells the stage."""
        if len(request.tasks) != 1 or request.tasks[0].is_range:
            raise ConfigError("search.agent: 'rl_pruner_published' prunes one model to one budget")
        task, settings, at = request.tasks[0], self.settings, request.round
        recorder = TrialRecorder(request.accounts[0], SearchLogger(request))
        generator = np.random.default_rng((request.seed, at.number))
        layers = _layers(task)
        initial = _normal(task.space.widths.astype(np.float64), layers)
        kept = at.memory.get("probabilities")
        probabilities = initial if kept is None else np.array(kept, dtype=np.float64)
        before = float(at.memory.get("score", task.evaluator.dense.score if at.number == 1 else 0.0))
        score, chosen = before, task.space.widths
        for attempt in range(2):
            buffer, probabilities = self._stage(task, recorder, at, layers, probabilities, generator)
            chosen = self._choice(buffer, at, generator)
            found = recorder.scores[as_history(chosen)].score
            score = found if attempt == 0 else score
            if before <= 0 or (before - found) / before <= settings.fall:
                break
            probabilities = initial if attempt == 0 else probabilities
        memory: dict[str, Any] = {"probabilities": probabilities.tolist(), "score": score}
        return SearchResult((as_history(chosen),), memory=memory)

    def _stage(
        self,
        task: Task,
        recorder: TrialRecorder,
        at: Round,
        layers: Ints,
        probabilities: Floats,
        generator: np.random.Generator,
    ) -> tuple[_Buffer, Floats]:
        """All batches of a stage: the buffer of its best samples, and PD after it."""
        settings = self.settings
        buffer, best = _Buffer(settings.samples), -math.inf
        for _ in range(settings.batches):
            samples = _noisy(probabilities, layers, settings.noise, settings.samples, generator)
            plans = task.space.project(
                samples / np.maximum(task.space.widths, 1), task.highest_budget, task.metric
            )
            recorder.evaluate_batch(plans)
            values = [self._value(task, recorder.scores[as_history(plan)].score, plan, at) for plan in plans]
            for value, plan, sample in zip(values, plans, samples, strict=True):
                buffer.add(value, plan, sample)
            if max(values) > best:
                best = max(values)
                probabilities = _towards(probabilities, buffer.best[2], layers, settings.step, settings.clip)
        return buffer, probabilities

    def _value(self, task: Task, score: float, widths: Ints, at: Round) -> float:
        """Q of a sample: the score, and what it saves of the dense model's FLOPs and parameters."""
        saved = 0.0
        for metric, weight in (("macs", self.settings.flops_weight), ("params", self.settings.params_weight)):
            if weight:
                dense = at.dense.get(metric, task.space.dense_cost(metric))
                saved += weight * (1.0 - task.space.cost(widths, metric) / dense)
        return score + saved

    def _choice(self, buffer: _Buffer, at: Round, generator: np.random.Generator) -> Ints:
        """The widths that the stage ends with."""
        done = (at.number - 1) / (_EXPLORING * at.count)
        epsilon = self.settings.epsilon * 0.5 * (1.0 + math.cos(math.pi * done)) if done <= 1 else 0.0
        if generator.random() < epsilon:
            return buffer.entries[generator.integers(len(buffer.entries))][1]
        return buffer.best[1]


def _layers(task: Task) -> Ints:
    """How many layers each group's units are filters of, (G,): 1 at least."""
    counted = task.space.unit_costs(task.space.widths, "filters") if "filters" in task.space.costs else 1.0
    layers: Ints = np.maximum(np.round(counted * np.ones(len(task.space.groups))), 1).astype(np.int64)
    return layers


def _normal(probabilities: Floats, layers: Ints) -> Floats:
    """Probabilities (..., G) of one layer of each group, so that those of all layers add up to 1."""
    normal: Floats = probabilities / (probabilities * layers).sum(axis=-1, keepdims=True)
    return normal


def _noisy(
    probabilities: Floats, layers: Ints, noise: float, count: int, generator: np.random.Generator
) -> Floats:
    """Samples (N, G) around PD (G,): drawn layer by layer, with the mean of a group's layers."""
    each = np.repeat(probabilities, layers)
    drawn = each + generator.normal(size=(count, len(each))) * noise * generator.random((count, 1))
    first = np.concatenate([[0], np.cumsum(layers)[:-1]])
    return _normal(np.add.reduceat(np.maximum(drawn, _FLOOR), first, axis=1) / layers, layers)


def _towards(probabilities: Floats, best: Floats, layers: Ints, step: float, clip: float) -> Floats:
    """PD moved towards the best sample's, each entry by a share of itself at most."""
    moved = _normal(np.maximum(probabilities + step * (best - probabilities), _FLOOR), layers)
    within = np.clip(moved / probabilities, 1.0 - clip, 1.0 + clip) * probabilities
    return _normal(np.maximum(within, _FLOOR), layers)
