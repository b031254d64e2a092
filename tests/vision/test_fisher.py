"""What cuts are expected to cost: against exact expectations, brute force, and cut models that were run."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

from helpers.nets import Concatenation, FlattenIntoLinear, Grouped, Residual, SharedModule, Transposed
from helpers.small import SMALL_DIGITS
from helpers.workloads import Noise
from rlprune import Evaluator
from rlprune.api import trace
from rlprune.config import load_config
from rlprune.evaluation.importance import compute
from rlprune.experiments import prepare_experiment
from rlprune.recovery.elimination import Alone, eliminate, eliminate_units, reader
from rlprune.recovery.reconstruct import Gram, collect_grams, mendable_consumers
from rlprune.rules import RULES, Context
from rlprune.vision.calibration import VisionCalibration, removal_orders
from rlprune.vision.fisher import eliminations, errors_of_unseen_samples, gradient_moments
from rlprune.vision.held_out import unseen_errors
from rlprune.workloads.tasks import find_task

RIDGE = 1e-3


def curvature(task, outputs: torch.Tensor) -> torch.Tensor:
    """The Hessian (n, n) of one sample's divergence at the dense outputs, by autograd."""
    dense = task.kept(outputs)
    scale = task.scale([outputs]) if task.name == "regression" else None

    def apart(flat: torch.Tensor) -> torch.Tensor:
        return task.divergence(dense, flat.reshape(outputs.shape), scale)[0]

    return torch.autograd.functional.hessian(apart, outputs.flatten())


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("classification", (1, 4)),
        ("multilabel", (1, 3)),
        ("segmentation", (1, 3, 2)),
        ("sequence", (1, 2, 3)),
    ],
)
def test_drawn_answers_have_the_curvature_of_the_divergence(name, shape):
    task, generator = find_task(name), torch.Generator().manual_seed(0)
    outputs = torch.randn(shape, generator=generator).double()
    many = outputs.repeat(20000, *[1] * (len(shape) - 1)).requires_grad_()
    task.drawn_loss(many, generator).backward()
    rows = many.grad.flatten(1)
    assert torch.allclose(rows.T @ rows / len(rows), curvature(task, outputs), atol=0.02)


def test_drawn_noise_has_the_curvature_of_numbers_and_of_directions():
    generator = torch.Generator().manual_seed(1)
    numbers = torch.randn(20000, 3, generator=generator).double()
    scale = find_task("regression").scale([numbers])
    leaf = numbers.clone().requires_grad_()
    find_task("regression").drawn_loss(leaf, generator).backward()
    found = leaf.grad.T @ leaf.grad / len(leaf)
    assert torch.allclose(found, torch.diag(2.0 / (3 * scale)), atol=0.03)
    vector = torch.tensor([[2.0, -1.0, 0.5]], dtype=torch.float64)
    many = vector.repeat(20000, 1).requires_grad_()
    find_task("embedding").drawn_loss(many, generator).backward()
    task = find_task("embedding")
    wanted = torch.autograd.functional.hessian(
        lambda v: 1 - torch.cosine_similarity(v, vector[0], dim=0), vector[0]
    )
    assert torch.allclose(many.grad.T @ many.grad / len(many), wanted, atol=0.02) and task.compares


