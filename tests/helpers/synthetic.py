"""A task without a model: a real pruning space of a made-up chain of layers, scored by a closed form."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from rlprune.envs.task import Task
from rlprune.evaluation.ledger import BudgetExhausted
from rlprune.pruning.cost import AxisSize, FormulaBuilder
from rlprune.pruning.space import Group, PruningSpace
from rlprune.rules.context import Context

LANGUAGE = ("attention", "ffn", "hidden")


@dataclass(frozen=True)
class FakeCandidate:
    widths: tuple[int, ...]
    cost: float
    score: float
    loss: float
    metric: float
    seconds: float = 0.01
    samples: int = 0
    error: float = 0.0


def make_space(
    groups: int = 6,
    width: int = 16,
    seed: int = 0,
    kinds: Sequence[str] = ("conv", "residual"),
    step: int = 1,
) -> PruningSpace:
    """A chain of convolutions: the cost of a layer is the product of its two widths and its resolution.

    ``kinds`` are drawn from; a language model's make a space that is taken for one.
    """
    rng = np.random.default_rng(seed)
    widths = [width * (1 + 3 * g // groups) for g in range(groups)]
    builders = {"macs": FormulaBuilder(groups), "params": FormulaBuilder(groups)}
    for g in range(groups + 1):
        area = 64.0 / 4 ** (3 * g // (groups + 1))
        axes = [AxisSize(0.0, np.eye(groups)[i]) for i in (g - 1, g) if 0 <= i < groups]
        builders["macs"].add(9.0 * area, *axes)
        builders["params"].add(9.0, *axes)
    drawn = [str(rng.choice(kinds)) for _ in range(groups)]
    made = tuple(
        Group(
            name=f"layer{g}",
            kind=drawn[g],
            width=widths[g],
            unit=1,
            minimum=min(step, widths[g]),
            step=step,
            members=(),
            depth=g / max(1, groups - 1),
            kernel=3,
            stride=1,
            block=g if drawn[g] in LANGUAGE[:2] else -1,
            exact=drawn[g] != "hidden",
        )
        for g in range(groups)
    )
    costs = {metric: builder.build() for metric, builder in builders.items()}
    return PruningSpace(made, {}, f"chain{groups}x{width}", (), (), (), costs)


class FakeEvaluator:
    """Scores ``-sum_g a_g log(keep_g)^2`` (with a cliff at small widths): smooth, with a known shape."""

    def __init__(
        self, groups: int = 6, seed: int = 0, flat: bool = False, space: PruningSpace | None = None
    ) -> None:
        self.space = space or make_space(groups)
        rng = np.random.default_rng(1000 + seed)
        self.weights = np.exp(rng.normal(size=groups)) * 0.1
        self.importance = [
            np.exp(rng.normal(size=g.width)) * w for g, w in zip(self.space.groups, self.weights)
        ]
        self.flat = flat
        self.calls = 0
        self.memo: dict[Any, FakeCandidate] = {}
        self.rungs: tuple[int, ...] = ()

    def remember(self, history: Any, candidate: Any) -> None:
        """Rows of a ledger: nothing here is worth keeping."""

    @property
    def dense(self) -> FakeCandidate:
        return self.evaluate(self.space.widths)

    def evaluate(self, widths: Any) -> FakeCandidate:
        key = tuple(int(w) for w in widths)
        if key not in self.memo:
            self.calls += 1
            # As real evaluations may do: the global generators must not matter to an agent.
            np.random.random()
            keep = np.array(key) / self.space.widths
            loss = float((self.weights * np.log(keep) ** 2).sum() + 3.0 * (keep < 0.1).sum())
            loss = 0.0 if self.flat else loss
            cost = self.space.cost(np.array(key))
            self.memo[key] = FakeCandidate(key, cost, -loss, loss, float(np.exp(-loss)))
        return self.memo[key]

    def evaluate_staged(self, history: Any) -> FakeCandidate:
        """A history's last plan, with a small loss for what each stage cut (so that the path matters)."""
        last = self.evaluate(history[-1])
        before = [self.space.widths, *[np.array(h) for h in history]]
        cuts = [float(((a - b) / self.space.widths).max()) for a, b in itertools.pairwise(before)]
        loss = last.loss + 0.05 * sum(c**2 for c in cuts)
        return FakeCandidate(last.widths, last.cost, -loss, loss, last.metric)

    def standard_error(self, candidate: Any) -> float:
        return 0.0

    def context(self, budget: Any, metric: str | None = None, evaluate: Any = None) -> Any:
        """There is no model: rules that look at the space and the importances alone can be asked."""
        probe = None if evaluate is None else lambda widths: float(evaluate(widths).loss)
        return Context(self.space, nn.Identity(), self.importance, budget, metric or "macs", probe=probe)


class FakeAccount:
    """Charges each distinct plan once; ``stop_after`` raises like a kill would, at that call."""

    def __init__(self, evaluator: FakeEvaluator, limit: int, stop_after: int | None = None) -> None:
        self.evaluator, self.limit, self.stop_after = evaluator, limit, stop_after
        self.history: list[FakeCandidate] = []
        self.seen: dict[Any, FakeCandidate] = {}
        self.calls = 0

    @property
    def spent(self) -> int:
        return len(self.history)

    @property
    def left(self) -> int:
        return self.limit - self.spent

    @property
    def best(self) -> FakeCandidate:
        return max(self.history, key=lambda c: c.score)

    def evaluate(self, widths: Any) -> FakeCandidate:
        return self._charge(tuple(int(w) for w in widths), self.evaluator.evaluate)

    def evaluate_staged(self, history: Any) -> FakeCandidate:
        return self._charge(tuple(tuple(int(w) for w in h) for h in history), self.evaluator.evaluate_staged)

    def _charge(self, key: Any, score: Any) -> FakeCandidate:
        if self.stop_after is not None and self.calls >= self.stop_after:
            raise KeyboardInterrupt
        self.calls += 1
        if key in self.seen:
            return self.seen[key]
        if self.left <= 0:
            raise BudgetExhausted("spent")
        candidate = score(key)
        self.seen[key] = candidate
        self.history.append(candidate)
        return candidate


def make_synthetic_task(groups: int = 6, seed: int = 0, budget: Any = 0.5, **kwargs: Any) -> Task:
    return Task(FakeEvaluator(groups, seed), budget, **kwargs)


def make_language_task(groups: int = 6, seed: int = 0, budget: Any = 0.5, **kwargs: Any) -> Task:
    """The same task with the kinds of a language model's groups."""
    return Task(FakeEvaluator(groups, seed, space=make_space(groups, kinds=LANGUAGE)), budget, **kwargs)
