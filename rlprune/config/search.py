"""Settings of the search and of each agent that has some: one section below ``search.`` for each of them."""

from __future__ import annotations

from typing import Any, ClassVar

from ..errors import ConfigError
from .names import TRACKER_NAMES
from .schema import Section, section, setting, show

# Those whose actions may be a box of numbers; DQN and the like choose among a few.
SB3_ALGORITHMS = ("A2C", "DDPG", "PPO", "SAC", "TD3")
CONTRIB_ALGORITHMS = ("ARS", "CrossQ", "RecurrentPPO", "TQC", "TRPO")


@section
class PPOConfig(Section):
    """Settings of the PPO agent; the names are those of stable-baselines3 where it has one."""

    prefix: ClassVar[str] = "search.ppo."

    learning_rate: float = setting(3e-3, "Learning rate of Adam.", above=0, high=1)
    n_steps: int = setting(
        16, "Mode direct: steps of one environment between two updates.", low=2, high=100_000
    )
    batch_size: int = setting(16, "Transitions in a minibatch.", low=2, high=1_000_000)
    n_epochs: int = setting(8, "Passes over a rollout.", low=1)
    gamma: float = setting(
        1.0, "Discount; 1, because the stages' rewards add up to the final score.", above=0, high=1
    )
    gae_lambda: float = setting(0.95, "Lambda of the generalised advantage estimate.", low=0, high=1)
    clip_range: float = setting(0.2, "Clipping range of the policy ratio.", above=0, high=1)
    ent_coef: float = setting(0.0, "Weight of the entropy bonus.", low=0)
    vf_coef: float = setting(0.5, "Weight of the value loss.", low=0)
    max_grad_norm: float = setting(0.5, "Largest norm of a gradient.", above=0)
    log_std_init: float | None = setting(
        None,
        "Logarithm of the initial standard deviation of an action; null for -1 in mode surrogate and -2 in direct.",
        low=-5,
        high=1,
    )
    hidden: int = setting(64, "Units of the policy's hidden layers.", low=4, high=4_096)
    group_bias: bool = setting(
        True, "Whether each group gets a bias of its own; it is left out of the saved policy."
    )
    kappa: float = setting(0.5, "Surrogate mode: reward = mean + kappa * standard deviation.", low=0)
    surrogate: str = setting(
        "logits",
        "Surrogate mode: what is modelled, `logits` of the scored plans (where `score.kind` is `kl` and there are no "
        "`score.rungs`; elsewhere it is the scores) or `scores`.",
        choices=("logits", "scores"),
    )
    surrogate_steps: int = setting(
        1024,
        "Surrogate mode: steps on the surrogate for each `search.batch` evaluations; 0 leaves the policy untrained.",
        low=0,
    )
    surrogate_envs: int = setting(
        64, "Surrogate mode: surrogate environments stepped together.", low=1, high=65_536
    )


@section
class AMCConfig(Section):
    """AMC (He et al., arXiv 1802.03494): DDPG, one group a step. Defaults are those of the authors' code."""

    prefix: ClassVar[str] = "search.amc."

    warmup: int | None = setting(
        None,
        "Episodes of uniformly random actions before DDPG learns; null for a quarter of the evaluations (the "
        "paper: 100 of 400).",
        low=1,
    )
    noise: float = setting(
        0.5,
        "Standard deviation of the truncated normal noise after the warm-up, as a share of the action's range.",
        above=0,
        high=10,
    )
    noise_decay: float = setting(
        0.95,
        "Factor of the noise after every 400th part of the evaluations (the paper has 400 episodes).",
        above=0,
        high=1,
    )
    actor_learning_rate: float = setting(1e-4, "Learning rate of the actor.", above=0, high=1)
    critic_learning_rate: float = setting(1e-3, "Learning rate of the critic.", above=0, high=1)
    batch_size: int = setting(64, "Transitions in a minibatch.", low=2, high=1_000_000)
    buffer_episodes: int = setting(100, "Episodes that the replay buffer holds.", low=1, high=1_000_000)
    tau: float = setting(0.01, "Share of the networks that the target networks take over.", above=0, high=1)
    gamma: float = setting(1.0, "Discount.", above=0, high=1)
    baseline: float = setting(
        0.5,
        "Share of a minibatch's mean reward in the moving average that rewards are reduced by; 0 for none.",
        low=0,
        high=1,
    )
    hidden: int = setting(300, "Units of the two hidden layers of actor and critic.", low=4, high=4_096)


