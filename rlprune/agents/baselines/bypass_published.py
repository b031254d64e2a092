"""Bypass back-propagation as its authors' code has it: which units stay is learned (Gao et al., arXiv 2406.10576)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...config.search import BypassPublishedConfig, SearchConfig
from ...envs.task import Reranks, Task
from ...errors import ConfigError
from ...language.calibration.importance import wanda_sp
from ...language.calibration.masks import MaskedUnits
from ...pruning.history import as_history
from ...rules.context import Context
from ...rules.threshold import least_share, mean_share, pooled_widths
from ...utils.arrays import Bools, Floats, Ints
from ...workloads.base import Workload
from ..base import SearchRequest, SearchResult, TrialRecorder
from ..callbacks import SearchLogger
from ..state import StateDir

_EDGE = 1e-7  # in the denominator of the gradient
_SAVED = 100  # steps between two states
_HALVINGS = 20


class BypassPublished:
    """Learns a keep probability for every KV head and neuron from forward passes on minibatches; one plan is scored.

    Start: Wanda-sp's metric, standardised within each layer and part, through a sigmoid, shifted to the keep share
    and held in [0, 1]. Step: a fresh minibatch of the train split; K masks m ~ Bernoulli(s); the gradient
    sum_k (L_k - delta) (m_k - s) / sqrt(s (1 - s)) / (K - 1) with delta an exponential average of the mean loss, 1 /
    ``window`` of which is the present one; plain gradient descent, the rate falling to 0 by a cosine; then a shift
    brings the sum of the probabilities back to the share of units that stay, heads and neurons each for themselves. At
    the end the units with the highest probabilities stay, chosen over all layers for each kind: the plan keeps the
    units that were learned.

    Derived: the keep share is that at which equal shares everywhere meet the budget. Statistics of the start are those
    of the dense model, where the authors prune block by block.

    Raises:
        ConfigError: more than one task, no language model, or a recovery that is prepared for other units.
    """

    def __init__(self, settings: SearchConfig | None = None) -> None:
        self.settings = (settings or SearchConfig()).bypass_published

    def search(self, request: SearchRequest) -> SearchResult:
        """See :class:`rlprune.agents.base.Agent`."""
        task = request.tasks[0]
        evaluator: Any = task.evaluator
        if len(request.tasks) != 1 or task.is_range or not isinstance(evaluator, Reranks):
            raise ConfigError("search.agent: 'bypass_published' prunes one model to one budget")
        context = task.evaluator.context(task.highest_budget, task.metric)
        recorder = TrialRecorder(request.accounts[0], SearchLogger(request))
        learner = _Learner(context, self.settings, request.seed)
        learner.learn(request.state)
        scores = learner.scores()
        evaluator.rerank(scores)
        plan = _chosen(context, task, scores)
        recorder.evaluate(plan)
        return SearchResult((as_history(plan),), learning=learner.counts())


@dataclass
class _Part:
    """All units of one kind: the groups they are of, and their keep probabilities in a row."""

    groups: list[int]
    keep: Tensor


class _Learner:
    """The probabilities and one step after the other."""

    def __init__(self, context: Context, settings: BypassPublishedConfig, seed: int) -> None:
        self._context, self._settings = context, settings
        self._masked = MaskedUnits(context.model, context.space, "search.agent: 'bypass_published'")
        self._share = 1.0 - mean_share(context)
        self._draws = torch.Generator().manual_seed(seed)
        self._order = torch.Generator().manual_seed(seed + 1)
        self._epoch = self._order.get_state()  # the epoch in progress is drawn again from here
        self._seen = 0  # its minibatches
        self._average: float | None = None
        self._step = 0
        self._forward = self._tokens = 0  # what went through the model
        first = wanda_sp(context.model, context.space, context.statistics())
        self._parts: list[_Part] = []
        for kind in ("attention", "ffn"):
            groups = [g for g in self._masked.groups if context.space.groups[g].kind == kind]
            if groups:
                keep = torch.cat([_first(first[g], self._share) for g in groups])
                self._parts.append(_Part(groups, keep))

    def learn(self, state: StateDir | None) -> None:
        """All steps that are left; a killed learning goes on from its state."""
        kept = None if state is None else state.load()
        if kept is not None:
            self._restore(kept)
        workload = self._context.data("bypass_published")
        with torch.no_grad(), self._masked:
            while self._step < self._settings.steps:
                self._order.set_state(self._epoch)
                batches = workload.train_batches(self._order, self._settings.batch_size)
                for inputs, targets in islice(batches, self._seen, None):
                    self._update([self._loss(workload, inputs, targets) for _ in range(self._settings.masks)])
                    self._seen += 1
                    if state is not None and self._step % _SAVED == 0:
                        state.save(self._state())
                    if self._step >= self._settings.steps:
                        return
                self._epoch, self._seen = self._order.get_state(), 0

    def _loss(self, workload: Workload, inputs: Tensor, targets: Tensor) -> tuple[float, list[Tensor]]:
        """The loss under a mask that is drawn, and the mask of each part."""
        masks = [torch.bernoulli(part.keep, generator=self._draws) for part in self._parts]
        for part, mask in zip(self._parts, masks, strict=True):
            sizes = [self._context.space.groups[g].units for g in part.groups]
            for group, own in zip(part.groups, mask.split(sizes), strict=True):
                self._masked.mask[group] = own.to(self._masked.mask[group].device)
        model = self._context.model
        self._forward += len(inputs)
        self._tokens += inputs.numel()
        return float(workload.loss_of(workload.outputs_for_loss(model, inputs, targets), targets)), masks

    def _update(self, drawn: list[tuple[float, list[Tensor]]]) -> None:
        losses = [loss for loss, _ in drawn]
        mean = sum(losses) / len(losses)
        part = 1.0 / self._settings.window
        before = mean if self._average is None else self._average
        self._average = before * (1.0 - part) + mean * part
        rate = self._settings.lr * 0.5 * (1.0 + math.cos(math.pi * self._step / self._settings.steps))
        for index, own in enumerate(self._parts):
            spread = torch.sqrt((own.keep + _EDGE) * (1.0 - own.keep + _EDGE))
            gradient = sum(
                (loss - self._average) * (masks[index] - own.keep) / spread for loss, masks in drawn
            )
            own.keep = _shifted(own.keep - rate * gradient / (len(drawn) - 1), self._share)
        self._step += 1

    def scores(self) -> list[Floats]:
        """The probabilities as unit scores, one array a group; groups without a consumer keep their importance."""
        found = [np.asarray(s, dtype=np.float64).copy() for s in self._context.importance]
        for part in self._parts:
            sizes = [self._context.space.groups[g].units for g in part.groups]
            for group, own in zip(part.groups, part.keep.split(sizes), strict=True):
                found[group] = own.double().numpy()
        return found

    def counts(self) -> dict[str, int]:
        """What was read: steps, sequences forward and backward, tokens of them."""
        return {"steps": self._step, "forward": self._forward, "backward": 0, "tokens": self._tokens}

    def _state(self) -> dict[str, Any]:
        keep = [part.keep for part in self._parts]
        counts = {"average": self._average, "step": self._step, "seen": self._seen}
        counts |= {"forward": self._forward, "tokens": self._tokens}
        return {"keep": keep, "draws": self._draws.get_state(), "epoch": self._epoch, **counts}

    def _restore(self, kept: dict[str, Any]) -> None:
        for part, keep in zip(self._parts, kept["keep"], strict=True):
            part.keep = keep
        self._average, self._step, self._seen = kept["average"], kept["step"], kept["seen"]
        self._forward, self._tokens = kept["forward"], kept["tokens"]
        self._epoch = kept["epoch"]
        self._draws.set_state(kept["draws"])


def _first(scores: Floats, share: float) -> Tensor:
    """Keep probabilities (units,) of one layer's part to begin with."""
    values = torch.from_numpy(np.asarray(scores, dtype=np.float64)).float()
    spread = float(values.std()) if len(values) > 1 else 0.0
    keep = torch.sigmoid((values - values.mean()) / (spread + 1e-8))
    return (keep + share - keep.mean()).clamp(0.0, 1.0)


