"""Everything that searches. ``AGENTS`` maps a name to a maker; adding an agent is one entry and one file.

Outside of this package ``@agent("what it does")`` over a function or a class is enough.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any, TypeVar

from ..config.search import SearchConfig
from ..errors import ConfigError, near_miss
from ..rules.context import RULES, check_free
from ..utils.lazy import lazy_names
from ..utils.registry import Registry
from . import baselines
from .base import Agent, Memory, Round, SearchRequest, SearchResult, TrialRecorder
from .baselines.function import FunctionAgent, SearchContext
from .state import StateDir

if TYPE_CHECKING:
    from .ppo.behaviour_cloning import COMMON_PLANS, clone_behaviour
    from .ppo.policy import GroupPolicy, PolicyTransferWarning, PortablePolicy, load_policy, save_policy
    from .ppo.transfer import PROBES, builds, planned

# Policies bring torch and stable-baselines3.
__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "COMMON_PLANS": "ppo.behaviour_cloning",
        "GroupPolicy": "ppo.policy",
        "PROBES": "ppo.transfer",
        "PolicyTransferWarning": "ppo.policy",
        "PortablePolicy": "ppo.policy",
        "builds": "ppo.transfer",
        "clone_behaviour": "ppo.behaviour_cloning",
        "load_policy": "ppo.policy",
        "planned": "ppo.transfer",
        "save_policy": "ppo.policy",
    },
)

Own = TypeVar("Own", bound=Callable[..., object])


@dataclass(frozen=True)
class Entry:
    """A registered agent: a sentence for ``rlprune list agents``, and "module:class" within this package.

    ``own`` is the function or class itself of an agent from outside of this package. ``on_request`` says that it runs
    only where it is named, and is no part of a benchmark of all methods: it fits some models or settings only.
    ``extra`` is what has to be installed for it; ``wing`` names the only wing whose models it searches
    (``PruningSpace.wing``), None stands for all. ``learns_units`` says that it ranks the units itself
    (`Evaluator.rerank`): nothing else is scored in the same run then.
    """

    name: str
    summary: str
    target: str
    own: Any = None
    on_request: bool = False
    extra: str | None = None
    wing: str | None = None
    learns_units: bool = False

    def load(self) -> Callable[[SearchConfig], Agent]:
        """The agent's class; imported on first use, since some bring heavy libraries."""
        if self.own is not None:
            return self.own if isinstance(self.own, type) else partial(FunctionAgent, self.own)
        module, _, attribute = self.target.partition(":")
        maker: Callable[[SearchConfig], Agent] = getattr(import_module(f".{module}", __name__), attribute)
        return maker


_SHIPPED = {
    entry.name: entry
    for entry in (
        Entry(
            "ppo",
            "stable-baselines3 PPO with weights shared over groups (surrogate or direct)",
            "ppo.agents:PPOAgent",
        ),
        Entry(
            "ppo_stages",
            "PPO that prunes and recovers in stages (search.ppo_stages), each of them an evaluation",
            "baselines.episodes:StagedPPO",
        ),
        Entry("ppo_sequential", "PPO that decides one group a step", "baselines.episodes:SequentialPPO"),
        Entry(
            "amc", "DDPG that decides one group a step, explored and rewarded as in AMC", "baselines.amc:AMC"
        ),
        Entry("sac", "soft actor-critic of stable-baselines3 on the whole distribution", "baselines.sb3:SAC"),
        Entry("td3", "twin delayed DDPG of stable-baselines3 on the whole distribution", "baselines.sb3:TD3"),
        Entry(
            "a2c",
            "advantage actor-critic of stable-baselines3 on the whole distribution",
            "baselines.sb3:A2C",
        ),
        Entry(
            "sb3",
            "any algorithm of stable-baselines3 or sb3-contrib, by search.sb3.algorithm and .arguments",
            "baselines.sb3:SB3Agent",
        ),
        Entry(
            "random",
            "random distributions projected onto the budget (EagleEye)",
            "baselines.random:RandomSearch",
        ),
        Entry(
            "cma_es",
            "CMA-ES by optuna's sampler (extra `benchmark`)",
            "baselines.optuna:CMAES",
            extra="benchmark",
        ),
        Entry(
            "tpe",
            "multivariate TPE by optuna's sampler (extra `benchmark`)",
            "baselines.optuna:TPE",
            extra="benchmark",
        ),
        Entry(
            "gp",
            "Gaussian-process Bayesian optimisation by optuna's sampler (extra `benchmark`)",
            "baselines.optuna:GaussianProcess",
            extra="benchmark",
        ),
        Entry(
            "evopress", "EvoPress-style evolution by level swaps at equal cost", "baselines.evopress:EvoPress"
        ),
        Entry(
            "rl_pruner",
            "RL-Pruner's probability vector, in stages of exact cost (arXiv 2411.06463)",
            "baselines.rl_pruner:RLPruner",
        ),
        Entry(
            "eagleeye",
            "random rates near the budget, as published (EagleEye)",
            "baselines.eagleeye:EagleEye",
            on_request=True,
        ),
        Entry(
            "fastnas",
            "FastNAS by NVIDIA's ModelOpt, an outside peer (extra `peers`)",
            "baselines.fastnas:FastNAS",
            on_request=True,
            extra="peers",
            wing="vision",
        ),
        Entry(
            "evopress_drop",
            "evolution over whole attentions and feed-forward parts, as published (EvoPress)",
            "baselines.evopress_drop:EvoPressDrop",
            on_request=True,
        ),
        Entry(
            "rule",
            "the plan of one rule, search.base_rule, and no search",
            "baselines.one_rule:OneRule",
            on_request=True,
        ),
        Entry(
            "rl_pruner_published",
            "RL-Pruner as published, a stage a round (section `rounds`, arXiv 2411.06463)",
            "baselines.rl_pruner_published:RLPrunerPublished",
            on_request=True,
        ),
        Entry(
            "bypass_published",
            "policy gradient over masks of heads and neurons, as published (Bypass back-propagation)",
            "baselines.bypass_published:BypassPublished",
            on_request=True,
            wing="language",
            learns_units=True,
        ),
        Entry(
            "compresso",
            "L0 masks of heads, neurons and hidden channels, learned with LoRA, as published (Compresso)",
            "baselines.compresso:Compresso",
            on_request=True,
            wing="language",
            learns_units=True,
        ),
        Entry(
            "bypass",
            "policy gradient over Bernoulli keep probabilities (Bypass back-propagation)",
            "baselines.bypass:Bypass",
        ),
    )
}
AGENTS: Registry[Entry] = Registry("agent", source="own", entries=_SHIPPED.items())
_KNOWN = {entry.target.partition(":")[0] for entry in _SHIPPED.values()} | {
    "baselines.function",
    "baselines.gradient_free",
}
"""Files of baselines that need no import: what they hold stands in the table, or it is no agent."""


