"""Closed-form reconstruction for nested rankings: one Cholesky factor a layer serves every width.

With the columns of a layer's input in the order of their units' ranks, ``A = E[x x'] + lambda I = L L'``.
The first k columns have the factor ``L_k``, the leading block of L, and the ridge solution for them is

    W_new' = (A_kk)^-1 A_k: W' = W_k' + L_k^-T (L_rk)' W_r'

because ``A_k: = L_k (L')[:k]``; r are the removed columns. So a candidate costs one product and one triangular solve a
layer, and nothing is kept but L: W is the dense model's own. It is the W_new that minimises
``E|W x - W_new x_k|^2 + lambda |W_new - W_k|^2``, the same as folding ``W_r`` into ``W_k`` by the regression of x_r on
x_k (:mod:`.reconstruct`); only lambda comes from the whole input here, where the fold for any set of channels takes it
from the kept ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from ...importance.unit_scores import Scores
from ...pruning.plan import Plan
from ...pruning.space import PruningSpace
from ...pruning.surgery import axis_indices
from ...recovery.prefixes import Triangle, Triangles, penalised
from ...recovery.shelf import DiskShelf, Shelf
from ...utils.arrays import Ints
from ..linear import tensor_of
from .compensation import shift_bias
from .grams import Consumer, GramSource, InputGram, unit_consumers


@dataclass(frozen=True)
class _Solved:
    """What one consumer needs: ``order`` (I,) the columns by rank, ``triangle`` the handle of L.

    ``mean`` (I,), in the columns' own order, and ``output`` (O,) are the means of
    the input and of what the weights make of it; None where no intercept is wanted.
    """

    consumer: Consumer
    units: Ints
    order: Ints
    triangle: Triangle
    mean: Tensor | None
    output: Tensor | None


class Factors:
    """What the closed form keeps of every consumer: a Cholesky factor, made from its Gram matrix.

    Args:
        model: the dense model; its weights are read for every candidate and have to stay as they are.
        ridge: penalty, as a share of the mean of the input's second moments.
        intercept: whether layers without a bias get one (the recovery step `bias`).
        shrink: further penalty on each input, as a share of its own second moment (see `penalised`).
        spill: folder in which they lie on disk instead of in memory; None keeps them in memory.

    A layer that has a bias always gets the intercept as well.
    """

    def __init__(
        self,
        model: nn.Module,
        ridge: float,
        *,
        intercept: bool = False,
        shrink: float = 0.0,
        spill: str | Path | None = None,
    ) -> None:
        self._model, self._ridge, self._intercept, self._shrink = model, ridge, intercept, shrink
        self.triangles = Triangles(Shelf() if spill is None else DiskShelf(spill))
        self.solved: dict[str, _Solved] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of memory that they take between candidates."""
        means = [t for s in self.solved.values() for t in (s.mean, s.output) if t is not None]
        return self.triangles.nbytes + sum(t.nbytes for t in means)

    def fit(self, consumers: Sequence[Consumer], importance: Scores | None) -> bool:
        """Whether these are the factors of some consumers under some unit scores (None: by index)."""
        if [c.name for c in consumers] != list(self.solved):
            return False
        return all(
            np.array_equal(self.solved[c.name].units, _by_rank(c, _row(importance, c))) for c in consumers
        )

    def add(self, consumer: Consumer, gram: InputGram, scores: ArrayLike | None) -> None:
        """Factorise the Gram matrix of a consumer's input, its units in the order of their ``scores`` (units,)."""
        with torch.no_grad():
            self.solved[consumer.name] = self._solve(consumer, gram, scores)

    def _solve(self, consumer: Consumer, gram: InputGram, scores: ArrayLike | None) -> _Solved:
        units = _by_rank(consumer, scores)
        order = consumer.columns[units].reshape(-1)
        centred = (self._intercept and consumer.lane < 0) or consumer.has_bias(self._model)
        index = torch.from_numpy(order.copy()).to(gram.product.device)
        product = (gram.centred() if centred else gram.product)[index[:, None], index]
        lower = penalised(product, gram.ridge(self._ridge), consumer.name, self._shrink)[1]
        del product
        mean = gram.mean if centred else None
        output = consumer.matrix(self._model).double().T @ gram.mean.double() if centred else None
        # The Gram matrices are in float32 unless the model is in float64: so are the factors.
        triangle = self.triangles.add(lower.to(gram.product.dtype))
        return _Solved(consumer, units, order, triangle, mean, output)

    def weights(self, solved: _Solved, columns: Ints, rows: Ints | None, dtype: torch.dtype) -> Tensor:
        """The dense weights (n, O) of some input columns, for the outputs ``rows`` (None: all)."""
        dense = solved.consumer.matrix(self._model)
        part = _picked(dense, columns)
        if rows is not None:
            part = part[:, torch.from_numpy(rows).to(dense.device)]
        return part.to(dtype)


def _picked(matrix: Tensor, rows: Ints) -> Tensor:
    """Some rows of a matrix (n, O) whose columns lie one after another in memory, as those of a transposed weight and
    of a triangular solution do: memory is read in order, which ``matrix[rows]`` does not."""
    return matrix.T.index_select(1, torch.from_numpy(rows).to(matrix.device)).T


def _row(importance: Scores | None, consumer: Consumer) -> ArrayLike | None:
    return None if importance is None else importance[consumer.group][consumer.place]


