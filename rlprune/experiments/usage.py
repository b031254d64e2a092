"""Which settings a command uses: one that is given and not used is refused before anything runs.

A setting is given where it differs from its default, so the defaults that RUN/config.yaml spells out are not.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial, reduce

from ..agents import AGENTS
from ..config.config import AUTO, Config, settings_reference
from ..config.names import RECOVERY_STEPS
from ..config.training import FinishConfig
from ..errors import ConfigError
from ..importance.importance import IMPORTANCES
from ..rules import RULES as PRUNING_RULES
from ..utils.registry import is_foreign
from ..workloads.adapter import ModelAdapter, adapters
from .build import expected_adapter
from .choice import takes_own_choice

SEARCHING = ("train", "benchmark", "apply --refine")
TUNING = ("train", "benchmark", "fidelity", "prune --stages", "prune --steps", "tune")
LOOKING = ("inspect", "evaluate", "export", "tune")
"""Commands that score no candidate."""
SEVERAL = ("amc", "ppo_sequential", "sac", "td3", "a2c", "sb3", "cma_es", "tpe", "gp")
"""Agents that may propose several plans before they know a score."""


@dataclass(frozen=True)
class Run:
    """What is about to run: a command, with the option that changes what it reads, and its settings."""

    command: str
    config: Config
    adapter: ModelAdapter | None
    """What the model will be; None for a workload of the user's own, which may read anything."""
    agents: tuple[str, ...]
    """Those that search or, where the command does not, that would."""

    @property
    def foreign(self) -> bool:
        """Whether an agent from outside of the package searches, which may read anything; an unknown name is not
        refused here."""
        return any(name not in AGENTS or AGENTS[name].own is not None for name in self.agents)

    @property
    def foreign_recovery(self) -> bool:
        """Whether a recovery step or an importance from outside of the package takes part; it may read anything."""
        steps = any(is_foreign(RECOVERY_STEPS.source(step)) for step in self.config.recovery.steps)
        return steps or is_foreign(IMPORTANCES.source(self.config.prune.importance))

    @property
    def modes(self) -> set[str]:
        """Modes that PPO searches in here; none without PPO."""
        modes = {self.config.search.mode} if "ppo" in self.agents else set()
        return modes | ({"direct"} if "ppo_stages" in self.agents else set())

    @property
    def tuned(self) -> bool:
        """Whether the final fine-tune has any length."""
        if self.command not in ("train", "benchmark"):
            return True
        finish, rounds = self.config.finish, self.config.rounds
        if rounds.count > 1 and rounds.epochs + rounds.steps > 0:
            return True
        if self.adapter is None:
            return finish.epochs + finish.steps > 0
        return self.adapter.fine_tune_length(finish)[0] > 0


@dataclass(frozen=True)
class Rule:
    """Settings and when they are used.

    ``choices`` are the settings that decide it with the command; None where the command alone does, and then only
    what is typed on the command line is refused: a file serves several commands. A file's setting is not refused
    either where one of the choices was overridden, on the command line or by ``Config.override``.
    """

    settings: tuple[str, ...]
    used: Callable[[Run], bool]
    reason: str
    instead: str
    choices: tuple[str, ...] | None = None


def _by(*commands: str) -> Callable[[Run], bool]:
    return lambda run: run.command in commands


def _not_by(*commands: str) -> Callable[[Run], bool]:
    return lambda run: run.command not in commands


def _by_adapters() -> Iterator[Rule]:
    """What the models of only some wings have, as their adapters say it."""
    for adapter in adapters():
        for setting, (reason, instead) in adapter.unread.items():
            used = partial(_read_by_others, wing=adapter.wing, setting=setting)
            yield Rule((setting,), used, reason, instead, ("model.name", "workload"))


def _read_by_others(run: Run, wing: str, setting: str) -> bool:
    if setting == "finish.steps" and run.command == "prune --stages":
        return True  # which trains any model by steps
    return run.adapter is None or run.adapter.wing != wing