class TestEliminationOfSeveralLayers:
    def layers(self, seed: int, units: int = 5):
        """Two layers that read the same units, one with two columns a unit: (A, P, columns) each."""
        rng = np.random.default_rng(seed)
        found = []
        for size in (1, 2):
            x, w = rng.normal(size=(60, units * size)), rng.normal(size=(units * size, 3))
            x[:, -1] += x[:, 0]
            a = x.T @ x / 60 + 0.01 * np.eye(units * size)
            found.append((a, w @ w.T, rng.permutation(units * size).reshape(units, size), w))
        return found

    def error(self, layers, kept) -> float:
        total = 0.0
        for a, _, columns, w in layers:
            k = columns[kept].reshape(-1).astype(int)
            v = np.linalg.solve(a[np.ix_(k, k)], a[k] @ w) if len(k) else np.zeros((0, w.shape[1]))
            whole = np.zeros_like(w)
            whole[k] = v
            total += float(np.trace((w - whole).T @ a @ (w - whole)))
        return total

    @pytest.mark.parametrize("seed", range(4))
    def test_it_equals_trying_every_unit_at_every_step(self, seed):
        layers = self.layers(seed)
        readers = [
            reader([torch.linalg.inv(torch.tensor(a)), torch.tensor(p)], np.arange(5), columns)
            for a, p, columns, _ in layers
        ]
        found = eliminate_units(readers, 5)
        alive, errors = list(range(5)), []
        for unit in found.order:
            tried = {u: self.error(layers, [v for v in alive if v != u]) for u in alive}
            assert min(tried, key=tried.__getitem__) == unit
            alive.remove(int(unit))
            errors.append(tried[int(unit)])
        np.testing.assert_allclose(found.errors, errors, rtol=1e-8)

    def test_a_given_order_is_kept_to(self):
        layers, order = self.layers(9), np.array([3, 0, 4, 1, 2])
        readers = [
            reader([torch.linalg.inv(torch.tensor(a)), torch.tensor(p)], np.arange(5), columns)
            for a, p, columns, _ in layers
        ]
        found = eliminate_units([*readers, Alone(torch.ones(5))], 5, order=order)
        wanted = [
            self.error(layers, [u for u in range(5) if u not in order[: n + 1]]) + n + 1 for n in range(5)
        ]
        assert found.order.tolist() == order.tolist()
        np.testing.assert_allclose(found.errors, wanted, rtol=1e-8)


class Linear(torch.nn.Module):
    """Features of one layer into logits: what a cut costs is the quadratic form of the logits' changes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.features = torch.nn.Linear(6, 8)
        self.head = torch.nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.features(x.flatten(1))))


class Colours(Noise):
    """Random images of three channels for the networks of `helpers.nets`."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(24, 3, 16, 16, generator=generator)
        self.labels = torch.randint(3, (24,), generator=generator)
        self.example_inputs = self.images[:1]


class Rows(Noise):
    def __init__(self) -> None:
        torch.manual_seed(1)
        self.model = Linear().eval()
        self.x, self.y = torch.randn(2000, 6), torch.randint(4, (2000,))
        self.example_inputs = self.x[:1]

    def batches(self, split, limit=None):
        yield self.x[:limit], self.y[:limit]


def test_the_moments_are_the_fisher_information_of_the_outputs_seen_from_the_inputs():
    workload = Rows()
    space = trace(workload.model, workload.example_inputs)
    batches = list(workload.batches("calibration"))
    found, samples = gradient_moments(workload, workload.model, space, batches, {"head"}, seed=0)
    p = workload.model(workload.x).softmax(1).double()
    fisher = torch.diag(p.mean(dim=0)) - p.T @ p / len(p)
    w = workload.model.head.weight.detach().double()
    assert samples == 2000
    assert torch.allclose(found["head"].product[0] / samples, w.T @ fisher @ w, atol=0.01)
    # All of the features cost what independence makes of it: nothing is left to stand in for them.
    gram = collect_grams(workload.model, mendable_consumers(workload.model, space), batches)
    covariance = gram["head"].product[0] - torch.outer(gram["head"].mean[0], gram["head"].mean[0])
    whole = 0.5 * float((w.T @ fisher @ w * covariance).sum().detach())
    one = eliminations(workload.model, space, gram, found, samples, 1e-6)[0]
    assert one.errors[-1] / 2 == pytest.approx(whole, rel=0.1)


