"""Closed-form reconstruction: removed units are regressed on the kept ones and folded into the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import EllipsisType

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import DataError
from ..importance.unit_scores import Batches, Scores
from ..pruning.plan import Plan
from ..pruning.space import Cut, PruningSpace
from ..pruning.surgery import axis_indices
from ..tracing.graph import MIXERS
from ..utils.arrays import Ints
from ..utils.modes import evaluating
from ..utils.pytrees import call
from ..utils.torch_internals import CONVOLUTION
from .prefixes import NestedRegression, Triangles

# A Gram matrix wider than this (VGG's first linear layer has 25,088 inputs) costs more than it mends.
MAX_INPUTS = 4608
# Narrower layers are solved anew for every plan: one factor for all of them saves nothing there.
SHARED_FROM = 128


@dataclass(frozen=True)
class Gram:
    """Second moments of a layer's input channels over the calibration data.

    ``product`` (groups, I, I) is the mean of x x', ``mean`` (groups, I) the mean of x, with I the input
    channels of one convolution group. ``noise`` (groups,) is the share of the squared covariances of different
    channels that is expected of chance alone, from how two halves of the data differ.
    """

    product: Tensor
    mean: Tensor
    noise: Tensor

    def shrunk(self) -> Tensor:
        """``product`` with the covariances of different channels reduced by their ``noise``, (groups, I, I).

        The covariance nearest to the true one on the line to its diagonal (Ledoit and Wolf 2004, A well-conditioned
        estimator for large-dimensional covariance matrices). A linear layer may have more inputs than there are
        samples: then few of them seem to tell all others, and only on these samples.
        """
        centre = self.mean.unsqueeze(-1) * self.mean.unsqueeze(-2)
        covariance = self.product - centre
        own = covariance.diagonal(dim1=1, dim2=2).clone()
        covariance = covariance * (1.0 - self.noise)[:, None, None]
        covariance.diagonal(dim1=1, dim2=2).copy_(own)
        return centre + covariance


class Reconstruction:
    """Gram matrices of all consumers, cached once, and the ridge regression that uses them.

    For a consumer with weights W and input x split into kept (k) and removed (r) channels, the best
    linear estimate of x_r from x_k is B' x_k with ``B = (G_kk + ridge * mean(diag G_kk) I)^-1 G_kr``, so
    ``W_k + W_r B'`` stands in for the whole layer: the least-squares reconstruction of channel pruning
    (He et al. 2017, arXiv 1707.06168) in closed form. Channels are regressed pixel by pixel and the
    same B serves every kernel position. A layer with a bias gets the intercept as well; without one
    the regression goes through the origin.

    A layer of ``SHARED_FROM`` inputs or more whose columns all belong to one group keeps one factor for all widths
    (`recovery.prefixes`), whose penalty is ``ridge * mean(diag G)`` of the whole input. It is made when a plan first
    cuts the layer.

    Args:
        importance: G arrays of unit scores, the ranking that plans will be made with; None: by index.
        grams: of all `mendable_consumers`, where they have been collected already; ``batches`` are not read then.
    """

    def __init__(
        self,
        model: nn.Module,
        space: PruningSpace,
        batches: Batches,
        ridge: float,
        importance: Scores | None = None,
        grams: Mapping[str, Gram] | None = None,
    ) -> None:
        self._ridge = ridge
        self._space = space
        self._triangles = Triangles()
        self._nested: dict[str, NestedRegression | None] = {}
        self._dense = dict(model.named_parameters())
        self._consumers = mendable_consumers(model, space)
        self._rows = {c.tensor: c for c in space.cuts if not c.consumer and c.tensor.endswith(".weight")}
        if grams is None:
            grams = collect_grams(model, self._consumers, batches)
        self._products = {name: gram.product for name, gram in grams.items()}
        self._means = {name: gram.mean for name, gram in grams.items()}
        # The columns of each layer that has one factor for all widths, by rank.
        self._orders: dict[str, Ints] = {}
        for name, product in self._products.items():
            order = _ranked_columns(space, self._consumers[name], importance)
            if order is not None and len(order) >= SHARED_FROM and len(product) == 1:
                self._orders[name] = order

    def __call__(self, slim: nn.Module, plan: Plan) -> None:
        """Fold the removed units into the weights of ``slim`` (in place), which was cut by ``plan``."""
        indices = axis_indices(self._space, plan.kept)
        modules = dict(slim.named_modules())
        with torch.no_grad():
            for name, cut in self._consumers.items():
                kept = indices[cut.axis]
                if kept is not None:
                    rows = self._rows.get(cut.tensor)
                    self._fold(modules[name], cut, kept, indices[rows.axis] if rows else None)

    def _fold(self, layer: nn.Module, cut: Cut, kept: Ints, rows: Ints | None) -> None:
        assert isinstance(layer, MIXERS)
        mean = self._means[cut.tensor.removesuffix(".weight")]
        device = layer.weight.device
        k = torch.from_numpy(kept).to(device)
        r = torch.from_numpy(np.setdiff1d(np.arange(mean.shape[-1]), kept)).to(device)
        b = self._regression(layer, cut, kept, k, r)
        dense = self._dense[cut.tensor].detach()
        if rows is not None:
            dense = dense.index_select(1 - cut.dim, torch.from_numpy(rows).to(device))
        removed = dense.index_select(cut.dim, r)
        groups = layer.groups if isinstance(layer, CONVOLUTION) else 1
        if cut.dim == 1:
            # (O, R, ...) -> (groups, O/groups, R, rest); each group of outputs has inputs of its own
            parts = removed.reshape(groups, removed.shape[0] // groups, removed.shape[1], -1)
            change = torch.einsum("gkr,gorp->gokp", b.to(parts.dtype), parts)
        else:
            parts = removed.reshape(1, removed.shape[0], removed.shape[1], -1)
            change = torch.einsum("gkr,grop->gkop", b.to(parts.dtype), parts)
        layer.weight += change.reshape(layer.weight.shape)
        if layer.bias is not None and cut.dim == 1:
            left = mean[:, r] - torch.einsum("gkr,gk->gr", b, mean[:, k])
            offset = torch.einsum("gr,gorp->go", left.to(parts.dtype), parts)
            layer.bias += offset.reshape(-1)

    def _regression(self, layer: nn.Module, cut: Cut, kept: Ints, k: Tensor, r: Tensor) -> Tensor:
        """B (groups, K, R) of the removed input columns on the kept ones."""
        name = cut.tensor.removesuffix(".weight")
        if name in self._orders and name not in self._nested:
            self._nested[name] = self._factorised(layer, name)
        nested = self._nested.get(name)
        return (
            _regress(self._product(layer, name), k, r, self._ridge) if nested is None else nested(kept)[None]
        )

    def _factorised(self, layer: nn.Module, name: str) -> NestedRegression | None:
        """The one factor of a layer, whose Gram matrix is freed; None where it cannot be factorised."""
        product = self._product(layer, name)[0]
        try:
            nested = NestedRegression(product, self._orders[name], self._ridge, self._triangles)
        except DataError:  # not positive definite in this precision
            return None
        del self._products[name]
        return nested

    def _product(self, layer: nn.Module, name: str) -> Tensor:
        """What a regression with or without an intercept works on, (groups, I, I)."""
        product, mean = self._products[name], self._means[name]
        return product if layer.bias is None else product - mean.unsqueeze(-1) * mean.unsqueeze(-2)


def mendable_consumers(model: nn.Module, space: PruningSpace) -> dict[str, Cut]:
    """The layers whose weights can take up what their removed inputs gave, by name, with the cut of their inputs."""
    modules = dict(model.named_modules())
    found = {}
    for cut in space.cuts:
        name = cut.tensor.removesuffix(".weight")
        if cut.consumer and _mendable(modules.get(name), len(space.axes[cut.axis].slots)):
            found[name] = cut
    return found


def _ranked_columns(space: PruningSpace, cut: Cut, importance: Scores | None) -> Ints | None:
    """A layer's input columns by the rank of their units, best first; None where they belong to several groups."""
    slots = space.axes[cut.axis].slots
    owners = np.unique(np.searchsorted(space.offsets, slots, side="right")) - 1
    if len(owners) != 1 or owners[0] < 0:
        return None
    group = int(owners[0])
    ranks = np.arange(space.groups[group].width)
    if importance is not None:  # the order of plan.best_units: highest score first, ties by index
        ranks[np.argsort(-np.asarray(importance[group], dtype=np.float64), kind="stable")] = ranks.copy()
    return np.argsort(ranks[slots - space.offsets[group]], kind="stable")


