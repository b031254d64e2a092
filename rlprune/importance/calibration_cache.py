"""What is measured once of a model on its calibration split, for importances, rules and the recovery together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn

from ..config.training import RecoveryConfig
from ..errors import ConfigError, DataError
from ..pruning.space import PruningSpace
from ..utils.pytrees import Inputs, Nest
from .unit_scores import Batch, Floats, Scores

Measured = TypeVar("Measured")
Curves = dict[int, Floats]
"""{group: expected divergence from the dense model when 0, 1, ..., all units are gone, (width + 1,)}."""
CURVES = "fisher"
"""The name that they are kept under: that of the rule which measures them where no importance has."""


class CalibrationSource(Protocol):
    """Who gives calibration data and the loss: a workload."""

    def batches(self, split: str, limit: int | None = None) -> Iterator[Batch]: ...
    def loss(self, outputs: Nest, targets: Nest) -> Tensor: ...
    def loss_of(self, outputs: Nest, targets: Nest) -> Tensor: ...
    def outputs_for_loss(self, model: nn.Module, inputs: Inputs, targets: Nest) -> Any: ...
    def drawn_loss(
        self, model: nn.Module, inputs: Inputs, targets: Nest, generator: torch.Generator
    ) -> Tensor: ...
    def unlabelled_loss(
        self, model: nn.Module, inputs: Inputs, generator: torch.Generator
    ) -> Tensor | None: ...


class CalibrationCache:
    """Measurements of one model on the calibration split; each is made when it is first asked for.

    Wings add measurements of their own as methods of a subclass; what a rule of anybody's measures is kept under the
    rule's name by :meth:`cached`.

    Args:
        source: gives the batches and the loss; None where there are no data.
        limit: calibration samples that importances read; None for all.
        ridge: relative penalty of importances that solve regressions.
        recovery_limit: calibration samples that the recovery reads; None for all.
        recovery: the recovery that will follow, for which an importance may leave what it measures on its way; None
            where none is known.
    """

    def __init__(
        self,
        source: CalibrationSource | None,
        space: PruningSpace,
        model: nn.Module,
        *,
        seed: int = 0,
        limit: int | None = None,
        ridge: float = 1e-3,
        recovery_limit: int | None = None,
        recovery: RecoveryConfig | None = None,
    ) -> None:
        self.space, self.model, self.seed = space, model, seed
        self.limit, self.ridge, self.recovery_limit = limit, ridge, recovery_limit
        self.recovery = recovery
        self._source = source
        self._measured: dict[str, object] = {}

    @property
    def source(self) -> CalibrationSource:
        """Who gives the data; DataError where there is nobody."""
        if self._source is None:
            raise DataError("calibration: needs a workload, which gives the data; give Context(workload=...)")
        return self._source

    def batches(self, limit: int | None = None) -> Iterator[Batch]:
        """Batches (inputs, targets) of the calibration split: the first ``limit`` samples, None for all."""
        return self.source.batches("calibration", limit)

    def cached(self, name: str, make: Callable[[], Measured]) -> Measured:
        """``make()``, once under each name."""
        if name not in self._measured:
            self._measured[name] = make()
        return cast("Measured", self._measured[name])

    def keep(self, name: str, value: object) -> None:
        """Take what an importance measured on its way and a rule can use."""
        self._measured[name] = value

    def known(self, name: str) -> bool:
        """Whether something has been measured under a name."""
        return name in self._measured

    def release(self, name: str) -> None:
        """Free what was kept under a name."""
        self._measured.pop(name, None)

    def ranked_by_divergence(self) -> tuple[Scores, Curves]:
        """Places of the units in the order in which they should go, and the expected divergence of every width.

        The importance `obs_fisher`; ConfigError where nothing is expected of such models.
        """
        raise ConfigError("prune.importance: 'obs_fisher' is not known for such a model")

    def divergence_curves(self, importance: Sequence[Floats]) -> Curves:
        """The expected divergence of every width, for the rule `fisher`, measured once; ConfigError as above.

        Args:
            importance: G arrays of unit scores by which plans keep units, where the order in which they go matters.
        """
        raise ConfigError("the rule 'fisher' is not known for such a model")

    @property
    def curves(self) -> Curves | None:
        """Expected divergences of every width, once an importance or a rule has measured them."""
        return cast("Curves | None", self._measured.get(CURVES))

    @property
    def names(self) -> frozenset[str]:
        """The names of everything that has been measured."""
        return frozenset(self._measured)