@section
class SequentialPPOConfig(Section):
    """PPO that decides one group a step; the names are those of stable-baselines3 where it has one."""

    prefix: ClassVar[str] = "search.ppo_sequential."

    learning_rate: float = setting(1e-3, "Learning rate of Adam.", above=0, high=1)
    episodes: int = setting(8, "Episodes (one evaluation each) between two updates.", low=1)
    batch_size: int = setting(32, "Transitions in a minibatch.", low=2, high=1_000_000)
    n_epochs: int = setting(10, "Passes over a rollout.", low=1)
    gamma: float = setting(1.0, "Discount; 1, because only the last step pays.", above=0, high=1)
    gae_lambda: float = setting(0.95, "Lambda of the generalised advantage estimate.", low=0, high=1)
    clip_range: float = setting(0.2, "Clipping range of the policy ratio.", above=0, high=1)
    ent_coef: float = setting(0.0, "Weight of the entropy bonus.", low=0)
    log_std_init: float = setting(
        -0.5, "Logarithm of the initial standard deviation of an action.", low=-5, high=1
    )
    hidden: int = setting(64, "Units of the two hidden layers of actor and critic.", low=4, high=4_096)


@section
class StagedPPOConfig(Section):
    """PPO on the whole distribution, pruned in stages; all else as in search.ppo."""

    prefix: ClassVar[str] = "search.ppo_stages."

    stages: int = setting(2, "Stages of an episode; each of them is an evaluation.", low=2, high=1_000)


@section
class SB3Config(Section):
    """The agent `sb3`: any algorithm of stable-baselines3, or of sb3-contrib, for numbers as actions."""

    prefix: ClassVar[str] = "search.sb3."

    algorithm: str = setting(
        "SAC",
        "Name of the algorithm's class; the last five need sb3-contrib (extra `contrib`).",
        choices=(*SB3_ALGORITHMS, *CONTRIB_ALGORITHMS),
    )
    arguments: dict[str, Any] = setting(dict, "Keyword arguments of that class, over this agent's defaults.")
    noise: float = setting(
        0.3, "Standard deviation of the noise that DDPG and TD3 add to their actions.", low=0, high=2
    )


@section
class CMAESConfig(Section):
    """Settings of the agent `cma_es`."""

    prefix: ClassVar[str] = "search.cma_es."

    population: int | None = setting(
        None,
        "Plans of a generation; null for 4 + 3 ln(groups), rounded down.",
        low=3,
        high=100_000,
    )
    bound: float = setting(
        0.5, "Largest action of a group, in the units of the environment's box.", above=0, high=1
    )
    lr_adapt: bool = setting(False, "Whether the learning rate follows the noise of the scores.")


@section
class TPEConfig(Section):
    """Settings of the agent `tpe`."""

    prefix: ClassVar[str] = "search.tpe."

    startup: int = setting(
        10, "Plans, the starts included, before the estimator is asked.", low=1, high=1_000_000
    )
    bound: float = setting(
        0.5, "Largest action of a group, in the units of the environment's box.", above=0, high=1
    )
    candidates: int = setting(
        24, "Samples among which the best expected improvement is picked.", low=1, high=1_000_000
    )


