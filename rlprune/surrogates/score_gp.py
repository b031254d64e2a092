"""A model of the score: a Gaussian process over the widths.

Shape legend: N plans, G groups.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from scipy.linalg import cho_solve, cholesky, solve_triangular
from scipy.optimize import minimize

from ..utils.arrays import Floats, Ints
from .kernels import distances, lengths_gradient, matern

# Scores below this quantile (and below the first start) are told apart no further.
_TAIL = 0.2
# The prior mean is this quantile of the targets.
_PRIOR = 0.1
# Prior of the length scales (in logarithms of the keep ratio): centre, and spread of its logarithm.
_LENGTH = 2.0
_LENGTH_SPREAD = 0.8
# Spread of the logarithm of the factors by which the expected costs of groups are off, in targets' spreads.
_FACTOR = 2.0
# Where the first fit starts: the signal's variance, the lengths (_LENGTH), the noise's variance; and what each is
# kept between.
_SIGNAL, _NOISE = 1.0, 1e-2
_SIGNALS, _LENGTHS, _NOISES = (1e-2, 1e2), (0.1, 50.0), (1e-5, 0.5)
_JITTER = 1e-8
# L-BFGS steps per fit; each fit starts from the hyperparameters of the last one.
_FIT_STEPS = 25
# Plans that the hyperparameters are fitted to, at most: a step costs their number cubed. The predictions use all.
_FIT_PLANS = 300


class ScoreGP:
    """Gaussian process over the logarithms of the keep ratios: Matern 2.5, one length scale a group, noise.

    The target is the negative logarithm of the distance to the dense score, standardised: pruning
    losses spread over orders of magnitude, and the order among the good plans is what matters. The
    collapsed tail is clipped.

    With ``expected``, a function from widths (N, G) to the cost (N, G) that each group's cut is expected to
    have, the process models what is left of the target after the logarithm of their sum: its linear part says
    by which factor each group's expectation is off, and the rest is as without. (To first order, a factor
    exp(s_g) on the cost of each group moves the logarithm of the sum by the share of each group times s_g.)

    With ``cost``, a function from widths (N, G) to the plans' costs (N,), distances are taken relative to what
    is usual at their cost: over a range of budgets the order at every one of them matters, and the difference
    between budgets, by far the largest one, does not.
    """

    batch = None
    climbs = (1.0,)
    kappas = (0.0, 0.5, 1.0, 2.0)

    def __init__(
        self,
        space_widths: Ints,
        dense_score: float,
        expected: Callable[[Ints], Floats | None] | None = None,
        cost: Callable[[Ints], Floats] | None = None,
    ) -> None:
        self._dense = space_widths.astype(np.float64)
        self._dense_score = dense_score
        self._expected = expected
        self._cost = cost
        self._theta: Floats | None = None
        self._trend = np.zeros(2)

    def fit(self, widths: Ints, scores: Floats) -> None:
        """Fit to N scored plans: widths (N, G), scores (N,)."""
        x, y = self.inputs(widths), self._targets(widths, scores)
        shares, expected = self._prior(widths)
        if shares is not None:
            # The line through the points, rising: a larger expected cost is never a better plan.
            slope = float(np.polyfit(expected, y, 1)[0]) if np.ptp(expected) > 1e-9 else 0.0
            self._trend = np.array([max(slope, 0.0), 0.0])
            self._trend[1] = np.quantile(y - self._trend[0] * expected, _PRIOR)
            y = y - self._trend[0] * expected - self._trend[1]
        self._shares = shares
        some = np.unique(np.linspace(0, len(x) - 1, min(len(x), _FIT_PLANS)).astype(np.int64))
        evidence = Evidence(x[some], (y - _explained(shares, y))[some])
        self._theta = _optimise(evidence, _start(x.shape[1]) if self._theta is None else self._theta)
        self._kernel = ScoreKernel(self._theta)
        self._noise = self._kernel.noise
        self._x = x
        gram = self._kernel(x, x) + _linear(shares, shares) + (self._noise + _JITTER) * np.eye(len(x))
        self._lower = cholesky(gram, lower=True)
        self._weights = cho_solve((self._lower, True), y)

    def inputs(self, widths: Ints) -> Floats:
        """(N, G) widths -> (N, G) logarithms of the keep ratios; a dropped group counts as half a unit."""
        return np.log(np.maximum(np.asarray(widths, dtype=np.float64), 0.5) / self._dense)

    def predict(self, widths: Ints) -> tuple[Floats, Floats]:
        """Mean (N,) and standard deviation (N,) of the standardised target."""
        x = self.inputs(widths)
        shares, expected = self._prior(widths)
        cross = self._kernel(self._x, x) + _linear(self._shares, shares)
        mean = cross.T @ self._weights + self._trend[0] * expected + self._trend[1]
        solved = solve_triangular(self._lower, cross, lower=True)
        own = 0.0 if shares is None else _FACTOR**2 * (shares**2).sum(axis=1)
        variance = self._kernel.signal + own - (solved**2).sum(axis=0)
        return mean, np.sqrt(np.maximum(variance, 1e-12))

    def covariance(self, widths: Ints) -> tuple[Floats, Floats]:
        """Mean (N,) and joint covariance (N, N)."""
        x = self.inputs(widths)
        shares, expected = self._prior(widths)
        cross = self._kernel(self._x, x) + _linear(self._shares, shares)
        solved = solve_triangular(self._lower, cross, lower=True)
        mean = cross.T @ self._weights + self._trend[0] * expected + self._trend[1]
        return mean, self._kernel(x, x) + _linear(shares, shares) - solved.T @ solved

    def ready(self, known: int) -> bool:
        """Never: a first batch is drawn without it."""
        return False

    def promising(self, count: int) -> Ints:
        """None: what it knows has been scored."""
        return np.zeros((0, len(self._dense)), dtype=np.int64)

    def informed(self, widths: Ints) -> bool:
        """Whether something is expected of plans before any of them is scored."""
        return self._prior(widths)[0] is not None

    def _prior(self, widths: Ints) -> tuple[Floats | None, Floats | float]:
        """Shares (N, G) of the groups in the expected cost and minus its logarithm (N,); None and 0 without."""
        costs = None if self._expected is None else self._expected(widths)
        if costs is None:
            return None, 0.0
        total = costs.sum(axis=1, keepdims=True)
        return costs / np.maximum(total, 1e-12), -np.log(np.maximum(total[:, 0], 1e-6))

    @property
    def noise(self) -> float:
        return self._noise

    @property
    def theta(self) -> list[float] | None:
        """Logarithms of the hyperparameters, where the next fit starts."""
        return None if self._theta is None else [float(t) for t in self._theta]

    @theta.setter
    def theta(self, value: list[float] | None) -> None:
        self._theta = None if value is None else np.array(value)

    def _targets(self, widths: Ints, scores: Floats) -> Floats:
        scores = np.nan_to_num(np.asarray(scores, dtype=np.float64), nan=-1e9, neginf=-1e9)
        distance = np.maximum(self._dense_score - scores, 0.0)
        usual = np.maximum(self._usual(widths, distance), 1e-5)
        # The offset keeps a plan that is as good as the dense model from dominating everything.
        y = -np.log(distance / usual + 0.1)
        y = np.maximum(y, np.quantile(y, _TAIL) - 1.0)
        spread = float(y.std())
        # Zero, where the process returns to away from all data, is a bad plan: with the mean there, a
        # policy that starts below average would be paid for running off to where nothing is known.
        return (y - np.quantile(y, _PRIOR)) / (spread if spread > 1e-9 else 1.0)

    def _usual(self, widths: Ints, distance: Floats) -> Floats | float:
        """Usual distance to the dense score: the median, or over several budgets a curve (N,) over the cost."""
        if self._cost is None:
            return float(np.median(distance))
        cost = np.log(np.maximum(self._cost(widths), 1e-12))
        logs = np.log(np.maximum(distance, 1e-5))
        spread = float(cost.std())
        around = (cost - cost.mean()) / (spread if spread > 1e-9 else 1.0)
        degree = min(2, len(np.unique(around.round(3))) - 1)  # a parabola needs three budgets
        return np.exp(np.polyval(np.polyfit(around, logs, degree), around))


def _linear(a: Floats | None, b: Floats | None) -> Floats | float:
    """Covariance (N, M) of the factors by which expectations are off, 0 where nothing is expected."""
    return 0.0 if a is None or b is None else _gram(a, b)


def _gram(a: Floats, b: Floats) -> Floats:
    return _FACTOR**2 * (a @ b.T)


def _explained(shares: Floats | None, target: Floats) -> Floats | float:
    """What the linear part alone makes of the target (N,), so that the length scales fit the rest."""
    if shares is None:
        return 0.0
    gram = _gram(shares, shares)
    return gram @ np.linalg.solve(gram + 0.1 * np.eye(len(gram)), target)


@dataclass(frozen=True)
class ScoreKernel:
    """Matern 2.5 with a length a group.

    Args:
        theta: logarithms (G + 2,) of the signal's variance, the lengths and the noise's variance.
    """

    theta: Floats

    def __call__(self, a: Floats, b: Floats) -> Floats:
        """Covariance (N, M) of inputs a (N, G) with b (M, G)."""
        lengths = torch.from_numpy(np.exp(self.theta[1:-1]))
        found: Floats = (
            self.signal * matern(distances(torch.from_numpy(a), torch.from_numpy(b), lengths)).numpy()
        )
        return found

    @property
    def signal(self) -> float:
        return float(np.exp(self.theta[0]))

    @property
    def noise(self) -> float:
        return float(np.exp(self.theta[-1]))


class Evidence:
    """Minus the logarithm of the marginal likelihood of a target (N,) over inputs x (N, G)."""

    def __init__(self, x: Floats, target: Floats) -> None:
        self._x, self._target = torch.from_numpy(x), torch.from_numpy(target)

    def __call__(self, theta: Floats) -> tuple[float, Floats]:
        """Its value and its gradient (G + 2,) by :attr:`ScoreKernel.theta`, in closed form."""
        signal, noise = float(np.exp(theta[0])), float(np.exp(theta[-1]))
        lengths = torch.from_numpy(np.exp(theta[1:-1]))
        distance = distances(self._x, self._x, lengths)
        alike = matern(distance).mul_(signal)
        covariance = alike.clone()
        covariance.diagonal().add_(noise + _JITTER)
        lower, failed = torch.linalg.cholesky_ex(covariance)
        if failed:
            return np.inf, np.zeros_like(theta)
        inverse = torch.cholesky_inverse(lower)
        solved = inverse @ self._target
        value = 0.5 * float(self._target @ solved) + float(lower.diagonal().log().sum())
        weights = 0.5 * (inverse - torch.outer(solved, solved))
        gradient = [
            float((weights * alike).sum()),
            *(signal * lengths_gradient(self._x, lengths, distance, weights)).tolist(),
            float(weights.diagonal().sum()) * noise,
        ]
        return value + 0.5 * len(solved) * float(np.log(2 * np.pi)), np.array(gradient)


def _start(groups: int) -> Floats:
    """Logarithms of the hyperparameters (G + 2,) where the first fit starts."""
    return np.log(np.concatenate([[_SIGNAL], np.full(groups, _LENGTH), [_NOISE]]))


def _optimise(evidence: Evidence, start: Floats) -> Floats:
    """A few steps of L-BFGS with a prior: each fit starts where the last one ended.

    Without the log-normal prior on the length scales, dozens of points in as many dimensions are
    explained by scales at their bounds, and the predictions are worth nothing.
    """
    centre = np.full(len(start), np.log(_LENGTH))
    weight = np.full(len(start), 1.0 / _LENGTH_SPREAD**2)
    weight[[0, -1]] = 0.0  # signal and noise are free

    def penalised(theta: Floats) -> tuple[float, Floats]:
        value, gradient = evidence(theta)
        off = theta - centre
        return value + 0.5 * float((weight * off**2).sum()), gradient + weight * off

    bounds = np.log([_SIGNALS, *[_LENGTHS] * (len(start) - 2), _NOISES])
    options = {"maxiter": _FIT_STEPS}
    found: Floats = minimize(penalised, start, method="L-BFGS-B", jac=True, bounds=bounds, options=options).x
    return found


class Predictor(Protocol):
    """A model of the score, as PPO is paid by it."""

    def predict(self, widths: Ints) -> tuple[Floats, Floats]: ...
