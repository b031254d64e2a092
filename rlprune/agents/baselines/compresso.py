"""Compresso: which units stay is learned together with low-rank adapters (Guo et al. 2023, arXiv 2310.05015)."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from contextlib import ExitStack
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...config.search import CompressoConfig, SearchConfig
from ...config.training import FinishConfig
from ...envs.task import Reranks, Task
from ...errors import ConfigError, RunError
from ...language.calibration.masks import MaskedHidden, MaskedUnits
from ...language.tuning.gates import Gates, Lagrangian
from ...language.tuning.learned import LearnedWeights
from ...language.tuning.peft import LowRank, attached, low_rank
from ...pruning.cost import CostFormula
from ...pruning.history import as_history
from ...rules.context import Context
from ...utils.arrays import Floats
from ...utils.randomness import isolated_randomness
from ..base import SearchRequest, SearchResult, TrialRecorder
from ..callbacks import SearchLogger
from ..state import StateDir

_OPEN = 10.0  # where log alpha of heads and hidden channels begins in the authors' code
_CLIP = 1.0  # largest norm of the adapters' gradient, the Trainer's default
_SAVED = 100  # steps between two states
_WHAT = "search.agent: 'compresso'"


class Compresso:
    """Trains gates of KV heads, neurons and, with ``prune.hidden``, hidden channels together with LoRA, for one plan.

    The loss is that of a minibatch of the train split, under gates drawn from the hard concrete distribution (`Gates`),
    plus ``l1 (s - t) + l2 (s - t)^2`` (`Lagrangian`): s is the expected sparsity, one minus the cost of the expected
    widths as a share of the dense cost, t its target. The first steps train the adapters alone; then t rises in a line
    from 0 to what the budget asks for and stays. AdamW without decay: the adapters' rate falls in a line to 0, that of
    gates and multipliers stays. The dense weights are frozen.

    At the end every group loses its expected share of units, scaled by one factor so that the budget is met exactly;
    the units with the highest gates stay. The plan's model has the adapters merged, and the gates of the heads and
    neurons that stay multiplied in, which is what the search scores and the final fine-tune goes on from.

    The collaborative prompt is ``data.prompt``. Resumes from its last state with the bits of an uninterrupted search
    (CPU, fixed threads). Code of the authors: microsoft/Moonlit, folder Compresso.

    Raises:
        ConfigError: more than one task, a cost that is no formula of the widths, experts, or peft is missing.
        RunError: the training diverged.
    """

    def __init__(self, settings: SearchConfig | None = None) -> None:
        self.settings = (settings or SearchConfig()).compresso

    def search(self, request: SearchRequest) -> SearchResult:
        """See :class:`rlprune.agents.base.Agent`."""
        task = request.tasks[0]
        evaluator: Any = task.evaluator
        if len(request.tasks) != 1 or task.is_range or not isinstance(evaluator, Reranks):
            raise ConfigError(f"{_WHAT} prunes one model to one budget")
        if importlib.util.find_spec("peft") is None:
            raise ConfigError(
                f"{_WHAT} needs the package peft; install it with: pip install 'rlprune[language]'"
            )
        context = task.evaluator.context(task.highest_budget, task.metric)
        recorder = TrialRecorder(request.accounts[0], SearchLogger(request))
        learner = _Learner(context, _formula(task), self.settings, request.seed)
        adapters = learner.learn(request.state)
        weights = LearnedWeights(context.model, task.space, adapters, learner.values())
        evaluator.rerank(learner.scores(), weights)
        plan = task.space.project(learner.shares(), task.highest_budget, task.metric)
        recorder.evaluate(plan)
        return SearchResult((as_history(plan),), learning=learner.counts)


def _formula(task: Task) -> CostFormula:
    """The cost that the expected sparsity is computed by; ConfigError where it has no gradient."""
    found = task.space.costs[task.metric]
    if not isinstance(found, CostFormula):
        known = ", ".join(n for n, cost in task.space.costs.items() if isinstance(cost, CostFormula))
        raise ConfigError(
            f"budget.metric: {_WHAT[14:]} learns by the gradient of a formula of the widths, which {task.metric!r} is "
            f"not; allowed: {known}"
        )
    return found


class _Learner:
    """Gates, adapters and multipliers, and one step after the other."""

    def __init__(self, context: Context, formula: CostFormula, settings: CompressoConfig, seed: int) -> None:
        self._context, self._settings, self._seed = context, settings, seed
        self._draws = torch.Generator().manual_seed(seed)
        self._order = torch.Generator().manual_seed(seed + 1)
        self._epoch = self._order.get_state()  # the epoch in progress is drawn again from here
        self._seen = self._step = 0  # minibatches of the epoch, steps of all
        self._forward = self._tokens = 0
        space = context.space
        self._units = MaskedUnits(context.model, space, _WHAT)
        self._hidden = [
            MaskedHidden(context.model, space, g)
            for g, group in enumerate(space.groups)
            if group.kind == "hidden"
        ]
        self._groups = [*self._units.groups, *(masked.group for masked in self._hidden)]
        self._gates = nn.ModuleList([self._gates_of(g) for g in self._groups])
        self._lagrangian = Lagrangian()
        self._cost = _ExpectedCost(formula, space.widths.astype(np.float64), self._groups)
        self._target = 1.0 - space.target(context.budget, context.metric) / space.dense_cost(context.metric)

    def _gates_of(self, group: int) -> Gates:
        found = self._context.space.groups[group]
        device = next(self._context.model.parameters()).device
        location = None if found.kind == "ffn" else _OPEN
        rate = 1.0 - self._settings.drop_rate
        return Gates(found.units, self._draws, open_rate=rate, location=location, device=device)

    def learn(self, state: StateDir | None) -> list[LowRank]:
        """All steps that are left, a killed learning from its state; returns what the adapters have learned."""
        model, own = self._context.model, self._settings
        lora = FinishConfig(method="lora", adapters=own.adapters, rank=own.rank, alpha=own.alpha, dropout=0.0)
        with isolated_randomness(), torch.enable_grad(), ExitStack() as stack:
            torch.manual_seed(self._seed)
            stack.enter_context(attached(model, lora, merge=False))
            adapters = [p for p in model.parameters() if p.requires_grad]
            optimizers = self._optimizers(adapters)
            kept = None if state is None else state.load()
            if kept is not None:
                self._restore(kept, adapters, optimizers)
            stack.enter_context(self._units)
            for masked in self._hidden:
                stack.enter_context(masked)
            self._run(state, adapters, optimizers)
            return low_rank(model)

    def _optimizers(self, adapters: list[nn.Parameter]) -> list[torch.optim.AdamW]:
        """Of the adapters, the gates, and the multipliers, which climb."""
        own = self._settings
        return [
            torch.optim.AdamW(adapters, lr=own.lr, weight_decay=0.0),
            torch.optim.AdamW(self._gates.parameters(), lr=own.mask_lr, weight_decay=0.0),
            torch.optim.AdamW(self._lagrangian.parameters(), lr=own.mask_lr, weight_decay=0.0, maximize=True),
        ]

    def _run(
        self, state: StateDir | None, adapters: list[nn.Parameter], optimizers: list[torch.optim.AdamW]
    ) -> None:
        workload, own = self._context.data("compresso"), self._settings
        while self._step < own.steps:
            self._order.set_state(self._epoch)
            batches = workload.train_batches(self._order, own.batch_size)
            for inputs, targets in islice(batches, self._seen, None):
                loss = self._update(inputs, targets, adapters, optimizers)
                self._seen += 1
                last = self._step == own.steps
                if last or self._step % _SAVED == 0:
                    _check_finite(loss, self._step)
                    if state is not None:
                        state.save(self._state(adapters, optimizers))
                if last:
                    return
            self._epoch, self._seen = self._order.get_state(), 0

    def _update(
        self,
        inputs: Tensor,
        targets: Tensor,
        adapters: list[nn.Parameter],
        optimizers: list[torch.optim.AdamW],
    ) -> Tensor:
        """One step of the adapters and, after the first ones, of gates and multipliers; the loss of the text."""
        own, workload, model = self._settings, self._context.data("compresso"), self._context.model
        alone = round(own.alone * own.steps)
        pruning = self._step >= alone
        if pruning:
            self._draw()
        text = workload.loss_of(workload.outputs_for_loss(model, inputs, targets), targets)
        loss = text
        if pruning:
            risen = (self._step - alone) / max(1, round(own.rise * own.steps))
            penalty = self._lagrangian(self._cost.sparsity(self._kept()), self._target * min(1.0, risen))
            loss = text + penalty.to(text.device, text.dtype)
        optimizers[0].param_groups[0]["lr"] = own.lr * (1.0 - self._step / own.steps)
        used = optimizers if pruning else optimizers[:1]
        for optimizer in used:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(adapters, _CLIP)
        for optimizer in used:
            optimizer.step()
        for gates in self._every():
            gates.hold()
        self._step += 1
        self._forward += len(inputs)
        self._tokens += inputs.numel()
        return text.detach()

    def _every(self) -> list[Gates]:
        return [gates for gates in self._gates if isinstance(gates, Gates)]

    def _draw(self) -> None:
        """Sampled gates into the masks of the model."""
        hidden = {masked.group: masked for masked in self._hidden}
        for group, gates in zip(self._groups, self._every(), strict=True):
            if group in hidden:
                hidden[group].mask = gates.sample(self._draws)
            else:
                self._units.mask[group] = gates.sample(self._draws)

    def _kept(self) -> Tensor:
        """Expected units of each gated group, float64 on the CPU."""
        return torch.stack([gates.kept().sum().double().cpu() for gates in self._every()])

    def shares(self) -> Floats:
        """The share of its units that each group is expected to lose, (G,)."""
        space = self._context.space
        shares = np.zeros(len(space.groups))
        kept = self._kept().detach().numpy()
        shares[self._groups] = 1.0 - kept / space.unit_counts[self._groups]
        return shares if shares.any() else np.ones_like(shares)

    def values(self) -> Mapping[int, Tensor]:
        """The gate of every unit at the end, by group."""
        return {g: gates.values() for g, gates in zip(self._groups, self._every(), strict=True)}

    def scores(self) -> list[Floats]:
        """The gates as unit scores, one array a group; groups without gates keep their importance."""
        found = [np.asarray(s, dtype=np.float64).copy() for s in self._context.importance]
        for group, value in self.values().items():
            found[group] = value.double().cpu().numpy()
        return found

    @property
    def counts(self) -> dict[str, int]:
        """What was read: steps, sequences forward and backward, tokens of them."""
        return {
            "steps": self._step,
            "forward": self._forward,
            "backward": self._forward,
            "tokens": self._tokens,
        }

    def _state(self, adapters: list[nn.Parameter], optimizers: list[torch.optim.AdamW]) -> dict[str, Any]:
        counts = {"step": self._step, "seen": self._seen, "forward": self._forward, "tokens": self._tokens}
        return {
            "adapters": [p.detach() for p in adapters],
            "gates": self._gates.state_dict(),
            "multipliers": self._lagrangian.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            "draws": self._draws.get_state(),
            "epoch": self._epoch,
            **counts,
        }

    def _restore(
        self, kept: dict[str, Any], adapters: list[nn.Parameter], optimizers: list[torch.optim.AdamW]
    ) -> None:
        with torch.no_grad():
            for parameter, saved in zip(adapters, kept["adapters"], strict=True):
                parameter.copy_(saved)
        self._gates.load_state_dict(kept["gates"])
        self._lagrangian.load_state_dict(kept["multipliers"])
        for optimizer, saved in zip(optimizers, kept["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self._step, self._seen = kept["step"], kept["seen"]
        self._forward, self._tokens = kept["forward"], kept["tokens"]
        self._epoch = kept["epoch"]
        self._draws.set_state(kept["draws"])


class _ExpectedCost:
    """The cost of expected widths with a gradient: `CostFormula` in torch, float64."""

    def __init__(self, formula: CostFormula, widths: Floats, groups: list[int]) -> None:
        self._constant = float(formula.constant)
        self._linear, self._quadratic, self._widths = (
            torch.from_numpy(np.array(part, dtype=np.float64))
            for part in (formula.linear, formula.quadratic, widths)
        )
        self._groups = torch.tensor(groups)
        self._dense = float(formula(widths))

    def sparsity(self, kept: Tensor) -> Tensor:
        """1 minus the cost as a share of the dense one, a scalar, when ``kept`` units of the gated groups are left."""
        w = self._widths.index_put((self._groups,), kept)
        return 1.0 - (self._constant + w @ self._linear + w @ (self._quadratic @ w)) / self._dense


def _check_finite(loss: Tensor, step: int) -> None:
    if not bool(torch.isfinite(loss)):
        raise RunError(
            f"search.compresso: the loss is not finite after {step} steps; lower search.compresso.lr or .mask_lr"
        )
