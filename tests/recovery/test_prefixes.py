"""One factor of a Gram matrix serves every prefix of a ranking, against a solution of its own for each of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import rlprune
from rlprune.errors import DataError
from rlprune.pruning.plan import Plan
from rlprune.recovery import reconstruct
from rlprune.recovery.prefixes import NestedRegression, Triangles
from rlprune.recovery.reconstruct import Reconstruction
from rlprune.recovery.shelf import Shelf

RIDGE = 1e-3


class TestTriangles:
    def test_two_share_a_buffer_and_come_back(self):
        shelf = Shelf()
        store = Triangles(shelf)
        made = [torch.tril(torch.randn(n, n)) for n in (5, 5, 7, 5)]
        handles = [store.add(m) for m in made]
        for handle, m in zip(handles, made, strict=True):
            for size in (1, 3, len(m)):
                assert torch.equal(store.upper(handle, size).triu(), m[:size, :size].T)
                upper, beside = store.leading(handle, size, len(m))
                assert torch.equal(upper.triu(), m[:size, :size].T)
                assert torch.equal(beside, m[size:, :size].T)
        assert store.nbytes == 4 * (2 * 5 * 6 + 7 * 8) > shelf.nbytes
        store.settle()
        assert store.nbytes == shelf.nbytes == 4 * (2 * 5 * 6 + 7 * 8)
        assert torch.equal(store.upper(handles[-1], 5).triu(), made[-1].T)


def gram_of(seed: int, inputs: int, rows: int) -> torch.Tensor:
    x = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.T @ x / rows


def solved_alone(product: torch.Tensor, kept: np.ndarray) -> torch.Tensor:
    """``(A_kk)^-1 A_kr`` by an inverse of its own, with the penalty of the whole input."""
    a = product + RIDGE * product.diagonal().mean() * torch.eye(len(product), dtype=torch.float64)
    gone = np.setdiff1d(np.arange(len(product)), kept)
    return torch.linalg.solve(a[kept][:, kept], a[kept][:, gone])


class TestNestedRegression:
    @given(st.integers(0, 10**6), st.integers(2, 40), st.integers(1, 60), st.data())
    @settings(max_examples=60, deadline=None)
    def test_leading_blocks_give_every_prefix_and_any_other_columns_too(self, seed, inputs, rows, data):
        product, rng = gram_of(seed, inputs, rows), np.random.default_rng(seed)
        order, store = rng.permutation(inputs), Triangles()
        store.add(torch.eye(inputs, dtype=torch.float64))  # so that the factor may lie in a second half
        nested = NestedRegression(product, order, RIDGE, store)
        size = data.draw(st.integers(1, inputs - 1))
        for kept in (np.sort(order[:size]), np.sort(rng.permutation(inputs)[:size])):
            wanted = solved_alone(product, kept)
            # The condition of A is at most inputs / RIDGE: some 1e-11 of float64's 1e-16 is lost.
            torch.testing.assert_close(nested(kept), wanted, rtol=1e-8, atol=1e-10)

    def test_a_matrix_that_is_not_positive_definite_is_refused(self):
        product = torch.diag(torch.tensor([1.0, -1.0, 2.0], dtype=torch.float64))
        with pytest.raises(DataError, match="not positive definite"):
            NestedRegression(product, np.arange(3), RIDGE, Triangles())


class Wide(nn.Module):
    """Layers that are wide enough for a shared factor: a convolution, a strided 1x1 one, a linear layer with a bias."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.b = nn.Conv2d(width, width + 2, 3, padding=1)
        self.c = nn.Conv2d(width + 2, width, 1, stride=2, bias=False)
        self.head = nn.Linear(width, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.c(torch.relu(self.b(torch.relu(self.a(x))))))
        return self.head(x.mean(dim=(2, 3)))


def prepared(monkeypatch, least: int, ridge: float, importance=None):
    torch.manual_seed(0)
    net = Wide().double().eval()
    batches = [(torch.randn(40, 3, 6, 6, dtype=torch.float64), torch.zeros(40))]
    space = rlprune.trace(net, batches[0][0][:1])
    monkeypatch.setattr(reconstruct, "SHARED_FROM", least)
    scores = [np.random.default_rng(g).random(group.width) for g, group in enumerate(space.groups)]
    fold = Reconstruction(net, space, batches, ridge, scores if importance is None else importance(space))
    return net, space, scores, fold


@pytest.mark.parametrize("ranked", [True, False])
def test_shared_factors_mend_layers_as_solutions_of_their_own_do(monkeypatch, ranked):
    """With a penalty of almost nothing the two ways are the same regression."""
    net, space, scores, alone = prepared(monkeypatch, 10**6, 1e-12)
    *_, shared = prepared(monkeypatch, 1, 1e-12)
    rng = np.random.default_rng(1)
    for _ in range(4):
        widths = np.array([rng.integers(2, g.width) for g in space.groups])
        if ranked:
            plan = rlprune.make_plan(space, importance=scores, widths=widths)
        else:
            kept = tuple(
                np.sort(rng.permutation(g.width)[:w]) for g, w in zip(space.groups, widths, strict=True)
            )
            plan = Plan(space, widths, kept)
        ours, theirs = rlprune.prune(net, plan), rlprune.prune(net, plan)
        before = [p.clone() for p in ours.parameters()]
        shared(ours, plan)
        alone(theirs, plan)
        assert any(not torch.equal(a, b) for a, b in zip(before, ours.parameters(), strict=True))
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    assert shared._products == {} and len(alone._products) == 3  # the factors take the place of the matrices


def test_narrow_layers_keep_their_own_penalty(monkeypatch):
    """What earlier versions scored is scored to the bit again: below `SHARED_FROM` nothing has changed."""
    assert reconstruct.SHARED_FROM == 128
    net, space, scores, fold = prepared(monkeypatch, 15, RIDGE)
    plan = rlprune.make_plan(space, importance=scores, widths=[5, 6, 7])
    fold(rlprune.prune(net, plan), plan)
    assert fold._nested == {} and len(fold._products) == 3


def test_the_factor_is_made_once_whatever_is_asked_first(monkeypatch):
    net, space, scores, fold = prepared(monkeypatch, 1, RIDGE)
    *_, again = prepared(monkeypatch, 1, RIDGE)
    plans = [rlprune.make_plan(space, importance=scores, widths=w) for w in ([5, 6, 7], [9, 3, 4])]
    found = []
    for mend, order in ((fold, plans), (again, plans[::-1])):
        models = {}
        for plan in order:
            models[id(plan)] = rlprune.prune(net, plan)
            mend(models[id(plan)], plan)
        found.append([models[id(plan)] for plan in plans])
    for a, b in zip(*found, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_few_rows_of_a_large_mean_have_a_factor(monkeypatch):
    """In float32 their covariance is not positive definite, and least squares would take seconds for every plan."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 200), nn.ReLU(), nn.Linear(200, 5)).eval()
    with torch.no_grad():
        net[0].bias += 30.0
        net[0].weight *= 1e-2
    batches = [(torch.randn(8, 3), torch.zeros(8))]
    space = rlprune.trace(net, batches[0][0][:1])
    fold = Reconstruction(net, space, batches, RIDGE)
    plan = rlprune.make_plan(space, importance=[np.arange(200.0)[::-1]], widths=[100])
    slim = rlprune.prune(net, plan)
    fold(slim, plan)
    assert fold._nested["2"] is not None
    x = torch.randn(8, 3)
    torch.testing.assert_close(slim(x), net(x), rtol=0, atol=1e-2)