@pytest.mark.parametrize(
    "net",
    [Residual, Concatenation, Grouped, FlattenIntoLinear, SharedModule, Transposed],
    ids=lambda n: n.__name__,
)
def test_every_group_has_a_curve_and_the_model_is_left_as_it_was(net):
    torch.manual_seed(0)
    workload = Colours(net().eval())
    space = trace(workload.model, workload.example_inputs)
    before = {n: t.clone() for n, t in workload.model.state_dict().items()}
    calibration = workload.adapter.calibration(workload, space, workload.model)
    scores = compute("obs_fisher", workload, space, calibration=calibration)
    assert isinstance(calibration, VisionCalibration)
    assert set(calibration.curves) == set(range(len(space.groups)))
    for g, curve in calibration.curves.items():
        assert curve.shape == (space.groups[g].width + 1,) and curve[0] == 0.0
        assert (np.diff(curve) >= 0).all() and np.isfinite(curve).all() and curve[-1] > 0
        assert sorted(scores[g]) == list(range(space.groups[g].units))
    assert all(torch.equal(before[n], t) for n, t in workload.model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in workload.model.parameters())
    # The ranking's own curves are the same ones, and nothing is measured twice for them.
    assert calibration.divergence_curves(scores) is calibration.curves


@pytest.fixture(scope="module")
def trained():
    return prepare_experiment(load_config("digits", [*SMALL_DIGITS, "model.train.epochs=6", "threads=1"]))


