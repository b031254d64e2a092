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

Build = Callable[[PlanLike], nn.Module]
"""Widths (G,) -> the cut and recovered model."""
# Images that are read: of the calibration and of the train split, and logits in all (which are kept for every build).
BATCH, MOST_LOGITS = 256, 2**18
# Prior of the kernel's logarithms (centre of each kind, one spread) and where the first fit starts.
_CENTRES = {"alone": -2.0, "alone_length": 0.5, "joint": -1.0, "joint_length": 1.0, "noise": -6.0}
_STARTS = {"alone": 0.0, "alone_length": 0.0, "joint": 0.0, "joint_length": 0.7, "noise": -4.0}
_SPREAD = 1.5
# Logits of one model hang together: they count as so many independent outputs.
_OUTPUTS = 30.0
_FIRST_STEPS, _STEPS = 60, 20
# The hyperparameters are fitted again when this many times more plans are known, to so many of them at most: a step
# costs their number cubed. The predictions use all.
_GROWTH = 1.1
_FIT_PLANS = 400
_CHUNK = 64
# What the uncertainty of the logits adds to a divergence is averaged over draws, on so many images or tokens at most.
_DRAWS, _NOISY_IMAGES = 16, 128


class LogitGP:
    """Gaussian process of how the logits of some images change with the widths.

    The kernel, over the logarithms of the keep ratios, is a sum of one Matern 2.5 kernel a group (cuts do not know
    of each other) and one over all groups (they do).

    Args:
        widths: (G,) of the dense model.
        dense: its logits (N, ..., C) after the recovery that the plans get.
        reference: logits (N, ..., C) that divergences are measured from; ``dense`` where it is not given.
    """

    def __init__(self, widths: Ints, dense: Tensor, reference: Tensor | None = None) -> None:
        self._widths = np.asarray(widths, dtype=np.int64)
        self._dense = dense.reshape(-1, dense.shape[-1])
        wanted = dense if reference is None else reference
        self._log_dense = wanted.reshape(self._dense.shape).log_softmax(dim=-1)
        self.known: dict[Widths, float] = {}
        """The plans whose logits are known, and their divergences; the dense model aside."""
        self._rows = [self._ratios(self._widths[None])]
        self._changes = _Changes(self._dense.numel())
        self._scales = _per_group(_STARTS, len(self._widths))
        self._fitted = 0

    def learn(self, widths: PlanLike, logits: Tensor) -> float:
        """Take in the logits (N, ..., C) of a plan (G,) and return its mean KL(reference || plan) in nats."""
        key = as_widths(widths)
        # What has diverged says no more than that it is far away.
        logits = torch.nan_to_num(logits.reshape(self._dense.shape).float(), nan=0.0, posinf=1e3, neginf=-1e3)
        self.known[key] = float(self._divergence(logits[None])[0])
        self._rows.append(self._ratios(np.array([key])))
        self._changes.append((logits - self._dense).flatten())
        return self.known[key]

    @property
    def state(self) -> list[float]:
        """What the next fit starts from: how many plans the kernel was adapted to, and its logarithms."""
        return [float(self._fitted), *self._scales.tolist()]

    @state.setter
    def state(self, value: Sequence[float]) -> None:
        self._fitted = int(value[0])
        self._scales = torch.tensor(value[1:], dtype=torch.float64)

    def best(self, count: int = 1) -> Ints:
        """The known plans (count, G) of the smallest divergence, the best first."""
        return np.array(sorted(self.known, key=self.known.__getitem__)[:count], dtype=np.int64)

    def fit(self, adapt: bool = True) -> None:
        """Condition on all that is known; ``adapt`` the kernel where that is much more than the last time."""
        self._x, self._y = torch.cat(self._rows), self._changes.rows
        gram = self._changes.gram()
        self._unit = max(float(gram.diagonal().mean()), 1e-12)
        if adapt and len(self._x) >= _GROWTH * self._fitted:
            steps = _STEPS if self._fitted else _FIRST_STEPS
            self._fitted = len(self._x)
            some = torch.linspace(0, self._fitted - 1, min(self._fitted, _FIT_PLANS)).long()
            self._scales = _adapted(self._scales, self._x[some], gram[some][:, some] / self._unit, steps)
        self._lower = torch.linalg.cholesky(_noisy_kernel(self._scales, self._x))

    def expected(self, widths: ArrayLike) -> tuple[Floats, Floats]:
        """Of plans (P, G): the divergence (P,) of the expected logits, and what their uncertainty adds to it (P,).

        Their sum is the divergence that is to be expected.
        """
        plans = np.asarray(widths, dtype=np.int64)
        parts = [self._chunk(plans[i : i + _CHUNK]) for i in range(0, len(plans), _CHUNK)]
        centre, spread = (torch.cat(column).double().numpy() for column in zip(*parts, strict=True))
        return centre, spread

    def correlation(self, widths: ArrayLike) -> Floats:
        """How far what is not known of plans (P, G) is the same unknown: correlations (P, P) of their logits."""
        x = self._ratios(np.asarray(widths, dtype=np.int64))
        solved = torch.linalg.solve_triangular(self._lower, _kernel(self._scales, self._x, x), upper=False)
        covariance = (_kernel(self._scales, x, x) - solved.T @ solved).numpy()
        deviation = np.sqrt(np.maximum(np.diagonal(covariance), 1e-12))
        found: Floats = covariance / np.outer(deviation, deviation)
        return found

    def _chunk(self, plans: Ints) -> tuple[Tensor, Tensor]:
        x = self._ratios(plans)
        cross = _kernel(self._scales, self._x, x)
        weights = torch.cholesky_solve(cross, self._lower).T.to(self._y.dtype)
        logits = self._dense + (weights @ self._y).reshape(len(plans), *self._dense.shape)
        solved = torch.linalg.solve_triangular(self._lower, cross, upper=False)
        variance = (_own(self._scales) - (solved**2).sum(dim=0)).clamp_min(0.0) * self._unit
        return self._divergence(logits), _added(logits, variance)

    def _divergence(self, logits: Tensor) -> Tensor:
        """Mean KL(dense || other) over the images: logits (P, N, C) -> (P,)."""
        difference = self._log_dense - logits.log_softmax(dim=-1)
        return (self._log_dense.exp() * difference).sum(dim=-1).mean(dim=-1)

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