def _section(name: str) -> Rule:
    """The settings of one agent."""
    readers = {name, "ppo_stages"} if name == "ppo" else {name}
    return Rule(
        (f"search.{name}.*",),
        lambda run: run.foreign or not readers.isdisjoint(run.agents),
        "{agents}",
        f"give search.agent={name}, or --methods {name} of `rlprune benchmark`",
    )


RULES = (
    # What a command does at all.
    Rule(("rounds.*",), _by("train"), "{command} prunes once", "`rlprune train` uses it"),
    Rule(("search.*",), _by(*SEARCHING), "{command} does no search",
         "`rlprune train`, `benchmark` and `apply --refine` use it"),
    Rule(("search.baselines", "search.checkpoints", "search.model_seeds", "search.tensorboard",
          "search.trackers"), _by("train"),
         "{command} does not look at it", "`rlprune train` uses it"),
    Rule(("search.evaluations",), _not_by("apply --refine"), "--refine is the number of evaluations",
         "`rlprune train` and `benchmark` use it"),
    Rule(("search.base_rule",), _not_by("apply --refine"), "the policy's own base rule is taken",
         "`rlprune train` and `benchmark` use it"),
    *(_section(name) for name in ("ppo", "ppo_sequential", "ppo_stages", "amc", "sb3", "cma_es", "tpe", "gp",
                                  "evopress", "evopress_drop", "eagleeye", "fastnas", "rl_pruner",
                                  "rl_pruner_published", "bypass", "bypass_published", "compresso")),
    Rule(("search.mode", "search.batch", "search.ahead"), lambda run: run.foreign or "ppo" in run.agents,
         "{agents}", "give search.agent=ppo, or --methods ppo of `rlprune benchmark`"),
    Rule(("search.environments",), lambda run: run.foreign or not set(SEVERAL).isdisjoint(run.agents),
         "{agents}", f"give search.agent=amc, or another of {', '.join(SEVERAL)}"),
    Rule(tuple(f"finish.{name}" for name in FinishConfig.hints if name != "dtype"), _by(*TUNING),
         "{command} does no fine-tune", "`rlprune train`, `benchmark`, `fidelity` and `prune --stages` use it"),
    Rule(("finish.dtype",), _not_by("inspect", "evaluate", "export", "benchmark", "fidelity"),
         "{command} saves no pruned model", "the commands that save one use it"),
    Rule(("finish.start",), _by("train", "benchmark"), "{command} trains what it has recovered",
         "`rlprune train` and `benchmark` use it"),
    Rule(("finish.start",), lambda run: not {"bias", "reconstruct"}.isdisjoint(run.config.recovery.steps),
         "recovery.steps has no closed form", "add reconstruct", ("recovery.steps",)),
    Rule(("finish.candidates", "finish.choice"), _by("train", "benchmark"), "{command} chooses no winner",
         "`rlprune train` and `benchmark` use it"),
    Rule(("finish.candidates", "finish.choice"), lambda run: run.command != "train" or not takes_own_choice(run.config),
         "the agent's own plan is final", "give search.starts=rules and rounds.count=1",
         ("search.starts", "rounds.count")),
    Rule(("finish.rules",), _by("train"), "{command} does not look at it", "`rlprune train` uses it"),
    Rule(("finish.steps",), _not_by("prune --steps"), "--steps is the number of steps", "leave one of them out"),
    Rule(("finish.epochs",), _not_by("prune --stages", "prune --steps"), "rounds are trained by steps",
         "give finish.steps or --steps"),
    Rule(tuple(f"finish.{name}" for name in ("choice", "start", "method", "adapters", "rank", "alpha", "dropout", "lr",
                                             "batch_size", "weight_decay", "momentum", "distill", "temperature",
                                             "soft", "schedule", "warmup", "mixed_precision")),
         lambda run: run.tuned, "the final fine-tune has no length",
         "give finish.epochs, or finish.steps of a language model"),
    Rule(("score.*",), _not_by(*LOOKING, "prune --stages", "prune --steps"), "{command} scores no candidate",
         "`rlprune train`, `benchmark` and `fidelity` use it"),
    Rule(("score.rungs",), _by(*SEARCHING), "{command} does no search",
         "`rlprune train`, `benchmark` and `apply --refine` use it"),
    Rule(("score.unlabelled",), _not_by("fidelity"), "{command} compares halves of the validation split",
         "`rlprune train`, `benchmark` and `apply --refine` use it"),
    Rule(("score.unlabelled",), lambda run: run.foreign or run.config.score.kind == "kl",
         "only of score.kind kl is it known that it needs no labels", "give score.kind=kl", ("score.kind",)),
    Rule(("recovery.*",), _not_by(*LOOKING), "{command} recovers nothing", "the commands that prune use it"),
    Rule(("recovery.finetune_steps", "recovery.finetune_lr", "recovery.distill"),
         _not_by("prune --stages", "prune --steps"), "the training of each round takes the place of `finetune`",
         "give --steps"),
    Rule(("prune.importance",), _not_by(*LOOKING), "{command} ranks no units", "the commands that prune use it"),
    Rule(("prune.*",), _not_by("evaluate", "export"), "{command} cuts nothing", "the commands that prune use it"),
    Rule(("budget.*",), _not_by("evaluate", "export", "tune"), "{command} has no budget",
         "the commands that prune use it"),
    Rule(("model.train.*",), _not_by("inspect"), "{command} trains nothing", "the commands that prune use it"),
    Rule(("seed",), _not_by("inspect", "evaluate", "export"), "nothing in {command} is random",
         "model.seed and data.seed are others"),
    Rule(("execution.*",), _by(*SEARCHING, "fidelity"), "{command} computes in this process alone",
         "`rlprune train`, `benchmark`, `fidelity` and `apply --refine` use it"),
    # What the other settings leave of use.
    Rule(("rounds.epochs", "rounds.steps", "rounds.schedule", "rounds.cut"), lambda run: run.config.rounds.count > 1,
         "rounds.count is 1", "give it", ("rounds.count",)),
    Rule(("execution.workers",), lambda run: run.config.execution.engine != "serial",
         "execution.engine is serial", "give execution.engine=processes", ("execution.engine",)),
    Rule(("execution.address",), lambda run: run.config.execution.engine == "ray",
         "execution.engine is not ray", "give execution.engine=ray", ("execution.engine",)),
    Rule(("search.stages",), lambda run: run.foreign or ("ppo" in run.agents and run.config.search.mode == "direct"),
         "only the agent ppo in search.mode=direct prunes in stages",
         "give search.mode=direct with it, or the agent ppo_stages",
         ("search.agent", "search.mode", "search.baselines")),
    Rule(("search.ppo.n_steps", "search.ppo.batch_size", "search.ppo.n_epochs"),
         lambda run: run.foreign or not run.modes or "direct" in run.modes, "search.mode is surrogate",
         "give search.mode=direct", ("search.agent", "search.mode", "search.baselines")),
    Rule(("search.ppo.kappa", "search.ppo.surrogate*", "search.batch", "search.ahead"),
         lambda run: run.foreign or not run.modes or "surrogate" in run.modes, "search.mode is direct",
         "give search.mode=surrogate", ("search.agent", "search.mode", "search.baselines")),
    Rule(("recovery.finetune_lr", "recovery.distill"),
         lambda run: "finetune" in run.config.recovery.steps or run.command == "fidelity",
         "recovery.steps is without finetune", "add it, and recovery.finetune_steps", ("recovery.steps",)),
    Rule(("recovery.statistics",), lambda run: "bn" in run.config.recovery.steps or run.command == "fidelity",
         "recovery.steps is without bn", "add it", ("recovery.steps",)),
    Rule(("recovery.ridge",),
         lambda run: "reconstruct" in run.config.recovery.steps or run.command == "fidelity" or run.foreign_recovery
         or run.config.prune.importance in (AUTO, "obs", "obs_fisher"),
         "recovery.steps is without reconstruct", "add it", ("recovery.steps", "prune.importance")),
    Rule(("recovery.shrink", "recovery.spill"),
         lambda run: "reconstruct" in run.config.recovery.steps or run.command == "fidelity",
         "recovery.steps is without reconstruct", "add it", ("recovery.steps",)),
    Rule(("budget.batch_size", "budget.table"), lambda run: run.config.budget.metric == "latency",
         "budget.metric is not latency", "give budget.metric=latency", ("budget.metric",)),
    Rule(("model.train.*",), lambda run: run.adapter is None or run.config.model.train.epochs > 0,
         "model.train.epochs is 0", "give it", ("model.train.epochs", "workload")),
    Rule(("data.augment",), lambda run: run.adapter is None or run.config.data.train_transform is None,
         "data.train_transform takes its place", "leave one of them out", ("data.train_transform",)),
    Rule(("finish.temperature", "finish.soft"), lambda run: run.config.finish.distill, "finish.distill is false",
         "give finish.distill=true", ("finish.distill",)),
    Rule(("finish.dropout",), lambda run: run.config.finish.method == "lora",
         "finish.method is not lora", "give finish.method=lora", ("finish.method",)),
    Rule(("finish.rank", "finish.alpha", "finish.adapters"), lambda run: run.config.finish.method != "full",
         "finish.method is full", "give another finish.method", ("finish.method",)),
)  # fmt: skip
"""In the order in which they are looked at: the first that refuses a setting says why."""


