"""What cuts of a model of images are expected to cost: the closed form's error, weighted by the Fisher information.

Near the dense model an error e in what a layer reads costs ``KL = E[(sum_p g_p' e_p)^2] / 2`` nats an image, where p
runs over the places of the map and g is the gradient of log p(y) with respect to the layer's input through this layer
alone, under labels y that the model itself draws (the Fisher information; Martens 2020, arXiv 1412.1193; in its place
stands a root of the softmax's Hessian times random signs, which has the same second moments). That is the
Fisher information F of the layer's outputs, seen from its inputs: ``W' F W`` of a linear layer, and for a convolution
what its kernel makes of it. With errors and gradients of different places taken as independent, and of each other too
(Grosse and Martens 2016, arXiv 1602.01407, for convolutions; K-FAC, arXiv 1503.05671), the cost is
``tr(P E[e e']) / 2`` with ``P = E[sum_p g_p g_p']``. The error of the regression of removed channels on the kept ones
is known from the recovery's Gram matrices, so greedy elimination (`rlprune.recovery.elimination`) gives an order of
the units and the cost of every width, without a label and without running a cut model.

Regressions on a few hundred samples promise more than they keep, so the Gram matrices are shrunk first
(`rlprune.recovery.reconstruct.Gram.shrunk`), and what each layer is expected to lose is scaled by what single units
cost there on samples that no regression has seen (`rlprune.vision.held_out`). Errors are taken about their means: a
batch norm whose statistics are computed anew, or the intercept of a layer with a bias, takes a constant error away.
Only the units of the same group are counted on to stand in for removed ones: channels of other groups may be read by
the same layer (a residual stream in parts), but a plan cuts those too, and with their help a group looks all but free.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import DataError
from ..importance.calibration_cache import CalibrationSource, Curves
from ..importance.unit_scores import Batches
from ..pruning.space import Cut, PruningSpace
from ..recovery.elimination import Alone, Elimination, Reader, eliminate_units, reader
from ..recovery.reconstruct import Gram, input_rows
from ..tracing.graph import MIXERS
from ..utils.arrays import Ints
from ..utils.modes import evaluating
from ..utils.pytrees import sample_count, take
from ..utils.torch_internals import BATCH_NORM, CONVOLUTION
from .held_out import Unseen, inverse_of, unseen_errors

# Samples of one backward pass: what layers keep for it adds up.
_AT_ONCE = 64
# Share of the mean of P's diagonal that is added to it: what no gradient has shown counts a little.
_DAMPING = 1e-4


@dataclass
class Moments:
    """What one layer's input and the gradient there have in second moments, in sums over all samples and places.

    ``product`` (groups, I, I) is that of the gradient where the layer has a Gram matrix, groups being those of a
    convolution; elsewhere ``square`` (C,) is that of each channel's gradient, ``power`` (C,) the mean square of the
    channel itself over a sample's places.
    """

    whole: bool
    product: Tensor | None = field(default=None, repr=False)
    square: Tensor | None = field(default=None, repr=False)
    power: Tensor | None = field(default=None, repr=False)

    def watch(self, layer: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """A forward pre-hook: the gradient is that of this layer alone, also where several read one map."""
        x = arguments[0]
        own = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
        own.register_hook(lambda gradient: self._note(layer, x.detach(), gradient))
        return (own, *arguments[1:])

    def _note(self, layer: nn.Module, x: Tensor, gradient: Tensor) -> None:
        if self.whole:
            g = input_rows(layer, gradient)
            self.product = _plus(self.product, torch.einsum("ngi,ngj->gij", g, g).double())
        else:
            self.square = _plus(self.square, _squares(layer, gradient).sum(dim=(0, 1)))
            self.power = _plus(self.power, _squares(layer, x).mean(dim=1).sum(dim=0))


def _plus(total: Tensor | None, part: Tensor) -> Tensor:
    return part if total is None else total + part


def _squares(layer: nn.Module, x: Tensor) -> Tensor:
    """(samples, places, channels) of a layer's input, squared."""
    convolution = isinstance(layer, CONVOLUTION)
    rows = x.flatten(2).transpose(1, 2) if convolution else x.reshape(len(x), -1, x.shape[-1])
    return rows.double().square()