@section
class GPConfig(Section):
    """Settings of the agent `gp`."""

    prefix: ClassVar[str] = "search.gp."

    startup: int = setting(
        10, "Plans, the starts included, before the process is asked.", low=1, high=1_000_000
    )
    bound: float = setting(
        0.5, "Largest action of a group, in the units of the environment's box.", above=0, high=1
    )
    transform: str = setting(
        "log",
        "What is modelled: `log`, minus the logarithm of the distance to the dense score; `none`, the score.",
        choices=("log", "none"),
    )


@section
class EvoPressConfig(Section):
    """Settings of the agent `evopress`."""

    prefix: ClassVar[str] = "search.evopress."

    offspring: int = setting(
        8,
        "Offspring of a generation; 32 in the paper, which has thousands of evaluations.",
        low=1,
        high=100_000,
    )
    level: float = setting(
        0.06,
        "What one swap moves, as a share of an average group's part of the dense cost.",
        above=0,
        high=10,
    )
    swaps: int = setting(
        3, "Most swaps in an offspring; the lower of two draws from 1 to this.", low=1, high=10_000
    )


@section
class EvoPressDropConfig(Section):
    """Settings of the agent `evopress_drop`; defaults are those of the authors' scripts."""

    prefix: ClassVar[str] = "search.evopress_drop."

    initial: int = setting(64, "Random plans of which the best is the first parent.", low=1, high=100_000)
    offspring: int = setting(32, "Offspring of a generation.", low=1, high=100_000)
    mutations: int = setting(
        3, "Most exchanges in an offspring; the lower of two draws from 1 to this.", low=1, high=10_000
    )


@section
class EagleEyeConfig(Section):
    """Settings of the agent `eagleeye`; defaults are those of the authors' code."""

    prefix: ClassVar[str] = "search.eagleeye."

    min_rate: float = setting(0.0, "Smallest share that a group loses.", low=0, high=1)
    max_rate: float = setting(0.7, "Width of the range of shares that a group loses.", above=0, high=1)
    tolerance: float = setting(
        0.005, "Half of the window of accepted costs, as a share of the dense cost.", above=0, high=1
    )


@section
class FastNASConfig(Section):
    """Settings of the agent `fastnas`, the names those of ModelOpt."""

    prefix: ClassVar[str] = "search.fastnas."

    ratios: int | None = setting(
        None,
        "Widths of a layer that are choices: 1/ratios, 2/ratios, ... of its channels (ModelOpt: 20); null: chosen, "
        "with the divisor, so that as many scores are asked for as the evaluations allow.",
        low=2,
        high=1_000,
    )
    channel_divisor: int | None = setting(
        None,
        "What the choices are multiples of (ModelOpt: 32); null: chosen with the ratios, a power of two up to 32.",
        low=1,
        high=65_536,
    )


@section
class RLPrunerConfig(Section):
    """Settings of the agent `rl_pruner`."""

    prefix: ClassVar[str] = "search.rl_pruner."

    stages: int = setting(3, "Equal steps of cost from the dense model to the budget.", low=1, high=1_000)
    samples: int = setting(10, "Samples of a round.", low=1, high=100_000)
    noise: float = setting(0.04, "Standard deviation of the noise on the probabilities.", above=0, high=1)
    step: float = setting(0.1, "How far the probabilities go towards a round's best sample.", above=0, high=1)
    epsilon: float = setting(0.4, "Chance, at first, that a stage ends with any of its best.", low=0, high=1)
    start: str = setting(
        "rule",
        "First probabilities: `rule`, the units that the best start removes; `widths`, as published.",
        choices=("rule", "widths"),
    )


