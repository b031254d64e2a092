"""Closed-form reconstruction for nested rankings: one Cholesky factor a layer serves every width.

With the columns of a layer's input in the order of their units' ranks, ``A = E[x x'] + lambda I = L L'``.
The first k columns have the factor ``L_k``, the leading block of L, and the ridge solution for them is

    W_new' = (A_kk)^-1 A_k: W' = L_k^-T (L' W')[:k]

because ``A_k: = L_k (L')[:k]``. So ``Y = L' W'`` is formed once and a candidate costs one triangular solve
a layer. It is the W_new that minimises ``E|W x - W_new x_k|^2 + lambda |W_new - W_k|^2``, the same as folding
``W_r`` into ``W_k`` by the regression of x_r on x_k (:mod:`.reconstruct`); only lambda comes from the whole
input here, where the fold for any set of channels takes it from the kept ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ...importance.unit_scores import Scores
from ...pruning.plan import Plan
from ...pruning.space import PruningSpace
from ...pruning.surgery import axis_indices
from ...recovery.prefixes import Triangles, penalised
from ...utils.arrays import Ints
from ..families import tensor_of
from .compensation import shift_bias
from .grams import Consumer, Grams, InputGram, unit_consumers


@dataclass(frozen=True)
class _Solved:
    """What one consumer needs: ``order`` (I,) the columns by rank, ``triangle`` the handle of L, ``target`` Y (I, O).

    ``mean`` (I,), in the columns' own order, and ``output`` (O,) are the means of the input and of what the
    weights make of it; None where no intercept is wanted.
    """

    consumer: Consumer
    units: Ints
    order: Ints
    triangle: tuple[int, bool]
    target: Tensor
    mean: Tensor | None
    output: Tensor | None


class NestedReconstruction:
    """Ridge reconstruction of every attention and feed-forward consumer of a language model.

    Candidates whose kept units are the best-ranked ones (all that ``make_plan`` makes with the same
    importance) take the quick way; any other set is solved directly, with the same penalty.

    Args:
        grams: from :func:`.grams.collect`; each entry is taken out and freed as soon as it is factorised.
        importance: G arrays of unit scores, the ranking that plans will be made with; None: by index.
        intercept: whether layers without a bias get one (the recovery step `bias`).
        shrink: further penalty on each input, as a share of its own second moment (see `penalised`).

    A layer that has a bias always gets the intercept as well.
    """

    def __init__(
        self,
        model: nn.Module,
        space: PruningSpace,
        grams: Grams,
        importance: Scores | None,
        ridge: float,
        *,
        intercept: bool = False,
        shrink: float = 0.0,
    ) -> None:
        self._space = space
        self._shrink = shrink
        self._triangles = Triangles()
        with torch.no_grad():
            self._solved = [
                self._solve(model, c, grams.pop(c.module), importance, ridge, intercept)
                for c in unit_consumers(space)
            ]

    @property
    def nbytes(self) -> int:
        """Bytes that are held between candidates."""
        tensors = [t for s in self._solved for t in (s.target, s.mean, s.output) if t is not None]
        return self._triangles.nbytes + sum(t.nbytes for t in tensors)

    def _solve(
        self,
        model: nn.Module,
        consumer: Consumer,
        gram: InputGram,
        importance: Scores | None,
        ridge: float,
        intercept: bool,
    ) -> _Solved:
        units = np.arange(len(consumer.columns))
        if importance is not None:
            # the order of plan.best_units: highest score first, ties by index
            units = np.argsort(-np.asarray(importance[consumer.group], dtype=np.float64), kind="stable")
        order = consumer.columns[units].reshape(-1)
        centred = intercept or consumer.has_bias(model)
        index = torch.from_numpy(order.copy()).to(gram.product.device)
        product = (gram.centred() if centred else gram.product)[index[:, None], index]
        lower = penalised(product, ridge, consumer.module, self._shrink)[1]
        weights = consumer.matrix(model)
        # The Gram matrices are in float32 unless the model is in float64: so are the factors.
        dtype = gram.product.dtype
        target = (lower.T @ weights[index].double()).to(dtype)
        mean = gram.mean if centred else None
        output = weights.double().T @ gram.mean.double() if centred else None
        return _Solved(consumer, units, order, self._triangles.add(lower.to(dtype)), target, mean, output)

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
                rows = None if consumer.rows is None else indices[consumer.rows]
                nested = np.sort(solved.units[: len(plan.kept[consumer.group])])
                prefix = np.array_equal(nested, plan.kept[consumer.group])
                new = (self._leading if prefix else self._direct)(solved, kept, rows)
                self._write(modules[consumer.module], solved, kept, rows, new)

    def _leading(self, solved: _Solved, kept: Ints, rows: Ints | None) -> Tensor:
        """Weights (k, O) for the best-ranked columns, in the order of ``kept``."""
        size = len(kept)
        right = solved.target[:size]
        if rows is not None:
            right = right[:, torch.from_numpy(rows).to(right.device)]
        new = torch.linalg.solve_triangular(self._triangles.upper(solved.triangle, size), right, upper=True)
        return new[torch.from_numpy(np.argsort(solved.order[:size])).to(new.device)]

    def _direct(self, solved: _Solved, kept: Ints, rows: Ints | None) -> Tensor:
        """Weights (k, O) for any columns: their rows of A come back from the factor."""
        upper = self._triangles.upper(solved.triangle, len(solved.order)).triu().double()
        place = np.argsort(solved.order)[kept]
        part = upper[:, torch.from_numpy(place).to(upper.device)]  # (I, k)
        right = part.T @ solved.target.double()
        if rows is not None:
            right = right[:, torch.from_numpy(rows).to(right.device)]
        return torch.linalg.solve(part.T @ part, right).to(solved.target.dtype)

    def _write(self, layer: nn.Module, solved: _Solved, kept: Ints, rows: Ints | None, new: Tensor) -> None:
        tensor_of(layer, "weight").copy_(new if solved.consumer.dim == 0 else new.T)
        if solved.mean is None or solved.output is None:
            return
        index = torch.from_numpy(kept).to(new.device)
        output = solved.output
        if rows is not None:
            output = output[torch.from_numpy(rows).to(output.device)]
        shift_bias(layer, output - solved.mean[index].double() @ new.double())
