"""Settings of each agent that has some: one section below ``search.`` for each of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .settings import Section, setting


@dataclass(frozen=True)
class CMAESConfig(Section):
    """Settings of the agent `cma_es`."""

    prefix: ClassVar[str] = "search.cma_es."

    population: int | None = setting(
        None, "Plans of a generation; null for 4 + 3 ln(groups), rounded down.", low=3
    )
    bound: float = setting(
        0.5, "Largest action of a group, in the units of the environment's box.", above=0, high=1
    )
    lr_adapt: bool = setting(False, "Whether the learning rate follows the noise of the scores.")


@dataclass(frozen=True)
class TPEConfig(Section):
    """Settings of the agent `tpe`."""

    prefix: ClassVar[str] = "search.tpe."

    startup: int = setting(10, "Plans, the starts included, before the estimator is asked.", low=1)
    bound: float = setting(
        0.5, "Largest action of a group, in the units of the environment's box.", above=0, high=1
    )
    candidates: int = setting(24, "Samples among which the best expected improvement is picked.", low=1)


@dataclass(frozen=True)
class GPConfig(Section):
    """Settings of the agent `gp`."""

    prefix: ClassVar[str] = "search.gp."

    startup: int = setting(10, "Plans, the starts included, before the process is asked.", low=1)
    bound: float = setting(
        0.5, "Largest action of a group, in the units of the environment's box.", above=0, high=1
    )
    transform: str = setting(
        "log",
        "What is modelled: `log`, minus the logarithm of the distance to the dense score; `none`, the score.",
        choices=("log", "none"),
    )


@dataclass(frozen=True)
class EvoPressConfig(Section):
    """Settings of the agent `evopress`."""

    prefix: ClassVar[str] = "search.evopress."

    offspring: int = setting(
        8, "Offspring of a generation; 32 in the paper, which has thousands of evaluations.", low=1
    )
    level: float = setting(
        0.06,
        "What one swap moves, as a share of an average group's part of the dense cost.",
        above=0,
        high=10,
    )
    swaps: int = setting(3, "Most swaps in an offspring; the lower of two draws from 1 to this.", low=1)


@dataclass(frozen=True)
class RLPrunerConfig(Section):
    """Settings of the agent `rl_pruner`."""

    prefix: ClassVar[str] = "search.rl_pruner."

    stages: int = setting(3, "Equal steps of cost from the dense model to the budget.", low=1)
    samples: int = setting(10, "Samples of a round.", low=1)
    noise: float = setting(0.04, "Standard deviation of the noise on the probabilities.", above=0, high=1)
    step: float = setting(0.1, "How far the probabilities go towards a round's best sample.", above=0, high=1)
    epsilon: float = setting(0.4, "Chance, at first, that a stage ends with any of its best.", low=0, high=1)
    start: str = setting(
        "rule",
        "First probabilities: `rule`, the units that the best start removes; `widths`, as published.",
        choices=("rule", "widths"),
    )


@dataclass(frozen=True)
class BypassConfig(Section):
    """Settings of the agent `bypass`."""

    prefix: ClassVar[str] = "search.bypass."

    masks: int = setting(2, "Masks sampled for a step.", low=2)
    lr: float = setting(0.05, "Learning rate of Adam; it falls to zero by a cosine.", above=0, high=1)
    start: str = setting(
        "rule",
        "First keep probabilities: `rule`, those of the best start; `importance`, from the units' scores; `uniform`.",
        choices=("rule", "importance", "uniform"),
    )