@section
class RLPrunerPublishedConfig(Section):
    """Settings of the agent `rl_pruner_published`; defaults are those of the authors' code."""

    prefix: ClassVar[str] = "search.rl_pruner_published."

    batches: int = setting(10, "Batches of samples in a stage.", low=1, high=100_000)
    samples: int = setting(10, "Samples of a batch, and places in the buffer.", low=1, high=100_000)
    noise: float = setting(0.04, "Standard deviation of the noise on the probabilities.", above=0, high=1)
    step: float = setting(0.1, "How far the probabilities go towards the best sample.", above=0, high=1)
    clip: float = setting(0.25, "Largest change of a probability, as a share of it.", above=0, high=1)
    epsilon: float = setting(0.4, "Chance, at first, that a stage ends with any of its best.", low=0, high=1)
    fall: float = setting(
        0.1, "Relative fall of the score after which a stage is sampled anew.", low=0, high=1
    )
    flops_weight: float = setting(0.0, "Weight in Q of the share of the FLOPs that is gone.", low=0)
    params_weight: float = setting(0.0, "Weight in Q of the share of the parameters that is gone.", low=0)


@section
class BypassConfig(Section):
    """Settings of the agent `bypass`."""

    prefix: ClassVar[str] = "search.bypass."

    masks: int = setting(2, "Masks sampled for a step.", low=2, high=10_000)
    lr: float = setting(0.05, "Learning rate of Adam; it falls to zero by a cosine.", above=0, high=1)
    start: str = setting(
        "rule",
        "First keep probabilities: `rule`, those of the best start; `importance`, from the units' scores; `uniform`.",
        choices=("rule", "importance", "uniform"),
    )


@section
class BypassPublishedConfig(Section):
    """Settings of the agent `bypass_published`; defaults are those of the authors' scripts."""

    prefix: ClassVar[str] = "search.bypass_published."

    steps: int = setting(15_000, "Steps, each on a minibatch of its own.", low=1)
    batch_size: int = setting(8, "Sequences of the train split in a minibatch.", low=1, high=1_000_000)
    masks: int = setting(2, "Masks sampled for a step.", low=2, high=10_000)
    lr: float = setting(2e-3, "Rate of the gradient descent; it falls to zero by a cosine.", above=0, high=1)
    window: int = setting(5, "The present loss has one part of so many in the average.", low=1)


@section
class CompressoConfig(Section):
    """Settings of the agent `compresso`; defaults are those of the authors' scripts."""

    prefix: ClassVar[str] = "search.compresso."

    steps: int = setting(
        416_016, "Steps, each on a minibatch of its own; the authors' 8 epochs of 52,002 examples.", low=1
    )
    batch_size: int = setting(1, "Sequences of the train split in a minibatch.", low=1, high=1_000_000)
    alone: float = setting(
        0.125, "Share of the steps, the first ones, that train the adapters alone.", low=0, high=0.99
    )
    rise: float = setting(
        0.5, "Share of the steps, after those, in which the target rises to the budget.", low=0, high=1
    )
    lr: float = setting(5e-5, "Learning rate of the adapters; it falls to zero in a line.", above=0, high=1)
    mask_lr: float = setting(0.1, "Learning rate of masks and multipliers.", above=0, high=10)
    rank: int = setting(8, "Rank of the adapters.", low=1, high=65_536)
    alpha: float = setting(8.0, "Scale of the adapters is alpha / rank.", above=0)
    adapters: str = setting(
        "query_value", "What the adapters are on; see finish.adapters.", choices=("all", "query_value")
    )
    drop_rate: float = setting(
        0.01, "Where the masks of neurons begin: the logit of one minus this.", above=0, high=0.5
    )


