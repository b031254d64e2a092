"""Distillation of incumbents: the policy learns the best plans that its own search has scored.

PPO follows the surrogate, and over a range of budgets its policy is a compromise of all of them; the best
plans themselves are known exactly. After the last evaluation the shared network is therefore regressed on the
actions that give those plans (behaviour cloning, Pomerleau 1991; the cloned expert is the search itself), and
between the budgets that were searched on plans in between, so that the policy interpolates the incumbents.

Of one checkpoint the plans are wanted exactly. Of several, what they have in common is wanted (`common`): a new network
takes the place of the one that PPO has trained, learns several good plans of each, and sees the importances of
their units and the probes, which tell a checkpoint rather than a layer, through noise.

Shape legend: G groups, K budgets.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ...envs.distribution import DistributionEnv
from ...envs.task import ACTION_SCALE, BASE_FLOOR, Task
from ...pruning.budget import BudgetLike
from ...utils.arrays import Floats, Floats32, Ints
from .policy import GroupNetwork, GroupPolicy

_STEPS = 2000
# Of several checkpoints: steps, plans of each, deviation of the noise on the columns that are their own. Chosen on
# the eight training checkpoints of docs/transfer.md at 30% of the MACs, each left out in turn.
_COMMON_STEPS, COMMON_PLANS, _NOISE = 1000, 5, 0.5
# At most; a few seconds each.
_ROUNDS = 3
_LEARNING_RATE = 2e-3
# What the policy's actions may reach once it is taught, beyond the [-1, 1] of the search: the best plans leave some
# groups whole and cut others to a few units.
REACH = 1.7
# Targets stay inside what the tanh of the network can give.
_BOUND = 0.97
# Weight of a plan in between compared with that of a scored one.
_WEIGHT_BETWEEN = 0.1
# Budgets between two neighbouring ones that get an interpolated plan.
_BETWEEN = 3
# A group that loses nothing gives a part of a step, which the projection floors away: these are tried.
_TRACES = (0.1, 0.3, 0.5, 0.7)
# Parts of the network that no lesson touches; a search that goes on from the policy trains them again.
_UNTAUGHT = ("critic", "log_std")
# Common shifts that are tried, where not all of an action is within reach.
_SHIFTS = np.linspace(-1.5, 1.5, 31)

# A budget, the widths (G,) wanted there (between searched budgets they need not be whole), and its weight.
Demonstration = tuple[BudgetLike, Floats, float]


def demonstrations(best: Sequence[tuple[BudgetLike, Ints]]) -> list[Demonstration]:
    """The best plans of a task, and plans in between.

    Args:
        best: budget ratios and widths (G,) of the best plan at each, the lowest budget first.
    """
    found: list[Demonstration] = [(budget, widths.astype(np.float64), 1.0) for budget, widths in best]
    for (low, a), (high, b) in itertools.pairwise(best):
        assert isinstance(low, int | float) and isinstance(high, int | float)  # a range is one of ratios
        for t in np.linspace(0.0, 1.0, _BETWEEN + 2)[1:-1]:
            found.append((float(low + t * (high - low)), (1 - t) * a + t * b, _WEIGHT_BETWEEN))
    return found


def wanted_action(task: Task, budget: BudgetLike, widths: Floats) -> Floats:
    """The action (G,) within reach whose widths at a budget come closest to the wanted ones (G,).

    Where a plan asks for more than actions reach, the shift of the action that costs the fewest units, as
    shares of their groups, is taken.
    """
    base, dense = task.base(budget), task.space.widths.astype(np.float64)
    floor = np.maximum(base, BASE_FLOOR * base.mean())
    tried = []
    for trace in _TRACES:
        shares = np.maximum(dense - widths, trace * task.space.steps) / dense
        action = np.log(shares / floor) / ACTION_SCALE
        middle = (action.max() + action.min()) / 2.0
        tried.append(np.clip(action - middle + _SHIFTS[:, None], -_BOUND * REACH, _BOUND * REACH))
    actions = np.vstack(tried)
    missed = np.abs(task.widths(actions, budget) - widths) / dense
    best: Floats = actions[int(np.argmin(missed.sum(axis=1)))]
    return best


def clone_behaviour(
    policy: GroupPolicy,
    env: DistributionEnv,
    tasks: Sequence[Task],
    wanted: Sequence[Sequence[Demonstration]],
    *,
    common: bool = False,
) -> None:
    """Regress the portable part of the policy on the lessons of every task, in place.

    In rounds, until the scored plans come out as they are wanted; or, with ``common``, once from a new network,
    for what the plans of the tasks share. The bias of each group, which stays behind when the policy is saved, is
    set to zero first.
    """
    policy.reach = REACH
    observations, actions, weights = _table(env, tasks, wanted)
    if policy.bias is not None:
        policy.bias.data.zero_()
    if common:
        fresh = GroupNetwork(observations.shape[-1], policy.hidden)
        kept = {n: p for n, p in policy.network.state_dict().items() if n.startswith(_UNTAUGHT)}
        policy.network.load_state_dict(fresh.state_dict() | kept)
        _regress(policy, observations, actions, weights, _COMMON_STEPS, _own_columns(env.features))
        return
    for _ in range(_ROUNDS):
        _regress(policy, observations, actions, weights, _STEPS)
        if _learned(policy, observations, actions, tasks, wanted):
            break


def _regress(
    policy: GroupPolicy,
    observations: Tensor,
    actions: Tensor,
    weights: Tensor,
    steps: int,
    noisy: Sequence[int] = (),
) -> None:
    """One round of Adam, the learning rate falling to zero by a cosine; ``noisy`` columns are seen through noise."""
    named = policy.network.named_parameters()
    trained = [p for name, p in named if not name.startswith(_UNTAUGHT)]
    optimizer = torch.optim.Adam(trained, lr=_LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    mask = observations[..., :1]
    own = [i for i in noisy if observations[..., i].any()]  # a policy without probes has zeros there
    for _ in range(steps):
        seen = observations
        if own:
            seen = observations.clone()
            seen[..., own] += _NOISE * mask * torch.randn(*mask.shape[:-1], len(own))
        error = _means(policy, seen) - actions
        # Distributions ignore a common shift, and so does the loss.
        shift = (error * weights).sum(dim=1, keepdim=True) / weights.sum(dim=1, keepdim=True)
        loss = (weights * ((error - shift) * mask[..., 0]) ** 2).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def _own_columns(features: Sequence[str]) -> list[int]:
    """Columns that tell a checkpoint rather than a layer."""
    return [i for i, name in enumerate(features) if "importance" in name or "sensitivity" in name]


def _means(policy: GroupPolicy, observations: Tensor) -> Tensor:
    """Actions (K, Gmax) of the portable part, zero for padding."""
    encoded, context, mask = policy.network.encode(observations)
    return REACH * policy.network.means(encoded, context) * mask


def _learned(
    policy: GroupPolicy,
    observations: Tensor,
    actions: Tensor,
    tasks: Sequence[Task],
    wanted: Sequence[Sequence[Demonstration]],
) -> bool:
    """Whether every scored plan comes out as its wanted action gives it."""
    with torch.no_grad():
        found = _means(policy, observations).double().numpy()
    row = 0
    for task, known in zip(tasks, wanted, strict=True):
        groups = len(task.space.groups)
        for budget, _, weight in known:
            pair = np.stack([found[row, :groups], actions[row, :groups].double().numpy()])
            row += 1
            mine, theirs = task.widths(pair, budget)
            if weight == 1.0 and (mine != theirs).any():
                return False
    return True


def _table(
    env: DistributionEnv, tasks: Sequence[Task], wanted: Sequence[Sequence[Demonstration]]
) -> tuple[Tensor, Tensor, Tensor]:
    """Observations (K, Gmax, F), actions (K, Gmax) and weights (K, Gmax)."""
    rows: list[Floats32] = []
    actions: list[Floats] = []
    weights: list[Floats] = []
    for index, (task, known) in enumerate(zip(tasks, wanted, strict=True)):
        groups = len(task.space.groups)
        padding = (0, env.max_groups - groups)
        for budget, widths, weight in known:
            obs, _ = env.reset(options={"task": index, "budget": budget})
            rows.append(obs.reshape(env.max_groups, -1))
            actions.append(np.pad(wanted_action(task, budget, widths), padding))
            # An error of the action counts in units: of a group that is not cut at all it hardly does.
            units = np.maximum(task.space.widths - widths, _TRACES[-1] * task.space.steps)
            weights.append(np.pad(weight * units / units.sum(), padding))
    tables = (np.stack(part).astype(np.float32) for part in (rows, actions, weights))
    observations, targets, parts = (torch.from_numpy(table) for table in tables)
    return observations, targets, parts