class _Changes:
    """Rows (K, L) that grow by one at a time, and their second moments (K, K); the first row is zero."""

    def __init__(self, length: int) -> None:
        self._all, self._count = torch.zeros(16, length), 1
        self._moments = torch.zeros(0, 0, dtype=torch.float64)

    def append(self, row: Tensor) -> None:
        if self._count == len(self._all):
            self._all = torch.cat([self._all, torch.empty_like(self._all)])
        self._all[self._count] = row
        self._count += 1

    @property
    def rows(self) -> Tensor:
        return self._all[: self._count]

    def gram(self) -> Tensor:
        """Means of products of the rows, of which only those of new rows are computed.

        One row at a time: sums of floats depend on how many rows are multiplied at once, and a resumed search, which
        takes all in at once, has to expect the same to the bit.
        """
        before = len(self._moments)
        if before < self._count:
            moments = torch.zeros(self._count, self._count, dtype=torch.float64)
            moments[:before, :before] = self._moments
            for i in range(before, self._count):
                products = (self._all[: i + 1] @ self._all[i]).double() / self._all.shape[1]
                moments[i, : i + 1] = moments[: i + 1, i] = products
            self._moments = moments
        return self._moments


def _added(logits: Tensor, variance: Tensor) -> Tensor:
    """What Gaussian noise of a variance (P,) on every one of the logits (P, N, C) adds to the mean divergence (P,).

    E[KL] - KL of the means is E[logsumexp] - logsumexp of the means, here over fixed draws, which come in pairs of
    opposite sign. The second-order expansion (half the variance times 1 - sum q^2) is far too small where the means
    are certain of a class and the variance is large: what is unknown would be as good as the dense model.
    """
    some = logits[:, :: max(1, -(-logits.shape[1] // _NOISY_IMAGES))]
    half = torch.randn(_DRAWS // 2, 1, logits.shape[-1], generator=torch.Generator().manual_seed(0))
    draws = torch.cat([half, -half]).to(logits.dtype)
    means = some.logsumexp(dim=-1).mean(dim=-1)
    found = torch.stack(
        [
            (m + v.sqrt() * draws).logsumexp(dim=-1).mean()
            for m, v in zip(some, variance.to(some.dtype), strict=True)
        ]
    )
    return (found - means).clamp_min(0.0)


def _logits(model: nn.Module, images: Tensor) -> Tensor:
    model.eval()
    with torch.no_grad():
        return torch.cat([model(part).float().cpu() for part in images.split(BATCH)])


def _per_group(values: dict[str, float], groups: int) -> Tensor:
    """Logarithms of the kernel's hyperparameters (3 G + 2,): each group's height and length, then the joint ones."""
    counts = {"alone": groups, "alone_length": groups, "joint": 1, "joint_length": groups, "noise": 1}
    return torch.cat([torch.full((n,), values[name], dtype=torch.float64) for name, n in counts.items()])


def _kernel(scales: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Covariance (K, P) of plans a (K, G) with plans b (P, G)."""
    groups = a.shape[1]
    alone, length, joint, joint_length, _ = scales.exp().split([groups, groups, 1, groups, 1])
    gap = a[:, None] - b[None]
    additive = (_matern(gap.abs() / length) * alone).sum(dim=-1)
    # The small offset keeps the gradient of a distance of zero finite.
    distance = ((gap / joint_length).square().sum(dim=-1) + 1e-12).sqrt()
    return additive + joint * _matern(distance)


def _noisy_kernel(scales: Tensor, x: Tensor) -> Tensor:
    return _kernel(scales, x, x) + (scales[-1].exp() + 1e-5) * torch.eye(len(x), dtype=x.dtype)


def _own(scales: Tensor) -> Tensor:
    """Covariance of a plan with itself."""
    groups = (len(scales) - 2) // 3
    return scales[:groups].exp().sum() + scales[2 * groups].exp()


def _matern(distance: Tensor) -> Tensor:
    d = 5.0**0.5 * distance
    return (1.0 + d + d**2 / 3.0) * torch.exp(-d)


def _adapted(scales: Tensor, x: Tensor, gram: Tensor, steps: int) -> Tensor:
    """Hyperparameters nearer to the highest posterior; gram (K, K) is the logits' second moment over plans."""
    scales = scales.clone().requires_grad_()
    centre = _per_group(_CENTRES, x.shape[1])
    optimizer = torch.optim.Adam([scales], lr=0.1)
    for _ in range(steps):
        lower = torch.linalg.cholesky(_noisy_kernel(scales, x))
        fit = 0.5 * torch.cholesky_solve(gram, lower).diagonal().sum() + lower.diagonal().log().sum()
        loss = _OUTPUTS * fit + 0.5 * (((scales - centre) / _SPREAD) ** 2).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return scales.detach()