class TestOnATrainedNetwork:
    def test_curves_rank_cuts_of_single_groups_as_measured_ones_do(self, trained):
        evaluator = Evaluator(trained.workload, trained.space, importance="obs_fisher")
        plans = []
        for g, keep in itertools.product(range(len(trained.space.groups)), (0.25, 0.5)):
            widths = trained.space.widths.copy()
            widths[g] = max(1, round(widths[g] * keep))
            plans.append(widths)
        measured = [-evaluator.evaluate(widths).score for widths in plans]
        expected = evaluator.expected(np.array(plans)).sum(axis=1)
        assert spearmanr(measured, expected).statistic > 0.7

    def test_the_rule_is_ahead_of_uniform_and_lamp_without_an_evaluation(self, trained):
        evaluator = Evaluator(trained.workload, trained.space, importance="obs_fisher")
        scores = {}
        for name in ("uniform", "lamp", "fisher"):
            widths = trained.space.project(RULES[name].function(evaluator.context(0.4)), 0.4)
            scores[name] = evaluator.evaluate(widths).score
        assert scores["fisher"] > max(scores["uniform"], scores["lamp"])

    def test_curves_follow_the_ranking_that_plans_are_made_with(self, trained):
        workload, space = trained.workload, trained.space
        calibration = workload.adapter.calibration(workload, space, workload.model)
        best, own = calibration.ranked_by_divergence()
        worst = calibration.divergence_curves([-s for s in best])
        assert all((worst[g] >= own[g] - 1e-12).all() for g in own)
        assert sum(worst[g][len(own[g]) // 2] for g in own) > 1.5 * sum(c[len(c) // 2] for c in own.values())
        context = Context(space, workload.model, best, 0.5, workload=workload, calibration=calibration)
        assert RULES["fisher"].function(context).any()
        assert removal_orders(best)[0].tolist() == np.argsort(best[0]).tolist()


def test_covariances_of_few_samples_are_shrunk_and_those_of_many_are_not() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(64, 3)
    model = nn.Sequential(layer)
    mixing = torch.eye(64) + 0.3 * torch.randn(64, 64) / 8

    def gram(samples: int) -> Gram:
        x = torch.randn(samples, 64) @ mixing + 1.0
        return collect_grams(model, ["0"], [(x, None)])["0"]

    truth = (mixing.T @ mixing).double()
    for samples, low, high in ((40, 0.7, 1.0), (20_000, 0.0, 0.1)):
        found = gram(samples)
        assert low <= float(found.noise[0]) <= high
        centre = found.mean[0][:, None] * found.mean[0][None]
        plain, shrunk = found.product[0] - centre, found.shrunk()[0] - centre
        torch.testing.assert_close(shrunk.diagonal(), plain.diagonal())
        if samples == 40:
            assert (shrunk - truth).norm() < 0.6 * (plain - truth).norm()


def test_one_sample_is_not_shrunk() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    found = collect_grams(model, ["0"], [(torch.randn(1, 4), None)])["0"]
    assert torch.equal(found.noise, torch.zeros(1).double())
    torch.testing.assert_close(found.shrunk(), found.product)


def test_more_inputs_than_samples_do_not_stand_in_for_each_other() -> None:
    """Features of a linear layer that know nothing of each other: half of them are expected to cost about half."""
    torch.manual_seed(0)
    layer = nn.Linear(48, 5).double()
    x = torch.randn(40, 48).double()
    found = collect_grams(nn.Sequential(layer), ["0"], [(x, None)])["0"]
    costs = {}
    for name, product in (("plain", found.product), ("shrunk", found.shrunk())):
        columns = np.arange(48)[:, None]
        one = eliminate(product[0], layer.weight.detach().T, columns, 1e-3)
        costs[name] = one.errors[23] / one.energy
    assert costs["plain"] < 0.1 < 0.2 < costs["shrunk"] < 0.6


def regressed_by_hand(
    known: np.ndarray, unseen: np.ndarray, columns: np.ndarray, centred: bool
) -> list[float]:
    """Mean square of what ridge regressions of each column on the other ones leave on rows that they have not seen."""
    mean = known.mean(axis=0) if centred else 0.0
    a, b = (known - mean)[:, columns], (unseen - mean)[:, columns]
    moments = a.T @ a / len(a)
    moments += RIDGE * np.trace(moments) / len(moments) * np.eye(len(moments))
    found = []
    for j in range(len(columns)):
        others = [k for k in range(len(columns)) if k != j]
        told = np.linalg.solve(moments[np.ix_(others, others)], moments[others, j])
        found.append(float(np.mean((b[:, j] - b[:, others] @ told) ** 2)))
    return found


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("sizes", [(40, 40), (7, 6, 3)])
def test_errors_of_unseen_samples_are_those_of_regressions_of_the_other_half(sizes, centred, monkeypatch):
    monkeypatch.setattr(Gram, "shrunk", lambda self: self.product)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(sum(sizes), 6)) @ rng.normal(size=(6, 6)) + 2.0
    columns = np.array([4, 0, 2, 1])
    model = nn.Sequential(nn.Linear(6, 3).double())
    batches = [(torch.tensor(part), None) for part in np.split(x, np.cumsum(sizes)[:-1])]
    found = unseen_errors(model, lambda: batches, {"0": {5: columns}}, {"0": centred}, RIDGE)["0"][5]
    even, odd = x[0::2], x[1::2]
    wanted = np.mean(
        [
            regressed_by_hand(even, odd, columns, centred),
            regressed_by_hand(odd, even, columns, centred),
        ],
        axis=0,
    )
    np.testing.assert_allclose(found[0].numpy(), wanted, rtol=1e-6)


def test_there_is_no_unseen_half_of_one_sample():
    model = nn.Sequential(nn.Linear(6, 3))
    one = [(torch.randn(1, 6), None)]
    assert unseen_errors(model, lambda: one, {"0": {0: np.arange(6)}}, {"0": True}, RIDGE) == {}


def test_costs_are_scaled_by_what_unseen_samples_lose():
    workload = Rows()
    space = trace(workload.model, workload.example_inputs)
    few = [(workload.x[:12], workload.y[:12])]
    moments, samples = gradient_moments(workload, workload.model, space, few, {"head"})
    grams = collect_grams(workload.model, mendable_consumers(workload.model, space), few)
    plain = eliminations(workload.model, space, grams, moments, samples, RIDGE)[0]
    unseen = errors_of_unseen_samples(workload.model, space, lambda: few, {"head"}, RIDGE)
    scaled = eliminations(workload.model, space, grams, moments, samples, RIDGE, unseen=unseen)[0]
    ratios = scaled.errors / plain.errors
    assert ratios.min() > 1.2  # eight features of twelve samples explain each other too well
    np.testing.assert_allclose(ratios, ratios[0], rtol=1e-3)
    assert scaled.order.tolist() == plain.order.tolist()
