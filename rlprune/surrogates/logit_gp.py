"""What a plan is expected to cost, from the logits of other plans instead of their scores.

A Gaussian process over the widths, the same for every logit, tells the logits of any other plan, and from those its
divergence from the dense model. A search knows the logits (of a language model: the log-probabilities of likely tokens)
of the plans that it has scored; on a new checkpoint a few plans are built for the logits of unlabelled images, without
a label and without the validation split. (Bayesian
optimisation of composite functions, Astudillo & Frazier 2019, arXiv 1906.01537: logits are nearly additive over the
groups where their divergence is not, and every build tells thousands of them instead of one score.)

Shape legend: P plans, K known plans (the dense model first), G groups, N images, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from ..pruning.history import PlanLike, Widths, as_widths
from ..pruning.space import PruningSpace
from ..utils.arrays import Floats, Ints
from .divergence import Divergences
from .factor import Factor
from .kernels import Levels
from .logit_changes import Changes
from .logit_kernel import LogitKernel, adapted, first_scales

Build = Callable[[PlanLike], nn.Module]
"""Widths (G,) -> the cut and recovered model."""
# Images that are read: of the calibration and of the train split, and logits in all (which are kept for every build).
BATCH, MOST_LOGITS = 256, 2**18
# Steps of a fit of the hyperparameters at most: the first one, which starts anywhere, and later ones.
_FIRST_STEPS, _STEPS = 40, 20
# The hyperparameters are fitted again when this many times more plans are known, to so many of them at most: a step
# costs their number cubed. The predictions use all.
_GROWTH = 1.1
_FIT_PLANS = 400
_CHUNK = 64


class LogitGP:
    """Gaussian process of how the logits of some images change with the widths.

    The kernel, over the logarithms of the keep ratios, is a sum of one Matern 2.5 kernel a group (cuts do not know
    of each other) and one over all groups (they do).

    Args:
        widths: (G,) of the dense model.
        dense: its logits (N, ..., C) after the recovery that the plans get; float64 ones make a process in float64.
        reference: logits (N, ..., C) that divergences are measured from; ``dense`` where it is not given.
    """

    def __init__(self, widths: Ints, dense: Tensor, reference: Tensor | None = None) -> None:
        self._widths = np.asarray(widths, dtype=np.int64)
        self._shape = (-1, dense.shape[-1])
        wanted = dense if reference is None else reference
        self._dtype = dense.dtype if dense.dtype == torch.float64 else torch.float32
        self._divergences = Divergences(wanted.reshape(self._shape).to("cpu", self._dtype))
        self._dense, self._dense_shift = self._centred(dense)
        self.known: dict[Widths, float] = {}
        """The plans whose logits are known, and their divergences; the dense model aside."""
        self._rows = [self._ratios(self._widths[None])]
        self._changes = Changes(len(self._dense), dense.shape[-1], self._dtype)
        self._kernel = LogitKernel(first_scales(len(self._widths)))
        self._fitted = 0
        self._factor: Factor | None = None
        self._told: dict[bytes, tuple[float, float]] = {}

    def learn(self, widths: PlanLike, logits: Tensor) -> float:
        """Take in the logits (N, ..., C) of a plan (G,) and return its mean KL(reference || plan) in nats."""
        key = as_widths(widths)
        # What has diverged says no more than that it is far away.
        centred, shift = self._centred(torch.nan_to_num(logits, nan=0.0, posinf=1e3, neginf=-1e3))
        self.known[key] = float(self._divergences.of(centred[None])[0])
        self._rows.append(self._ratios(np.array([key])))
        self._changes.append(centred - self._dense, shift - self._dense_shift)
        return self.known[key]

    @property
    def state(self) -> list[float]:
        """What the next fit starts from: how many plans the kernel was adapted to, and its logarithms."""
        return [float(self._fitted), *self._kernel.scales.tolist()]

    @state.setter
    def state(self, value: Sequence[float]) -> None:
        self._fitted = int(value[0])
        self._kernel = LogitKernel(torch.tensor(value[1:], dtype=torch.float64))
        self._factor = None

    def best(self, count: int = 1) -> Ints:
        """The known plans (count, G) of the smallest divergence, the best first."""
        return np.array(sorted(self.known, key=self.known.__getitem__)[:count], dtype=np.int64)

    def fit(self, adapt: bool = True) -> None:
        """Condition on all that is known; ``adapt`` the kernel where that is much more than the last time."""
        self._x, self._y = torch.cat(self._rows), self._changes.rows
        gram = self._changes.gram()
        self._unit = max(float(gram.diagonal().mean()), 1e-12)
        self._told.clear()
        if adapt and len(self._x) >= _GROWTH * self._fitted:
            steps = _STEPS if self._fitted else _FIRST_STEPS
            self._fitted = len(self._x)
            some = torch.linspace(0, self._fitted - 1, min(self._fitted, _FIT_PLANS)).long()
            scales = adapted(self._kernel.scales, self._x[some], gram[some][:, some] / self._unit, steps)
            self._kernel, self._factor = LogitKernel(scales), None
        self._condition()

    def _condition(self) -> None:
        """Bring the factor to all known plans: at once those that the kernel was adapted to, the later ones in turn."""
        x, kernel = self._x, self._kernel
        if self._factor is None:
            first = x[: max(1, self._fitted)]
            self._factor = Factor(kernel(first, first), kernel.noise)
        self._factor.extend(len(x), lambda k: (kernel(x[:k], x[k : k + 1])[:, 0], kernel.own))

    def expected(self, widths: ArrayLike) -> tuple[Floats, Floats]:
        """Of plans (P, G): the divergence (P,) of the expected logits, and what their uncertainty adds to it (P,).

        Their sum is the divergence that is to be expected. What has been asked since the last fit is looked up.
        """
        plans = np.asarray(widths, dtype=np.int64)
        keys = [plan.tobytes() for plan in plans]
        new = {key: row for row, key in enumerate(keys) if key not in self._told}
        rows = list(new.values())
        parts = [self._chunk(plans[rows[i : i + _CHUNK]]) for i in range(0, len(rows), _CHUNK)]
        pairs = (
            pair for centre, added in parts for pair in zip(centre.tolist(), added.tolist(), strict=True)
        )
        self._told.update(zip(new, pairs, strict=True))
        found = np.array([self._told[key] for key in keys], dtype=np.float64).reshape(-1, 2)
        return found[:, 0], found[:, 1]

    def correlation(self, widths: ArrayLike) -> Floats:
        """How far what is not known of plans (P, G) is the same unknown: correlations (P, P) of their logits."""
        x = self._ratios(np.asarray(widths, dtype=np.int64))
        factor, levels = self._conditioned, Levels.of(x)
        half = factor.half(self._kernel(self._x, x, levels))
        covariance = (self._kernel(x, x, levels) - half.T @ half).numpy()
        deviation = np.sqrt(np.maximum(np.diagonal(covariance), 1e-12))
        found: Floats = covariance / np.outer(deviation, deviation)
        return found

    @property
    def _conditioned(self) -> Factor:
        assert self._factor is not None, "fit comes first"
        return self._factor

    def _chunk(self, plans: Ints) -> tuple[Tensor, Tensor]:
        factor = self._conditioned
        half = factor.half(self._kernel(self._x, self._ratios(plans)))
        weights = factor.rest(half).T.to(self._y.dtype)
        variance = (self._kernel.own - half.square().sum(dim=0)).clamp_min(0.0) * self._unit
        return self._divergences.expected(torch.addmm(self._dense, weights, self._y), variance)

    def _centred(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        # Wherever the model runs: the process is float64 algebra of a few hundred plans.
        return self._divergences.centred(logits.reshape(self._shape).to("cpu", self._dtype))

    def _ratios(self, plans: Ints) -> Tensor:
        return torch.from_numpy(np.log(np.maximum(plans, 0.5) / self._widths))


class LogitProbes(LogitGP):
    """The process over plans that are built for it; every known plan is one build.

    Args:
        build: widths (G,) -> the cut and recovered model.
        images: inputs (N, ...); the first ones, where the logits of all would be more than MOST_LOGITS.
    """

    def __init__(self, space: PruningSpace, build: Build, images: Tensor) -> None:
        dense = build(space.widths)
        classes = _logits(dense, images[:1]).numel()
        self._build, self._images = build, images[: max(1, MOST_LOGITS // classes)]
        super().__init__(space.widths, _logits(dense, self._images))
        self.builds = 1
        self.chosen: Ints | None = None
        """The plan (G,) that was chosen of the builds; later ones (of evaluated plans) do not change it."""

    def measure(self, widths: PlanLike) -> float:
        """Build a plan of widths (G,), unless it is known, and return its mean KL(dense || pruned) in nats."""
        key = as_widths(widths)
        if key not in self.known:
            self.builds += 1
            self.learn(key, _logits(self._build(np.array(key, dtype=np.int64)), self._images))
        return self.known[key]

    @property
    def images(self) -> int:
        """Images whose logits are compared."""
        return len(self._images)


def _logits(model: nn.Module, images: Tensor) -> Tensor:
    model.eval()
    with torch.no_grad():
        return torch.cat([model(part).float().cpu() for part in images.split(BATCH)])
