"""FastNAS, by NVIDIA's own ModelOpt: an outside peer under the same budget, score and count of scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from ...config.search import SearchConfig
from ...envs.task import Task
from ...errors import BudgetError, ConfigError, GraphError
from ...pruning.space import PruningSpace
from ...utils.arrays import Floats, Ints
from ..base import SearchRequest, SearchResult, TrialRecorder
from ..modelopt_internals import ChannelSearchSpace, divisible, installed
from .gradient_free import GradientFree

RATIOS = (20, 15, 10, 8, 6, 5, 4, 3, 2)
"""How many choices of width a layer may have: ModelOpt's own number first."""
DIVISORS = (1, 2, 4, 8, 16, 32)
"""What the choices may be multiples of: 32 in ModelOpt, which leaves nothing of a narrow network to choose."""
_RESERVED = 2  # evaluations of the plan that was found, and of the one that meets the budget exactly


class FastNAS(GradientFree):
    """FastNAS as ModelOpt has it (``modelopt.torch.prune``, mode ``fastnas``), for models of images.

    ModelOpt converts a copy of the model, finds which layers have channels in common, scores every choice of width of
    every such set alone, and looks by bisection for one bound of the loss of score that all sets may have so that the
    cost is met. This package does what it asks for: a score is an evaluation like any other (the widths become a plan
    of our groups, which is cut, repaired and scored on the validation split), and a cost is the exact cost of that
    plan in ``budget.metric``, so that its limit is our budget.

    - Widths: a group keeps the share of its units that ModelOpt keeps of the channels of the layer that produces it
      (the largest share where there are several). What ModelOpt does not touch stays dense. Which units stay,
      ``prune.importance`` says, as for every method; ModelOpt would rank them by norms of the consumers' weights.
    - Choices: ``search.fastnas.ratios`` and ``.channel_divisor``. Where they are null, those are taken
      that have the most scores which fit the evaluations.
    - The plan that FastNAS finds lies below the budget, where its choices are coarse. It is scored, and so is the one
      that gives back what is left, by the projection that every method uses.
    - Of the starts only the first (uniform) is scored, so that a search that is stopped early has a plan.

    Raises:
        ConfigError: ModelOpt is missing, or the choices need more scores than there are evaluations.
        GraphError: ModelOpt cannot convert the model.
        BudgetError: what ModelOpt can cut does not reach the budget.
    """

    name = "fastnas"

    def __init__(self, settings: SearchConfig | None = None) -> None:
        super().__init__(settings)
        if not installed():
            raise ConfigError("search.agent: 'fastnas' needs `pip install 'rlprune[peers]'`")

    def search(self, request: SearchRequest) -> SearchResult:
        """See :class:`GradientFree`."""
        starts = [list(plans)[:1] for plans in request.starts]
        return super().search(replace(request, starts=starts))

    def spend(self, task: Task, recorder: TrialRecorder, seed: Sequence[int]) -> None:
        """See :class:`GradientFree`; nothing is random."""
        space, budget = task.space, task.highest_budget
        target = space.target(budget, task.metric)
        found = self._fitting(task, recorder.account.left - _RESERVED, target)

        def widths() -> Ints:
            return kept_widths(space, found.channels())

        found.search(
            lambda: recorder.evaluate(widths()).score,
            lambda: float(space.cost(widths(), task.metric)),
            target,
        )
        plan = widths()
        shares = 1.0 - plan / space.widths
        exact = space.project(shares, budget, task.metric) if shares.any() else plan
        for own in (plan, exact):
            if space.cost(own, task.metric) <= target:
                recorder.evaluate(own)

    def _fitting(self, task: Task, left: int, target: float) -> ChannelSearchSpace:
        """The model with the choices that have the most scores that can be paid."""
        model = task.evaluator.context(task.highest_budget, task.metric).model
        grids = self._grids(task.space)
        found = ChannelSearchSpace(model, *grids[0])
        lowest = _restrict(found, task)
        if lowest > target:  # the others cut no further
            share = lowest / task.space.dense_cost(task.metric)
            raise BudgetError(
                f"search.agent: 'fastnas' cannot meet the budget {task.highest_budget}: what ModelOpt can cut leaves "
                f"{share:.1%} of the {task.metric}"
            )
        if found.scores <= left:
            return found
        sizes = [max(choices) for choices in found.choices().values()]
        expected = {grid: _scores_of(sizes, *grid) for grid in grids[1:]}
        for grid in sorted(expected, key=lambda grid: -expected[grid]):
            if 1 < expected[grid] <= left:
                found = ChannelSearchSpace(model, *grid)
                if _restrict(found, task) <= target and found.scores <= left:
                    return found
        least = min([found.scores, *(n for n in expected.values() if n > 1)]) + _RESERVED
        raise ConfigError(
            f"search.evaluations: 'fastnas' needs {least} for its choices of width apart from its start, got "
            f"{left + _RESERVED}; allowed: more of them, or null for search.fastnas.ratios and .channel_divisor"
        )

    def _grids(self, space: PruningSpace) -> list[tuple[int, int]]:
        """Numbers of ratios and divisors that choices can be made of, the finest first."""
        settings, step = self.settings.fastnas, int(space.steps.max())
        ratios = RATIOS if settings.ratios is None else (settings.ratios,)
        divisors = [d for d in DIVISORS if d >= step] or [step]
        if settings.channel_divisor is not None:
            divisors = [settings.channel_divisor]
        return [(r, d) for r in ratios for d in divisors]


def _scores_of(sizes: Sequence[int], ratios: int, divisor: int) -> int:
    """About how many scores choices cost, for sets of channels of these sizes."""
    total = 1
    for size in sizes:
        rounded = {divisible(size * i / ratios, divisor) for i in range(1, ratios + 1)}
        total += len({c for c in rounded if c < size})
    return total


def _restrict(found: ChannelSearchSpace, task: Task) -> float:
    """Leave only choices that change widths of our groups; the cost of the narrowest plan.

    Raises:
        GraphError: none does.
    """
    space = task.space
    for name in [*found.choices()]:
        found.narrow(name)
        if (kept_widths(space, found.channels()) == space.widths).all():
            found.fix(name)
    if not found.choices():
        raise GraphError(
            "search.agent: 'fastnas': ModelOpt finds nothing to cut that is a group here (`rlprune inspect`)"
        )
    found.narrow()
    return float(space.cost(kept_widths(space, found.channels()), task.metric))


def kept_widths(space: PruningSpace, channels: Mapping[str, tuple[int, int]]) -> Ints:
    """Widths (G,) of our groups.

    Args:
        channels: of a layer by name, the output channels that are kept, and how many it has.
    """
    kept = np.zeros(len(space.groups))
    for module, units in _produced(space).items():
        if module not in channels:  # a norm, which has the channels of the layer before it
            continue
        active, every = channels[module]
        share = active / every if every == len(units) else 1.0
        groups = np.unique(np.searchsorted(space.offsets, units[units >= 0], side="right") - 1)
        kept[groups] = np.maximum(kept[groups], share)
    kept[kept == 0.0] = 1.0  # no layer produces it
    widths: Floats = space.widths * kept
    return space.limits.floor(space.led(widths))


def _produced(space: PruningSpace) -> dict[str, Ints]:
    """Of each layer whose outputs are cut: the unit of every output channel, or -1; layers of lanes are left out."""
    found = {}
    for cut in space.cuts:
        module, _, parameter = cut.tensor.rpartition(".")
        if parameter == "weight" and not cut.consumer and space.axes[cut.axis].lanes == 1:
            found[module] = space.axes[cut.axis].slots
    return found