def _shifted(keep: Tensor, share: float) -> Tensor:
    """``keep - v`` held in [0, 1], with the v >= 0, by bisection, at which no more than the share of units stays."""
    target = share * keep.numel()
    if float(keep.clamp(0.0, 1.0).sum()) <= target:
        return keep.clamp(0.0, 1.0)
    low, high = 0.0, float(keep.max())
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if float((keep - middle).clamp(0.0, 1.0).sum()) > target:
            low = middle
        else:
            high = middle
    return (keep - high).clamp(0.0, 1.0)


def _chosen(context: Context, task: Task, scores: list[Floats]) -> Ints:
    """Widths (G,) when the same share of heads and of neurons stays, the highest scores of each kind, in the budget."""
    space = task.space
    kinds: list[Bools] = [
        np.array([g.kind == kind for g in space.groups]) & context.active for kind in ("attention", "ffn")
    ]
    target = space.target(task.highest_budget, task.metric)

    def widths_at(share: float) -> Ints:
        """Widths when this share of the units of each kind goes."""
        widths = space.widths
        for of in kinds:
            count = math.ceil(share * float(space.unit_counts[of].sum()))
            widths = np.where(of, pooled_widths(context, scores, of, count), widths)
        return widths

    return least_share(space, task.metric, target, widths_at)
