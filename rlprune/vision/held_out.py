"""What regressions of units on each other leave unexplained, on samples that they have not seen.

A regression of removed channels on the kept ones fits the samples that it is made on, the better the more channels
there are for a sample: late layers have many channels and few places. So the samples of even and of odd number are told
apart, and each half is explained by what was learned of the other one. Gram matrices of the halves are all that is
needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from ..errors import DataError
from ..importance.unit_scores import Batches
from ..recovery.prefixes import penalised
from ..recovery.reconstruct import Gram, collect_grams
from ..utils.arrays import Ints
from ..utils.pytrees import sample_count, take

Unseen = Mapping[str, Mapping[int, Tensor]]
"""{layer: {group: mean square (groups of a convolution, n) of what is left of each of its n columns}}."""


def unseen_errors(
    model: nn.Module,
    batches: Callable[[], Batches],
    layers: Mapping[str, Mapping[int, Ints]],
    centred: Mapping[str, bool],
    ridge: float,
) -> Unseen:
    """Errors of each column of a group, told by the other ones of it; {} where there are fewer than two samples.

    Args:
        batches: gives all samples anew.
        layers: the columns (n,) of each group, by name of the layer that reads them.
        centred: whether the mean of a layer's input does not count, by its name.
        ridge: see `inverse_of`.
    """
    halves = [collect_grams(model, layers, _half(batches(), half)) for half in (0, 1)]
    found: dict[str, dict[int, Tensor]] = {}
    for name, groups in layers.items():
        if all(name in half for half in halves):
            even, odd = (half.pop(name) for half in halves)
            found[name] = {
                group: (_errors(even, odd, columns, centred[name], ridge)
                        + _errors(odd, even, columns, centred[name], ridge)) / 2.0
                for group, columns in groups.items()
            }  # fmt: skip
    return found


def inverse_of(gram: Gram, columns: Ints, centred: bool, ridge: float) -> list[Tensor]:
    """The inverse (n, n) of the penalised second moments of some columns, for each group of a convolution.

    Args:
        centred: take moments about the mean, if anything but rounding is left of them.
        ridge: penalty, as a share of the mean of their diagonal.
    """
    whole = gram.shrunk()
    product = whole - gram.mean.unsqueeze(-1) * gram.mean.unsqueeze(-2) if centred else whole
    index = torch.from_numpy(columns).to(whole.device)
    found = []
    for a, second in zip(product, whole, strict=True):
        try:
            factor = penalised(a[index][:, index], ridge)[1]
        except DataError:  # activations that hardly vary about a large mean
            factor = penalised(second[index][:, index], ridge)[1]
        found.append(torch.cholesky_inverse(factor))
    return found


def _errors(known: Gram, unseen: Gram, columns: Ints, centred: bool, ridge: float) -> Tensor:
    """Mean squares (groups, n) over the samples of ``unseen`` under the regressions of ``known``."""
    index = torch.from_numpy(columns).to(known.mean.device)
    product = unseen.product
    if centred:
        shift = unseen.mean - known.mean
        centre = unseen.mean.unsqueeze(-1) * unseen.mean.unsqueeze(-2)
        product = product - centre + shift.unsqueeze(-1) * shift.unsqueeze(-2)
    found = []
    for inverse, second in zip(inverse_of(known, columns, centred, ridge), product, strict=True):
        left = inverse / inverse.diagonal()  # column j: what takes the regression on all others from column j
        found.append((left * (second[index][:, index] @ left)).sum(dim=0))
    return torch.stack(found)


def _half(batches: Batches, half: int) -> Batches:
    """The samples of even (0) or of odd (1) number."""
    first = 0
    for inputs, targets in batches:
        own, count = slice((half - first) % 2, None, 2), sample_count(inputs, targets)
        if own.start < count:
            yield take(inputs, own), take(targets, own)
        first += count
