"""The processes against what a textbook writes down, in plain numpy: predictions, gradients, factors."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rlprune.surrogates import logit_gp
from rlprune.surrogates.factor import Factor
from rlprune.surrogates.kernels import (
    Levels,
    additive,
    additive_gradient,
    distances,
    lengths_gradient,
    matern,
)
from rlprune.surrogates.logit_gp import LogitGP
from rlprune.surrogates.logit_kernel import LogitKernel, Posterior, adapted, first_scales
from rlprune.surrogates.score_gp import Evidence, ScoreKernel

SHAPES = [(1, 5, 3), (3, 20, 7), (12, 60, 30), (70, 40, 9)]


def ratios(groups: int, plans: int, seed: int) -> torch.Tensor:
    """Logarithms of keep ratios of a few widths a group; the last group never moves."""
    random = np.random.default_rng(seed)
    dense = random.integers(8, 40, size=groups)
    widths = random.integers(dense // 3, dense + 1, size=(plans, groups))
    if groups > 1:
        widths[:, -1] = dense[-1]
    return torch.from_numpy(np.log(np.maximum(widths, 0.5) / dense))


def random_scales(groups: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return first_scales(groups) + torch.randn(3 * groups + 2, generator=generator, dtype=torch.float64)


def textbook_matern(distance: np.ndarray) -> np.ndarray:
    d = np.sqrt(5.0) * distance
    return (1.0 + d + d**2 / 3.0) * np.exp(-d)


def textbook_kernel(scales: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> np.ndarray:
    """As it is defined: one number a pair of plans and group."""
    groups = a.shape[1]
    alone, length, joint, joint_length, _ = np.split(
        np.exp(scales.numpy()), np.cumsum([groups, groups, 1, groups])
    )
    gap = a.numpy()[:, None] - b.numpy()[None]
    together = np.sqrt(((gap / joint_length) ** 2).sum(axis=-1))
    return (alone * textbook_matern(np.abs(gap) / length)).sum(axis=-1) + joint * textbook_matern(together)


@pytest.mark.parametrize(("groups", "known", "others"), SHAPES)
def test_the_kernel_is_its_definition(groups: int, known: int, others: int) -> None:
    scales, x = random_scales(groups, 0), ratios(groups, known + others, 1)
    a, b = x[:known], x[known:]
    kernel = LogitKernel(scales)
    assert kernel(a, b).numpy() == pytest.approx(textbook_kernel(scales, a, b), abs=1e-8)
    square = kernel(a, a).numpy()
    assert square == pytest.approx(textbook_kernel(scales, a, a), abs=1e-8)
    assert np.diagonal(square) == pytest.approx(kernel.own)


@pytest.mark.parametrize("block", [1, 50, 2**17])
def test_portions_change_nothing(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr("rlprune.surrogates.kernels._BLOCK", block)
    scales, x = random_scales(12, 0), ratios(12, 30, 1)
    kernel = LogitKernel(scales)
    assert kernel(x, x).numpy() == pytest.approx(textbook_kernel(scales, x, x), abs=1e-8)
    weights = torch.ones(30, 30, dtype=torch.float64)
    alone, length, *_ = kernel.parts
    found = additive_gradient(x, Levels.of(x), alone, length, weights)[0]
    assert float(found.sum()) == pytest.approx(float(additive(x, Levels.of(x), alone, length).sum()))


def plain_kernel(scales: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """As it is defined, for autograd."""
    groups = x.shape[1]
    alone, length, joint, joint_length, noise = scales.exp().split([groups, groups, 1, groups, 1])
    gap = x[:, None] - x[None]

    def plain(distance: torch.Tensor) -> torch.Tensor:
        d = 5.0**0.5 * distance
        return (1.0 + d + d**2 / 3.0) * torch.exp(-d)

    # The small offset keeps the gradient of a distance of zero finite.
    together = ((gap / joint_length).square().sum(dim=-1) + 1e-16).sqrt()
    found = (plain(gap.abs() / length) * alone).sum(dim=-1) + joint * plain(together)
    return found + (noise + 1e-5) * torch.eye(len(x), dtype=x.dtype)


@pytest.mark.parametrize(("groups", "known", "others"), SHAPES)
def test_the_gradient_of_the_posterior_is_that_of_autograd(groups: int, known: int, others: int) -> None:
    x, scales = ratios(groups, known, 0), random_scales(groups, 1)
    some = torch.randn(known, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    gram = some @ some.T / 4
    value, gradient = Posterior(x, gram)(scales)
    free = scales.clone().requires_grad_()
    covariance = plain_kernel(free, x)
    centre = torch.tensor([-2.0] * groups + [0.5] * groups + [-1.0] + [1.0] * groups + [-6.0])
    prior = 0.5 * ((free - centre) / 1.5).square().sum()
    fit = torch.linalg.solve(covariance, gram).diagonal().sum() + covariance.logdet()
    wanted = 30.0 * 0.5 * fit + prior
    wanted.backward()
    assert value == pytest.approx(float(wanted.detach()), rel=1e-8)
    assert free.grad is not None
    assert torch.allclose(gradient, free.grad, rtol=1e-6, atol=1e-6 * float(free.grad.abs().max()))


def test_the_gradients_are_those_of_finite_differences() -> None:
    """Of each part alone, with random weights of the pairs; the last group never moves."""
    x, groups = ratios(5, 25, 0), 5
    logs = 0.3 * torch.randn(3 * groups, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    weights = torch.randn(25, 25, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weights = weights + weights.T
    levels = Levels.of(x)

    def value(values: torch.Tensor) -> float:
        heights, lengths, joints = values.exp().split(groups)
        both = additive(x, levels, heights, lengths) + matern(distances(x, x, joints))
        return float((weights * both).sum())

    heights, lengths, joints = logs.exp().split(groups)
    found = torch.cat(
        [
            *additive_gradient(x, levels, heights, lengths, weights),
            lengths_gradient(x, joints, distances(x, x, joints), weights),
        ]
    )
    for i in range(3 * groups):
        step = torch.zeros_like(logs)
        step[i] = 1e-5
        wanted = (value(logs + step) - value(logs - step)) / 2e-5
        assert float(found[i]) == pytest.approx(wanted, rel=1e-5, abs=1e-5), i


def test_adapting_goes_up_and_ends_where_nothing_is_gained(monkeypatch: pytest.MonkeyPatch) -> None:
    x = ratios(9, 30, 0)
    truth = plain_kernel(first_scales(9), x)
    drawn = torch.linalg.cholesky(truth) @ torch.randn(
        30, 400, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    gram = drawn @ drawn.T / 400
    counted = []
    call = Posterior.__call__

    def spy(self: Posterior, scales: torch.Tensor) -> tuple[float, torch.Tensor]:
        counted.append(call(self, scales)[0])
        return call(self, scales)

    monkeypatch.setattr(Posterior, "__call__", spy)
    start = random_scales(9, 3)
    found = adapted(start, x, gram, 100)
    first, calls = call(Posterior(x, gram), found)[0], len(counted)
    assert first < counted[0] and calls < 100
    counted.clear()
    again = adapted(found, x, gram, 100)
    assert len(counted) < calls / 2, "from where the last one ended little is left"
    assert call(Posterior(x, gram), again)[0] <= first
    counted.clear()
    adapted(start, x, gram, 3)
    assert len(counted) < 10


def test_a_covariance_without_a_factor_is_no_way_to_go() -> None:
    x = ratios(3, 12, 0)
    scales = torch.full((11,), 60.0, dtype=torch.float64)
    scales[-1] = -60.0
    value, gradient = Posterior(x, torch.eye(12, dtype=torch.float64))(scales)
    assert value == np.inf and not gradient.any()


def test_matern_of_distances_is_its_formula() -> None:
    distance = torch.linspace(0.0, 9.0, 50, dtype=torch.float64).reshape(5, 10)
    assert matern(distance).numpy() == pytest.approx(textbook_matern(distance.numpy()), abs=1e-12)


@pytest.mark.parametrize("first", [1, 4, 39])
def test_an_extended_factor_is_a_fresh_one(first: int) -> None:
    kernel, x = LogitKernel(random_scales(6, 0)), ratios(6, 40, 1)
    gram = kernel(x, x)

    def row(k: int) -> tuple[torch.Tensor, float]:
        return kernel(x[:k], x[k : k + 1])[:, 0], kernel.own

    fresh = Factor(gram, kernel.noise)
    often, once = (Factor(gram[:first, :first], kernel.noise) for _ in range(2))
    for count in (*range(first, 40, 7), 40):
        often.extend(count, row)
    once.extend(40, row)
    assert torch.allclose(often.lower, fresh.lower, rtol=1e-8, atol=1e-8)
    assert torch.equal(often.lower, once.lower), "a resumed search takes all in at once"
    cross = kernel(x, ratios(6, 5, 2))
    whole = gram + kernel.noise * torch.eye(40, dtype=torch.float64)
    assert torch.allclose(often.rest(often.half(cross)), torch.linalg.solve(whole, cross), atol=1e-8)


def textbook_expectation(
    model: LogitGP, x: torch.Tensor, changes: np.ndarray, dense: np.ndarray, others: torch.Tensor
) -> tuple[np.ndarray, np.ndarray]:
    """Divergences (P,) of the mean logits and their variances (P,), by the equations of Rasmussen & Williams."""
    scales = torch.tensor(model.state[1:], dtype=torch.float64)
    noise = np.exp(float(scales[-1])) + 1e-5
    inverse = np.linalg.inv(textbook_kernel(scales, x, x) + noise * np.eye(len(x)))
    cross = textbook_kernel(scales, x, others)
    logits = dense + np.einsum("kp,kj,jnc->pnc", cross, inverse, changes)
    own = np.diagonal(textbook_kernel(scales, others, others))
    variance = (own - np.einsum("kp,kj,jp->p", cross, inverse, cross)) * (changes**2).mean(axis=(1, 2)).mean()

    def log_softmax(values: np.ndarray) -> np.ndarray:
        top = values - values.max(axis=-1, keepdims=True)
        return top - np.log(np.exp(top).sum(axis=-1, keepdims=True))

    log_p = log_softmax(dense)
    return (np.exp(log_p) * (log_p - log_softmax(logits))).sum(axis=-1).mean(axis=-1), variance


@pytest.mark.parametrize("groups", [2, 9])
def test_predictions_are_those_of_a_textbook(monkeypatch: pytest.MonkeyPatch, groups: int) -> None:
    """In float64: the logits of a search are float32, whose rounding is far above that of the process."""
    random = np.random.default_rng(groups)
    widths = random.integers(10, 40, size=groups)
    dense = random.normal(size=(15, 4)) * 3.0
    effects = random.normal(size=(groups, 15, 4))
    plans = random.integers(widths // 3, widths + 1, size=(30, groups))
    others = np.unique(random.integers(widths // 3, widths + 1, size=(11, groups)), axis=0)
    variances = []
    expected = logit_gp.Divergences.expected

    def spy(self: object, centred: torch.Tensor, variance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        variances.append(variance)
        return expected(self, centred, variance)  # type: ignore[arg-type]

    monkeypatch.setattr(logit_gp.Divergences, "expected", spy)
    model = LogitGP(widths, torch.from_numpy(dense))
    changes = [np.zeros_like(dense)]
    for i, plan in enumerate(plans):
        changes.append(np.einsum("g,gnc->nc", 1 - plan / widths, effects) + 0.1 * random.normal(size=(15, 4)))
        model.learn(plan, torch.from_numpy(dense + changes[-1]))
        if i % 8 == 0:
            model.fit()  # adapted, extended, adapted again
    model.fit()
    x = torch.from_numpy(np.log(np.vstack([widths[None], plans]) / widths))
    rows = torch.from_numpy(np.log(others / widths))
    wanted, variance = textbook_expectation(model, x, np.array(changes), dense, rows)
    centre, _ = model.expected(others)
    assert centre == pytest.approx(wanted, abs=1e-8)
    assert torch.cat(variances).numpy() == pytest.approx(variance, rel=1e-8, abs=1e-8)
    again, _ = model.expected(others[::-1])
    assert np.array_equal(again, centre[::-1]) and len(variances) == 1, "what was told is looked up"


def test_the_evidence_of_scores_and_its_gradient_are_scikit_learns() -> None:
    """Where scikit-learn's process computes the same, an array of all gaps per group."""
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

    x = ratios(6, 30, 0).numpy()
    target = np.random.default_rng(0).normal(size=30)
    theta = np.random.default_rng(1).normal(size=8) * 0.5
    kernel = ConstantKernel(1.0) * Matern(np.ones(6), nu=2.5) + WhiteKernel(0.1)
    process = GaussianProcessRegressor(kernel, alpha=1e-8, optimizer=None).fit(x, target)
    wanted, slope = process.log_marginal_likelihood(theta, eval_gradient=True)
    value, gradient = Evidence(x, target)(theta)
    assert value == pytest.approx(-wanted, rel=1e-8)
    assert gradient == pytest.approx(-slope, rel=1e-6, abs=1e-6)
    assert ScoreKernel(theta)(x, x[:4]) == pytest.approx(
        kernel.clone_with_theta(theta).k1(x, x[:4]), abs=1e-8
    )