def _mendable(layer: nn.Module | None, inputs: int) -> bool:
    """Whether a layer's weights can take up what its removed inputs gave."""
    if not isinstance(layer, MIXERS) or inputs > MAX_INPUTS:
        return False
    # A grouped transposed convolution keeps its inputs in one dimension and its groups in another.
    return not (isinstance(layer, CONVOLUTION) and layer.transposed and layer.groups > 1)


def _regress(product: Tensor, k: Tensor, r: Tensor, ridge: float) -> Tensor:
    kk = product.index_select(1, k).index_select(2, k)
    kr = product.index_select(1, k).index_select(2, r)
    scale = kk.diagonal(dim1=1, dim2=2).mean(dim=1).clamp_min(1e-12)
    kk = kk + (ridge * scale)[:, None, None] * torch.eye(len(k), dtype=kk.dtype, device=kk.device)
    factor, failed = torch.linalg.cholesky_ex(kk)
    if bool(failed.any()):  # not positive definite in this precision
        return torch.linalg.lstsq(kk, kr).solution
    return torch.cholesky_solve(kr, factor)


def collect_grams(model: nn.Module, names: Iterable[str], batches: Batches) -> dict[str, Gram]:
    """The Gram matrices of what the named layers read, by name: one pass over ``batches``."""
    layers = {name: model.get_submodule(name) for name in names}
    halves: dict[str, tuple[_Half, _Half]] = {name: (_Half(), _Half()) for name in layers}

    def note(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = input_rows(layer, inputs[0])
            if x.shape[-1] >= SHARED_FROM and not isinstance(layer, CONVOLUTION):
                # A few rows of a large mean: in float32 the covariance would lose to rounding what the ridge adds.
                x = x.double()
            # The rows of a sample stand together, so that halves of a batch have no sample in common.
            middle = len(x) // 2
            halves[name][0].add(x[:middle])
            halves[name][1].add(x[middle:])

        return hook

    handles = [layer.register_forward_pre_hook(note(name)) for name, layer in layers.items()]
    try:
        with torch.no_grad(), evaluating(model):
            for inputs, _ in batches:
                call(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return {name: _gram(*halves.pop(name)) for name in layers if halves[name][1].rows}


@dataclass
class _Half:
    """Sums over the rows of one half of the data: of x x' (groups, I, I), of x (groups, I), and how many they are."""

    product: Tensor | float = 0.0
    total: Tensor | float = 0.0
    rows: int = 0

    def add(self, x: Tensor) -> None:
        if len(x):
            self.product = torch.einsum("ngi,ngj->gij", x, x).double() + self.product
            self.total = x.sum(dim=0).double() + self.total
            self.rows += len(x)

    @property
    def covariance(self) -> Tensor:
        assert isinstance(self.product, Tensor) and isinstance(self.total, Tensor)
        mean = self.total / self.rows
        return self.product / self.rows - mean.unsqueeze(-1) * mean.unsqueeze(-2)


def _gram(first: _Half, second: _Half) -> Gram:
    rows = first.rows + second.rows
    product, mean = (second.product + first.product) / rows, (second.total + first.total) / rows
    assert isinstance(product, Tensor) and isinstance(mean, Tensor)
    if not first.rows:
        return Gram(product, mean, product.new_zeros(len(product)))
    # The mean of two halves varies by a quarter of what their difference does.
    chance = _between_channels(first.covariance - second.covariance) / 4.0
    whole = _between_channels(product - mean.unsqueeze(-1) * mean.unsqueeze(-2))
    return Gram(product, mean, (chance / whole.clamp_min(1e-30)).clamp(0.0, 1.0))


def _between_channels(matrices: Tensor) -> Tensor:
    """Sum of the squares (groups,) of matrices (groups, I, I) off their diagonals."""
    own = matrices.diagonal(dim1=1, dim2=2).square().sum(dim=1)
    return matrices.square().sum(dim=(1, 2)) - own


def input_rows(layer: nn.Module, x: Tensor) -> Tensor:
    """The layer's input as samples: (rows, groups, channels of a group)."""
    if not isinstance(layer, CONVOLUTION):
        return x.reshape(-1, 1, x.shape[-1])
    groups = 1 if layer.transposed else layer.groups
    if all(n == 1 for n in layer.kernel_size) and any(n > 1 for n in layer.stride):
        seen: tuple[EllipsisType | slice, ...] = (..., *(slice(None, None, n) for n in layer.stride))
        x = x[seen]  # the pixels that a 1x1 kernel reads
    flat = x.flatten(2).transpose(1, 2)
    return flat.reshape(-1, groups, x.shape[1] // groups)