@section
class SearchConfig(Section):
    """The search for the best distribution."""

    prefix: ClassVar[str] = "search."

    agent: str = setting("ppo", "Who searches; see `rlprune list agents`.")
    mode: str = setting(
        "surrogate",
        "`direct`: every PPO step is a real evaluation; `surrogate`: most steps are taken on a fitted model.",
        choices=("surrogate", "direct"),
    )
    evaluations: int = setting(300, "Distinct plans that the agent may have scored.", low=1, high=1_000_000)
    stages: int = setting(
        1, "Prune and recover in this many stages an episode (incremental pruning).", low=1, high=1_000
    )
    base_rule: str = setting(
        "auto",
        "Rule that action 0 stands for; `auto` takes the best-scoring rule that probes nothing, and for image models "
        "uniform where the policy learns a range of budgets or several checkpoints.",
    )
    starts: str = setting(
        "rules",
        "What a search begins with: `rules`, uniform and the rules that are worth it; `none`: nothing, no rule stands "
        "next to the agent, and the plan that it ends with is final.",
        choices=("rules", "none"),
    )
    baselines: tuple[str, ...] = setting(("random",), "Agents to compare it with, at as many evaluations.")
    batch: int = setting(
        20,
        "Surrogate mode: real evaluations between two fits; 6 a model at most where logits are modelled.",
        low=1,
    )
    ahead: int = setting(
        0,
        "Surrogate mode: batches, half as large then, that are being scored while the next one is chosen, so that "
        "workers are not idle; 0 waits for each.",
        low=0,
        high=1_000,
    )
    environments: int = setting(
        1,
        "Agents of stable-baselines3 that score one plan an episode, and optuna's: plans that are proposed before the "
        "scores of the others are known, so that workers score them at the same time.",
        low=1,
        high=10_000,
    )
    checkpoints: tuple[str, ...] = setting(
        (), "Further checkpoints of the model that the policy is trained on."
    )
    model_seeds: tuple[int, ...] = setting(
        (), "Further dense models, trained with these seeds, that the policy is trained on.", low=0
    )
    budget_range: tuple[float, ...] = setting(
        (),
        "Lowest and highest budget ratio drawn for an episode; empty for budget.target only.",
        above=0,
        high=1,
    )
    tensorboard: bool = setting(False, "Whether curves are written to RUN/tensorboard (extra `tensorboard`).")
    trackers: tuple[str, ...] = setting(
        (), "Trackers that are told of the run, each with the extra of its name.", choices=TRACKER_NAMES
    )
    ppo: PPOConfig = setting(PPOConfig, "Settings of PPO.")
    ppo_sequential: SequentialPPOConfig = setting(SequentialPPOConfig, "Settings of PPO, one group a step.")
    ppo_stages: StagedPPOConfig = setting(StagedPPOConfig, "Settings of PPO in stages.")
    amc: AMCConfig = setting(AMCConfig, "Settings of AMC.")
    sb3: SB3Config = setting(SB3Config, "Another algorithm of stable-baselines3.")
    cma_es: CMAESConfig = setting(CMAESConfig, "Settings of CMA-ES.")
    tpe: TPEConfig = setting(TPEConfig, "Settings of TPE.")
    gp: GPConfig = setting(GPConfig, "Settings of Gaussian-process optimisation.")
    evopress: EvoPressConfig = setting(EvoPressConfig, "Settings of EvoPress-style evolution.")
    evopress_drop: EvoPressDropConfig = setting(EvoPressDropConfig, "Settings of EvoPress for depth.")
    eagleeye: EagleEyeConfig = setting(EagleEyeConfig, "Settings of EagleEye.")
    fastnas: FastNASConfig = setting(FastNASConfig, "Settings of ModelOpt's FastNAS.")
    rl_pruner: RLPrunerConfig = setting(RLPrunerConfig, "Settings of RL-Pruner.")
    rl_pruner_published: RLPrunerPublishedConfig = setting(
        RLPrunerPublishedConfig, "Settings of RL-Pruner as published."
    )
    bypass_published: BypassPublishedConfig = setting(
        BypassPublishedConfig, "Settings of Bypass back-propagation as published."
    )
    bypass: BypassConfig = setting(BypassConfig, "Settings of Bypass back-propagation.")
    compresso: CompressoConfig = setting(CompressoConfig, "Settings of Compresso.")

    def __post_init__(self) -> None:
        if self.budget_range and (len(self.budget_range) != 2 or self.budget_range[0] > self.budget_range[1]):
            raise ConfigError(
                f"search.budget_range: expected two ratios, lower first, got {show(list(self.budget_range))}"
            )