def check_usage(
    config: Config, command: str, overrides: Sequence[str] = (), *, methods: Sequence[str] | None = None
) -> None:
    """Refuse a setting that is given and that nothing of what runs would use.

    Args:
        command: name of the command, with the option that changes what it reads: "prune --stages" (rounds of
            ``finish.steps``), "prune --steps" (rounds of a given length), "apply --refine", "tune".
        overrides: the ``a.b=c`` among the settings that were typed for this command. What they name has to be used by
            it; the other settings come from a file, or from Python, and need to be of use to some command.
        methods: the rules and agents of a benchmark; None for all.

    Raises ConfigError naming the setting, why it is not used, and what would use it.
    """
    search = config.search
    agents = (search.agent, *search.baselines)
    if command == "benchmark":
        agents = (
            tuple(AGENTS) if methods is None else tuple(name for name in methods if name not in PRUNING_RULES)
        )
    elif command == "apply --refine":
        agents = (search.agent,)
    run = Run(command, config, expected_adapter(config), agents)
    typed = {text.partition("=")[0].strip() for text in overrides}
    chosen = typed | config.overridden

    def named(path: str, among: Collection[str]) -> bool:
        return any(key == path or key.startswith(f"{path}.") for key in among)

    for setting in settings_reference():
        if reduce(getattr, setting.path.split("."), config) == setting.default:
            continue
        for rule in (*RULES, *_by_adapters()):
            asked = named(setting.path, typed) or (
                rule.choices is not None
                and (named(setting.path, config.overridden) or chosen.isdisjoint(rule.choices))
            )
            if asked and any(fnmatch(setting.path, p) for p in rule.settings) and not rule.used(run):
                raise ConfigError(_line(setting.path, rule, run))


def _line(path: str, rule: Rule, run: Run) -> str:
    name = "python -m rlprune.experiments.tune" if run.command == "tune" else f"rlprune {run.command}"
    names = ", ".join(dict.fromkeys(run.agents))
    agents = f"the agents here are {names}" if names else "no agent searches here"
    return f"{path}: {rule.reason}, so it is not used; {rule.instead}".format(
        command=repr(name),
        model=repr(run.config.model.name),
        agents=agents,
    )
