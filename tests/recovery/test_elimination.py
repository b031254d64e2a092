"""Greedy elimination against brute force: every unit tried at every step."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlprune.errors import DataError
from rlprune.recovery import elimination

RIDGE = 1e-3


def experiment(inputs: int, outputs: int, seed: int, tokens: int = 60):
    """Correlated activations (tokens, I), their Gram matrix (I, I) and weights (I, O)."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(tokens, max(2, inputs // 2))) @ rng.normal(size=(max(2, inputs // 2), inputs))
    x += 0.3 * rng.normal(size=x.shape)
    return x, x.T @ x / tokens, rng.normal(size=(inputs, outputs))


def ridge_error(gram, w, kept, lam):
    """Least of E|W x - V x_k|^2 + lam |W - V|^2 over V, by least squares on the square root of A."""
    a = gram + lam * np.eye(len(gram))
    root = np.linalg.cholesky(a).T
    if not len(kept):
        return float(((root @ w) ** 2).sum())
    v = np.linalg.lstsq(root[:, kept], root @ w, rcond=None)[0]
    return float(((root @ w - root[:, kept] @ v) ** 2).sum())


def brute_force(gram, w, columns, ridge):
    """Try every unit at every step, solving each regression from scratch."""
    lam = ridge * gram.diagonal().mean()
    alive = list(range(len(columns)))
    order, errors = [], []
    while alive:
        tried = []
        for unit in alive:
            kept = [c for u in alive if u != unit for c in columns[u]]
            tried.append(ridge_error(gram, w, kept, lam))
        best = int(np.argmin(tried))
        order.append(alive.pop(best))
        errors.append(tried[best])
    return order, errors


class TestElimination:
    @given(
        units=st.integers(1, 9), size=st.integers(1, 3), outputs=st.integers(1, 5), seed=st.integers(0, 10**6)
    )
    @settings(max_examples=60, deadline=None)
    def test_it_equals_trying_every_unit_at_every_step(self, units, size, outputs, seed):
        _, gram, w = experiment(units * size, outputs, seed)
        columns = np.random.default_rng(seed).permutation(units * size).reshape(units, size)
        found = elimination.eliminate(torch.tensor(gram), torch.tensor(w), columns, RIDGE)
        order, errors = brute_force(gram, w, columns, RIDGE)
        np.testing.assert_allclose(found.errors, errors, rtol=1e-7, atol=1e-9)
        assert found.order.tolist() == order
        assert found.ranks[found.order].tolist() == list(range(units))

    @pytest.mark.parametrize("inputs", [63, 64, 65, 150])
    def test_delayed_updates_change_nothing(self, inputs, monkeypatch):
        """More units than one bundle of updates: single updates give the same order."""
        _, gram, w = experiment(inputs, 20, inputs, tokens=400)
        given_ = torch.tensor(gram), torch.tensor(w), np.arange(inputs)[:, None], RIDGE
        found = elimination.eliminate(*given_)
        monkeypatch.setattr(elimination, "_LAZY", 1)
        plain = elimination.eliminate(*given_)
        assert found.order.tolist() == plain.order.tolist()
        np.testing.assert_allclose(found.errors, plain.errors, rtol=1e-9)
        assert found.errors[-1] == pytest.approx(found.energy, rel=1e-9)
        assert (np.diff(found.errors) >= 0).all()

    def test_a_duplicate_goes_first_at_no_cost(self):
        _, gram, w = experiment(8, 4, 3)
        twin = np.arange(9) % 8
        gram, w = gram[np.ix_(twin, twin)], np.concatenate([w, w[:1]])
        found = elimination.eliminate(torch.tensor(gram), torch.tensor(w), np.arange(9)[:, None], 1e-9)
        assert found.order[0] in (0, 8) and found.errors[0] < 1e-6 * found.energy

    def test_unusable_activations_are_refused(self):
        with pytest.raises(DataError, match="not positive definite"):
            elimination.eliminate(
                torch.full((3, 3), torch.nan), torch.ones(3, 2), np.arange(3)[:, None], RIDGE
            )