def make_agent(name: str, settings: SearchConfig | None = None) -> Agent:
    """An agent by name; ConfigError with the near miss for an unknown one."""
    if not AGENTS.knows(name):
        allowed = ", ".join(AGENTS)
        raise ConfigError(
            f"search.agent: unknown agent {name!r}{near_miss(name, AGENTS)}; allowed: {allowed}"
        )
    return AGENTS[name].load()(settings or SearchConfig())


def agent(summary: str) -> Callable[[Own], Own]:
    """Register an agent of yours under the name of the function or class below.

    A function takes one argument, a :class:`SearchContext`, and spends its evaluations. A class is made with a
    ``SearchConfig`` and has the method ``search`` of :class:`Agent`, which takes a :class:`SearchRequest`.

    Args:
        summary: one line for ``rlprune list agents``.

    Raises (when applied):
        ConfigError: the name is taken, the summary is missing, or a class has no ``search(request)``.
    """
    if not isinstance(summary, str):
        raise ConfigError('agent: needs a summary, as in @agent("what it does")')

    def register(own: Own) -> Own:
        name = own.__name__
        owner = AGENTS[name].own or AGENTS[name].load() if name in AGENTS else None
        check_free("agent", name, RULES[name].function if name in RULES else owner, own)
        if isinstance(own, type):
            _check_search(own)
        AGENTS[name] = Entry(name, summary, "", own)
        return own

    return register


def _check_search(own: type) -> None:
    """Refuse a class whose ``search`` cannot be called with one :class:`SearchRequest`."""
    search = getattr(own, "search", None)
    if not callable(search):
        raise ConfigError(f"agent: the class {own.__name__!r} has no method search")
    try:
        inspect.signature(search).bind("self", "request")
    except TypeError:
        raise ConfigError(
            f"agent: {own.__name__}.search has to take one argument, as in search(self, request): "
            f"a rlprune.agents.SearchRequest with {', '.join(field.name for field in fields(SearchRequest))}"
        ) from None


# A file that is new there registers its agent by @agent.
for _file in iter_modules(baselines.__path__, "baselines."):
    if _file.name not in _KNOWN:
        import_module(f".{_file.name}", __name__)

__all__ = [
    "AGENTS",
    "COMMON_PLANS",
    "PROBES",
    "Agent",
    "Entry",
    "GroupPolicy",
    "Memory",
    "PolicyTransferWarning",
    "PortablePolicy",
    "Round",
    "SearchContext",
    "SearchRequest",
    "SearchResult",
    "StateDir",
    "TrialRecorder",
    "agent",
    "builds",
    "clone_behaviour",
    "load_policy",
    "make_agent",
    "planned",
    "save_policy",
]
