"""The policy: one small network, shared over groups, so that a trained one fits any number of them.

Shape legend: B batch, G groups (padded), F features, H hidden units.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.distributions import Distribution
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import Tensor, nn

from ...artifacts.policy import read_policy_files
from ...artifacts.policy import save_policy as write_policy
from ...envs.observation import EXPECTING
from ...envs.task import ACTION_SCALE, Source, Task, make_task
from ...errors import ArtifactError
from ...pruning.budget import BudgetLike
from ...pruning.plan import Plan
from ...utils.finite import all_finite
from ..sb3_internals import CustomPolicy
from .policy_facts import FORMAT, FORMAT_VERSION, check_facts
from .transfer import PlanMemory, can_build, planned

# The exploration noise stays within these bounds, so that neither a collapse nor a blow-up is final.
_LOG_STD = (-3.0, 0.5)
_EXPERIENCE = "experience."


class PolicyTransferWarning(UserWarning):
    """A policy is applied to an architecture that it has not been trained on."""


class GroupNetwork(nn.Module):
    """Actor and critic: (B, G, F) -> action means (B, G) in (-1, 1) and values (B, 1).

    Each group is encoded by the same layers; the mean and maximum over the real groups are the
    context that every group's head sees. The actor's last layer starts at zero: the first policy is
    the base rule.
    """

    def __init__(self, features: int, hidden: int = 64, log_std_init: float = -1.0) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Linear(features, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh()
        )
        self.context = nn.Sequential(nn.Linear(2 * hidden, hidden), nn.Tanh())
        self.actor = nn.Sequential(nn.Linear(2 * hidden, hidden), nn.Tanh(), nn.Linear(hidden, 1))
        self.critic = nn.Sequential(nn.Linear(hidden, hidden), nn.Tanh(), nn.Linear(hidden, 1))
        # One number for all groups: stable-baselines3 has one for each action, which would not travel.
        self.log_std = nn.Parameter(torch.tensor(float(log_std_init)))
        for parameter in self.actor[-1].parameters():
            nn.init.zeros_(parameter)

    def encode(self, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, G, F) -> encoded groups (B, G, H), context (B, H), mask (B, G)."""
        mask = table[..., 0]
        encoded = self.encoder(table)
        count = mask.sum(dim=1, keepdim=True).clamp(min=1.0)
        mean = (encoded * mask[..., None]).sum(dim=1) / count
        largest = encoded.masked_fill(mask[..., None] == 0, -1.0).amax(dim=1)
        return encoded, self.context(torch.cat([mean, largest], dim=-1)), mask

    def means(self, encoded: Tensor, context: Tensor, bias: Tensor | None = None) -> Tensor:
        """Action means (B, G), bounded so that no mean drifts to where the clipped action does not follow."""
        spread = context[:, None, :].expand(-1, encoded.shape[1], -1)
        raw = self.actor(torch.cat([encoded, spread], dim=-1)).squeeze(-1)
        return torch.tanh(raw if bias is None else raw + bias)