def _by_rank(consumer: Consumer, scores: ArrayLike | None) -> Ints:
    """The units of a consumer, the best first: the order of plan.best_units, ties by index."""
    if scores is None:
        return np.arange(len(consumer.columns))
    return np.argsort(-np.asarray(scores, dtype=np.float64), kind="stable")


class NestedReconstruction:
    """Ridge reconstruction of every attention and feed-forward consumer of a language model.

    Candidates whose kept units are the best-ranked ones (all that ``make_plan`` makes with the same
    importance) take the quick way; any other set is solved directly, with the same penalty.
    """

    def __init__(self, space: PruningSpace, factors: Factors) -> None:
        self._space = space
        self._factors = factors
        factors.triangles.settle()
        self._solved = list(factors.solved.values())

    @classmethod
    def of(
        cls,
        space: PruningSpace,
        grams: GramSource,
        factors: Factors,
        importance: Scores | None,
    ) -> NestedReconstruction:
        """From Gram matrices and empty factors; no matrix is asked for before the one before it is factorised.

        Args:
            importance: G arrays of unit scores, the ranking that plans will be made with; None: by index.
        """
        for consumer, gram in grams.each(unit_consumers(space)):
            factors.add(consumer, gram, _row(importance, consumer))
            del gram  # before the next block's are made
        return cls(space, factors)

    @property
    def nbytes(self) -> int:
        """Bytes of memory that are held between candidates."""
        return self._factors.nbytes

    def __call__(self, slim: nn.Module, plan: Plan) -> None:
        """Write the reconstructed weights (and intercepts) into ``slim``, which was cut by ``plan``."""
        indices = axis_indices(self._space, plan.kept)
        modules = dict(slim.named_modules())
        with torch.no_grad():
            for solved in self._solved:
                consumer = solved.consumer
                kept = indices[consumer.axis]
                if kept is None or consumer.module not in modules:
                    continue
                if consumer.lane >= 0:
                    self._mend_expert(slim, solved, plan)
                    continue
                rows = None if consumer.rows is None else indices[consumer.rows]
                nested = np.sort(solved.units[: len(plan.kept[consumer.group])])
                prefix = np.array_equal(nested, plan.kept[consumer.group])
                new = (self._leading if prefix else self._direct)(solved, kept, rows)
                self._write(slim, modules[consumer.module], solved, kept, rows, new)

    def _mend_expert(self, slim: nn.Module, solved: _Solved, plan: Plan) -> None:
        """Write the weights of one expert, where it is left and has lost neurons."""
        consumer = solved.consumer
        module = slim.get_submodule(consumer.module)
        whole, group = len(consumer.columns), plan.kept[consumer.group]
        kept = group[group // whole == consumer.lane] % whole
        left = self._space.lanes_left(plan.kept)[consumer.group]
        place = int(np.searchsorted(left, consumer.lane))
        if len(kept) in (0, whole):
            return
        prefix = np.array_equal(np.sort(solved.units[: len(kept)]), kept)
        new = (self._leading if prefix else self._direct)(solved, kept, None)
        name = consumer.tensor.rpartition(".")[2]
        tensor_of(module, name)[place].copy_(new if consumer.dim == 1 else new.T)
        if solved.mean is None or solved.output is None:
            return
        change = solved.output - solved.mean[torch.from_numpy(kept).to(new.device)].double() @ new.double()
        shift_bias(module, change, slim, f"{name}_bias", place)

    def _leading(self, solved: _Solved, kept: Ints, rows: Ints | None) -> Tensor:
        """Weights (k, O) for the best-ranked columns, in the order of ``kept``."""
        size, order = len(kept), solved.order
        upper, beside = self._factors.triangles.leading(solved.triangle, size, len(order))
        right = beside @ self._factors.weights(solved, order[size:], rows, beside.dtype)
        change = torch.linalg.solve_triangular(upper, right, upper=True)
        return self._factors.weights(solved, kept, rows, change.dtype) + _picked(
            change, np.argsort(order[:size])
        )

    def _direct(self, solved: _Solved, kept: Ints, rows: Ints | None) -> Tensor:
        """Weights (k, O) for any columns: their rows of A come back from the factor."""
        order = solved.order
        triangle = self._factors.triangles.upper(solved.triangle, len(order))
        upper = triangle.triu().double()
        places = np.argsort(order)
        gone = np.setdiff1d(np.arange(len(order)), kept)
        part, other = (upper[:, torch.from_numpy(places[c]).to(upper.device)] for c in (kept, gone))
        right = part.T @ (other @ self._factors.weights(solved, gone, rows, upper.dtype))
        change = torch.linalg.solve(part.T @ part, right)
        return (self._factors.weights(solved, kept, rows, upper.dtype) + change).to(triangle.dtype)

    @staticmethod
    def _write(
        slim: nn.Module, layer: nn.Module, solved: _Solved, kept: Ints, rows: Ints | None, new: Tensor
    ) -> None:
        if len(kept):  # else the part is dropped, and its output layer is a bias alone
            tensor_of(layer, "weight").copy_(new if solved.consumer.dim == 0 else new.T)
        if solved.mean is None or solved.output is None:
            return
        index = torch.from_numpy(kept).to(new.device)
        output = solved.output
        if rows is not None:
            output = output[torch.from_numpy(rows).to(output.device)]
        shift_bias(layer, output - solved.mean[index].double() @ new.double(), slim)
