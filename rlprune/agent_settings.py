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
    lr_adapt: bool = setting(False, "Whether the learning rate follows the noise of the scores.")


@dataclass(frozen=True)
class TPEConfig(Section):
    """Settings of the agent `tpe`."""

    prefix: ClassVar[str] = "search.tpe."

    startup: int = setting(10, "Plans, the starts included, before the estimator is asked.", low=1)
    candidates: int = setting(24, "Samples among which the best expected improvement is picked.", low=1)


@dataclass(frozen=True)
class GPConfig(Section):
    """Settings of the agent `gp`."""

    prefix: ClassVar[str] = "search.gp."

    startup: int = setting(10, "Plans, the starts included, before the process is asked.", low=1)
    transform: str = setting(
        "log",
        "What is modelled: `log`, minus the logarithm of the distance to the dense score; `none`, the score.",
        choices=("log", "none"),
    )