class MaskedGaussian(Distribution):
    """Independent normals with one shared deviation; padded groups count for nothing."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # stable-baselines3 leaves it so
        self._mean = self._std = self._mask = torch.zeros(1, 1)

    def proba_distribution_net(self, *args: object, **kwargs: object) -> nn.Module:
        raise NotImplementedError("the policy builds its own network")

    def proba_distribution(self, mean: Tensor, log_std: Tensor, mask: Tensor) -> MaskedGaussian:
        """mean, mask: (B, G); log_std: scalar."""
        self._mean, self._mask = mean * mask, mask
        self._std = log_std.clamp(*_LOG_STD).exp().expand_as(mean)
        return self

    def log_prob(self, actions: Tensor) -> Tensor:
        normal = torch.distributions.Normal(self._mean, self._std, validate_args=False)
        found: Tensor = (normal.log_prob(actions) * self._mask).sum(dim=1)
        return found

    def entropy(self) -> Tensor:
        normal = torch.distributions.Normal(self._mean, self._std, validate_args=False)
        found: Tensor = (normal.entropy() * self._mask).sum(dim=1)
        return found

    def sample(self) -> Tensor:
        return self._mean + self._std * torch.randn_like(self._mean) * self._mask

    def mode(self) -> Tensor:
        return self._mean

    def actions_from_params(
        self, mean: Tensor, log_std: Tensor, mask: Tensor, deterministic: bool = False
    ) -> Tensor:
        return self.proba_distribution(mean, log_std, mask).get_actions(deterministic)

    def log_prob_from_params(
        self, mean: Tensor, log_std: Tensor, mask: Tensor, deterministic: bool = False
    ) -> tuple[Tensor, Tensor]:
        actions = self.actions_from_params(mean, log_std, mask, deterministic)
        return actions, self.log_prob(actions)


class GroupPolicy(CustomPolicy):
    """stable-baselines3's actor-critic interface over :class:`GroupNetwork`.

    ``group_bias`` adds one trained number per group, for the checkpoint at hand; it is not part of
    the portable file. ``provenance`` (see :func:`provenance`) says what the policy was trained on;
    ``experience`` holds plans that a search over several checkpoints has scored.
    """

    action_space: spaces.Box

    def __init__(
        self,
        observation_space: spaces.Box,
        action_space: spaces.Box,
        lr_schedule: Schedule,
        hidden: int = 64,
        group_bias: bool = True,
        log_std_init: float = -1.0,
        **kwargs: Any,
    ) -> None:
        self.hidden, self.group_bias = hidden, group_bias
        self.provenance: dict[str, Any] = {}
        self.plan_memory: PlanMemory | None = None
        # Factor on the means; the search itself stays within [-1, 1].
        self.reach = 1.0
        super().__init__(observation_space, action_space, lr_schedule, log_std_init=log_std_init, **kwargs)

    def build(self, learning_rate: float) -> None:
        groups = int(self.action_space.shape[0])
        features = int(np.prod(self.observation_space.shape or ())) // groups
        self.network = GroupNetwork(features, self.hidden, self.log_std_init)
        self.bias = nn.Parameter(torch.zeros(groups)) if self.group_bias else None
        self.log_std = self.network.log_std  # the very same parameter, where stable-baselines3 logs it from
        self.action_dist = MaskedGaussian()
        arguments = {"lr": learning_rate, **self.optimizer_kwargs}
        self.optimizer = self.optimizer_class(self.parameters(), **arguments)

    def _both(self, obs: PyTorchObs) -> tuple[Distribution, Tensor]:
        assert isinstance(obs, Tensor)
        table = obs.float().reshape(len(obs), self.action_space.shape[0], -1)
        # With one model under one budget every observation is the same, and is encoded once.
        same = len(table) > 1 and bool((table[1:] == table[0]).all())
        encoded, context, mask = self.network.encode(table[:1] if same else table)
        means = self.reach * self.network.means(encoded, context, self.bias)
        means, values, mask = (t.expand(len(table), -1) for t in (means, self.network.critic(context), mask))
        return MaskedGaussian().proba_distribution(means, self.network.log_std, mask), values

    def forward(self, obs: PyTorchObs, deterministic: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Actions (B, G), values (B, 1) and log-probabilities (B,) for flat observations (B, G * F)."""
        distribution, values = self._both(obs)
        actions = distribution.get_actions(deterministic=deterministic)
        return actions, values, distribution.log_prob(actions)

    def evaluate_actions(self, obs: PyTorchObs, actions: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Values (B, 1), log-probabilities (B,) and entropies (B,) of given actions."""
        distribution, values = self._both(obs)
        return values, distribution.log_prob(actions), distribution.entropy()

    def get_distribution(self, obs: PyTorchObs) -> Distribution:
        return self._both(obs)[0]

    def predict_values(self, obs: PyTorchObs) -> Tensor:
        return self._both(obs)[1]


def provenance(tasks: Sequence[Task], stages: int = 1) -> dict[str, Any]:
    """What a portable file says about a training: what was seen, how units were ranked, architectures, budgets, base
    rule, kinds of groups."""
    ranked = tasks[0].importance_name
    return {
        **({} if ranked is None else {"importance": ranked}),
        "feature_version": tasks[0].feature_version,
        "features": list(tasks[0].features),
        "base_rule": tasks[0].base_rule,
        "metric": tasks[0].metric,
        "stages": stages,
        "sensitivity": list(tasks[0].sensitivity),
        "fingerprints": sorted({task.space.fingerprint for task in tasks}),
        "kinds": sorted({g.kind for task in tasks for g in task.space.groups}),
        "budgets": [list(task.budget_range) for task in tasks],
        "checkpoints": len(tasks),
    }


def portable_state(policy: GroupPolicy) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The shared weights and a JSON-able description; what belongs to one checkpoint stays behind."""
    tensors = {name: t.detach().cpu().clone().contiguous() for name, t in policy.network.state_dict().items()}
    meta = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "hidden": policy.hidden,
        "action_scale": ACTION_SCALE,
        "reach": policy.reach,
        **policy.provenance,
    }
    if policy.plan_memory is not None:
        known, meta["experience"] = policy.plan_memory.state()
        tensors |= {_EXPERIENCE + name: tensor for name, tensor in known.items()}
    return tensors, meta