def consumers(model: nn.Module, space: PruningSpace) -> dict[str, Cut]:
    """The layers that read units of any group and mix them, by name, with the cut of their inputs."""
    modules = dict(model.named_modules())
    cuts = {c.tensor.removesuffix(".weight"): c for c in space.cuts if c.consumer}
    return {name: cut for name, cut in cuts.items() if isinstance(modules.get(name), MIXERS)}


def gradient_moments(
    source: CalibrationSource,
    model: nn.Module,
    space: PruningSpace,
    batches: Batches,
    mended: Container[str],
    seed: int = 0,
) -> tuple[dict[str, Moments], int]:
    """Moments of the gradients at what each consumer reads, by name, and how many samples they are sums over.

    A forward and a backward pass over ``batches``, with random directions at the outputs, drawn by ``seed`` (tasks that
    know none take the targets, see `Workload.drawn_loss`). No gradient reaches the parameters.

    Args:
        mended: names of the layers that have a Gram matrix.

    Raises:
        DataError: there are no batches.
    """
    found = {name: Moments(name in mended) for name in consumers(model, space)}
    handles = [model.get_submodule(n).register_forward_pre_hook(m.watch) for n, m in found.items()]
    trainable = [p for p in model.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(seed)
    samples = 0
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        with evaluating(model), torch.enable_grad():
            for inputs, targets in batches:
                count = sample_count(inputs, targets)
                for start in range(0, count, _AT_ONCE):
                    part = slice(start, min(start + _AT_ONCE, count))
                    loss = source.drawn_loss(model, take(inputs, part), take(targets, part), generator)
                    if loss.requires_grad:  # else the outputs depend on none of these layers
                        loss.backward()
                samples += count
    finally:
        for handle in handles:
            handle.remove()
        for parameter in trainable:
            parameter.requires_grad_(True)
    if not samples:
        raise DataError("calibration: the split is empty")
    return found, samples


def readers_of(model: nn.Module, space: PruningSpace) -> list[list[str]]:
    """The names of the `consumers` of each group."""
    owner = np.append(np.repeat(np.arange(len(space.groups)), space.unit_counts), -1)
    found: list[list[str]] = [[] for _ in space.groups]
    for name, cut in consumers(model, space).items():
        for group in np.unique(owner[space.axes[cut.axis].slots]):
            if group >= 0:
                found[group].append(name)
    return found


def eliminations(
    model: nn.Module,
    space: PruningSpace,
    grams: Mapping[str, Gram],
    moments: Mapping[str, Moments],
    samples: int,
    ridge: float = 1e-3,
    orders: Sequence[Ints] | None = None,
    unseen: Unseen | None = None,
) -> dict[int, Elimination]:
    """The order in which each group's units go, {group: elimination}; half of ``errors`` are nats a sample.

    Groups that no layer of a known kind reads are left out. ``orders`` (G arrays): the orders, where another ranking
    decides. ``unseen``: errors by which those of the Gram matrices are scaled (`errors_of_unseen_samples`).
    """
    layers, known = consumers(model, space), unseen or {}
    centred = _centred(model, layers)
    found: dict[int, Elimination] = {}
    for g, (group, names) in enumerate(zip(space.groups, readers_of(model, space), strict=True)):
        readers: list[Reader] = []
        for name in names:
            own = _Read.of(space, layers[name], g)
            if moments[name].whole:
                errors = known.get(name, {}).get(g)
                readers += own.mended(grams[name], moments[name], samples, centred[name], ridge, errors)
            else:
                readers += own.alone(moments[name], samples)
        if readers:
            found[g] = eliminate_units(readers, group.units, order=None if orders is None else orders[g])
    return found


def errors_of_unseen_samples(
    model: nn.Module,
    space: PruningSpace,
    batches: Callable[[], Batches],
    mended: Container[str],
    ridge: float,
) -> Unseen:
    """What units of each group cannot tell of each other, in the layers ``mended`` (`unseen_errors`)."""
    layers = {name: cut for name, cut in consumers(model, space).items() if name in mended}
    columns: dict[str, dict[int, Ints]] = {name: {} for name in layers}
    for g, names in enumerate(readers_of(model, space)):
        for name in names:
            if name in layers:
                columns[name][g] = _Read.of(space, layers[name], g).by_unit
    return unseen_errors(model, batches, columns, _centred(model, layers), ridge)


def _centred(model: nn.Module, layers: Iterable[str]) -> dict[str, bool]:
    """Whether a constant error of what a layer reads is taken away, by name: by a batch norm or by its own bias."""
    norms = any(isinstance(module, BATCH_NORM) for module in model.modules())
    return {name: norms or getattr(model.get_submodule(name), "bias", None) is not None for name in layers}


@dataclass(frozen=True)
class _Read:
    """Which columns of a layer's input are which units of a group: ``units`` (n,) of the columns ``places`` (n,)."""

    units: Ints
    places: Ints
    count: int

    @classmethod
    def of(cls, space: PruningSpace, cut: Cut, group: int) -> _Read:
        owner = np.append(np.repeat(np.arange(len(space.groups)), space.unit_counts), -1)
        slots = space.axes[cut.axis].slots
        places = np.flatnonzero(owner[slots] == group)
        return cls(slots[places] - space.offsets[group], places, space.groups[group].units)

    @property
    def by_unit(self) -> Ints:
        """The columns (n,) in the order of their units."""
        return self.places[np.argsort(self.units, kind="stable")]

    def mended(
        self,
        gram: Gram,
        moments: Moments,
        samples: int,
        centred: bool,
        ridge: float,
        unseen: Tensor | None,
    ) -> list[Reader]:
        """A reader for each group of a convolution."""
        if moments.product is None:  # no gradient has come to it
            return []
        units, counts = np.unique(self.units, return_counts=True)
        index = torch.from_numpy(self.by_unit).to(moments.product.device)
        inverses = inverse_of(gram, self.by_unit, centred, ridge)
        found: list[Reader] = []
        for k, (h, p) in enumerate(zip(inverses, moments.product / samples, strict=True)):
            p = p[index][:, index]
            if unseen is not None:
                p *= _ratio(
                    float(torch.dot(p.diagonal(), unseen[k])), float((p.diagonal() / h.diagonal()).sum())
                )
            p.diagonal().add_(_DAMPING * p.diagonal().mean())
            if len(set(counts.tolist())) == 1:
                found.append(reader([h, p], units, np.arange(len(index)).reshape(len(units), -1)))
            else:  # units of several sizes: each by itself
                found.append(Alone(self._summed((p.diagonal() / h.diagonal()).cpu(), np.sort(self.units))))
        return found

    def alone(self, moments: Moments, samples: int) -> list[Reader]:
        """What units cost a layer that is not mended: its outputs lose them."""
        if moments.square is None or moments.power is None:
            return []
        each = (moments.square * moments.power / samples**2).cpu()[self.places]
        return [Alone(self._summed(each, self.units))]

    def _summed(self, values: Tensor, units: Ints) -> Tensor:
        """Values (n,) of columns, summed over those of each unit (count,)."""
        return torch.zeros(self.count, dtype=torch.float64).index_add_(0, torch.from_numpy(units), values)


def _ratio(measured: float, expected: float) -> float:
    """How many times as large errors are as expected; 1 where that cannot be said."""
    ratio = measured / expected if expected > 0.0 else 0.0
    return ratio if 0.0 < ratio < float("inf") else 1.0


def divergence_curves(found: Mapping[int, Elimination]) -> Curves:
    """Expected KL (width + 1,) of each group when its first 0, 1, ..., all units of the order are gone."""
    return {group: np.concatenate([[0.0], one.errors / 2.0]) for group, one in found.items()}