class PortablePolicy:
    """A trained policy away from its trainer: model in, distribution out, in one forward pass.

    One that was trained on several checkpoints brings ``experience``: on another checkpoint their best plans (those
    of the rules, where its architecture is another one) and what lies around them are tried on unlabelled images,
    without an evaluation.
    """

    def __init__(
        self, network: GroupNetwork, meta: Mapping[str, object], plan_memory: PlanMemory | None = None
    ) -> None:
        self.network = network.eval()
        self.meta: dict[str, Any] = dict(meta)
        self.plan_memory = plan_memory

    @classmethod
    def from_state(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> PortablePolicy:
        """Check a loaded file and build the policy; ArtifactError names what does not fit."""
        features = check_facts(meta)
        hidden = int(meta["hidden"])
        plan_memory = None
        if "experience" in meta:
            known = {n.removeprefix(_EXPERIENCE): t for n, t in tensors.items() if n.startswith(_EXPERIENCE)}
            plan_memory = PlanMemory.from_state(known, meta["experience"])
            tensors = {n: t for n, t in tensors.items() if not n.startswith(_EXPERIENCE)}
        with torch.device("meta"):  # a width that the tensors do not have takes no memory
            expected = GroupNetwork(len(features), hidden).state_dict()
        if set(tensors) != set(expected):
            odd = sorted(set(tensors) ^ set(expected))[0]
            raise ArtifactError(f"policy: tensor {odd!r} is {'missing' if odd in expected else 'unknown'}")
        for name, tensor in sorted(tensors.items()):
            if tensor.shape != expected[name].shape:
                raise ArtifactError(
                    f"policy: tensor {name!r} has shape {tuple(tensor.shape)}, not {tuple(expected[name].shape)}"
                )
            if not tensor.is_floating_point() or not all_finite(tensor):
                raise ArtifactError(f"policy: tensor {name!r} holds NaN, infinity or no numbers")
        network = GroupNetwork(len(features), hidden)
        network.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
        return cls(network, meta, plan_memory)

    @property
    def feature_version(self) -> int:
        """The columns that it was trained on, and is shown (``envs.observation.FEATURE_VERSIONS``)."""
        return int(self.meta["feature_version"])

    @property
    def importance(self) -> str:
        """The importance that ranked the units in its training, which features are computed of.

        Files of the first versions do not say it: then the default of their time, or what its features need.
        """
        return str(
            self.meta.get("importance", "obs_fisher" if self.feature_version == EXPECTING else "taylor")
        )

    def action(self, table: NDArray[np.float32]) -> NDArray[np.float64]:
        """Mode of the policy for one feature table (G, F): actions (G,)."""
        with torch.no_grad():
            encoded, context, _ = self.network.encode(torch.from_numpy(table)[None])
            action: NDArray[np.float64] = self.network.means(encoded, context)[0].double().numpy()
        return float(self.meta.get("reach", 1.0)) * action

    def task(self, source: Source | Task, budget: BudgetLike = 0.5, metric: str | None = None) -> Task:
        """A task with the policy's base rule, for a workload, an evaluator or another task."""
        metric = metric or str(self.meta.get("metric", "macs"))
        base_rule = str(self.meta["base_rule"])
        sensitivity = tuple(self.meta.get("sensitivity", ()))
        scorer = None
        if isinstance(source, Task):
            evaluator, scorer = source.evaluator, source.scorer
        else:
            evaluator = make_task(source, budget, metric=metric, importance=self.importance).evaluator
        return Task(evaluator, budget, metric, base_rule, scorer, sensitivity, shown=self.feature_version)

    def distribution(
        self, source: Source | Task, budget: BudgetLike = 0.5, metric: str | None = None
    ) -> NDArray[np.float64]:
        """How to spread the pruning over the groups of a model: (G,).

        Args:
            source: a :class:`Task`, an evaluator or a workload.
            budget: 0.5, "50%" or "150M".
            metric: the cost that the budget limits; the one of the training by default.
        """
        task = self.task(source, budget, metric)
        self._check(task)
        return task.deviated(self.action(task.observe(budget)), budget)

    def widths(
        self,
        source: Source | Task,
        budget: BudgetLike = 0.5,
        metric: str | None = None,
        *,
        builds: int | None = None,
    ) -> NDArray[np.int64]:
        """Widths (G,) for a model under a budget: no search, and no evaluation but the base rule's probes.

        With experience, the best plan that builds find on unlabelled images (:mod:`.experience`); else, for language
        models and with fewer than two ``builds``, the distribution, projected.

        Args:
            builds: models that are built for that, the dense one included; eight a group by default. A later call
                with more of them goes on where the first ended.
        """
        task = self.task(source, budget, metric)
        own = task.space.project(self.distribution(task, budget, metric), budget, task.metric)
        alone = builds is not None and builds < 2
        if alone or self.plan_memory is None or not can_build(task):
            return own
        starts = [own, task.uniform_widths(budget), *self.plan_memory.starts(task, budget, builds)]
        return planned(task, budget, np.array(starts), builds)

    def plan(
        self,
        source: Source | Task,
        budget: BudgetLike = 0.5,
        metric: str | None = None,
        *,
        builds: int | None = None,
    ) -> Plan:
        """A :class:`rlprune.Plan` for a workload (or evaluator) under a budget, without any search; see `widths`."""
        task = self.task(source, budget, metric)
        widths = self.widths(task, budget, metric, builds=builds)
        origin = {"agent": "policy", "budget": budget, "metric": task.metric, "base_rule": task.base_rule}
        evaluator: Any = task.evaluator
        plan: Plan = evaluator.plan(widths, origin)
        return plan

    def _check(self, task: Task) -> None:
        """Warn about an architecture that was not trained on; refuse one that has nothing in common with it."""
        kinds = {g.kind for g in task.space.groups}
        known = set(self.meta.get("kinds", kinds))
        if not kinds & known:
            raise ArtifactError(
                f"policy: trained on groups of kind {', '.join(sorted(known))}; "
                f"this model has only {', '.join(sorted(kinds))}"
            )
        fingerprints = self.meta.get("fingerprints")
        if fingerprints and task.space.fingerprint not in fingerprints:
            warnings.warn(
                "the policy was trained on another architecture; it is applied group by group all the same",
                PolicyTransferWarning,
                stacklevel=3,
            )


def load_policy(directory: str | Path) -> PortablePolicy:
    """Read a saved policy (safetensors + JSON); ArtifactError where it is damaged or does not fit."""
    return PortablePolicy.from_state(*read_policy_files(directory))


def save_policy(policy: GroupPolicy, directory: str | Path) -> Path:
    """Write the portable part of a trained policy into a folder."""
    return write_policy(*portable_state(policy), directory)
