"""What is measured once of a model of images: Gram matrices, and what every width of a group is expected to cost."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch

from ..importance.calibration_cache import CURVES, CalibrationCache, Curves
from ..importance.importance import l2
from ..importance.unit_scores import Scores
from ..recovery.elimination import Elimination
from ..recovery.reconstruct import Gram, collect_grams, mendable_consumers
from ..utils.arrays import Floats, Ints
from ..utils.modes import evaluating
from .fisher import (
    divergence_curves,
    eliminations,
    errors_of_unseen_samples,
    gradient_moments,
    readers_of,
)

GRAMS = "grams"
# Calibration samples of the backward passes: moments of gradients need no more.
FISHER_SAMPLES = 256
# Bytes of second moments, (I, I) in float64 a layer of gradients and of two halves of the inputs: above this they are
# not measured unasked.
MOST_BYTES = 2_000_000_000
_EACH_BYTES = 3 * 8.0


class VisionCalibration(CalibrationCache):
    """Gram matrices of all layers that can be mended, and what cuts of each group are expected to cost."""

    def grams(self) -> Mapping[str, Gram]:
        """Second moments of what the consumers read, over what the recovery reads; kept until `take_grams`."""
        return self.cached(
            GRAMS,
            lambda: collect_grams(
                self.model, mendable_consumers(self.model, self.space), self.batches(self.recovery_limit)
            ),
        )

    def take_grams(self) -> Mapping[str, Gram]:
        """The same for the recovery, which uses them up; a second request reads the data again."""
        found = self.grams()
        self.release(GRAMS)
        return found

    def obstacle(self) -> str | None:
        """Why units had better not be ranked by expected divergence, in a few words; None where they can be.

        One sample goes through the model and back, which shows whether the task needs targets for it, and whether a
        gradient comes to what each group's consumers read.
        """
        size = sum(self._moment_bytes())
        if size > MOST_BYTES:
            return f"second moments of gradients would take {size / 1e9:.1f} GB"
        readers = readers_of(self.model, self.space)
        sample = next(iter(self.batches(1)), None)
        if sample is None:
            return "there are no calibration samples"
        generator = torch.Generator().manual_seed(self.seed)
        with torch.no_grad(), evaluating(self.model):
            drawn = self.source.unlabelled_loss(self.model, sample[0], generator)
        if drawn is None:
            return "the task does not say what small changes of its outputs cost"
        moments, _ = gradient_moments(self.source, self.model, self.space, [sample], (), self.seed)
        for group, names in zip(self.space.groups, readers, strict=True):
            if all(moments[name].square is None for name in names):
                return f"no gradient comes to what reads the group {group.name!r}"
        return None

    def _moment_bytes(self) -> Iterator[float]:
        for name, cut in mendable_consumers(self.model, self.space).items():
            inputs = len(self.space.axes[cut.axis].slots)
            groups = getattr(self.model.get_submodule(name), "groups", 1)
            yield _EACH_BYTES * inputs * inputs / max(1, groups)

    def ranked_by_divergence(self) -> tuple[Scores, Curves]:
        found = self._eliminations(None)
        spare = l2(self.model, self.space) if len(found) < len(self.space.groups) else []
        scores = [found[g].ranks if g in found else spare[g] for g in range(len(self.space.groups))]
        curves = divergence_curves(found)
        self.keep(_key(removal_orders(scores)), curves)
        return scores, curves

    def divergence_curves(self, importance: Sequence[Floats]) -> Curves:
        """Curves of the ranking that plans keep units by."""
        orders = removal_orders(importance)
        curves = self.cached(_key(orders), lambda: divergence_curves(self._eliminations(orders)))
        self.keep(CURVES, curves)
        return curves

    def _eliminations(self, orders: Sequence[Ints] | None) -> dict[int, Elimination]:
        grams = self.grams()
        batches = self.batches(FISHER_SAMPLES if self.limit is None else min(self.limit, FISHER_SAMPLES))
        moments, samples = gradient_moments(self.source, self.model, self.space, batches, grams, self.seed)
        unseen = errors_of_unseen_samples(
            self.model, self.space, lambda: self.batches(self.recovery_limit), grams, self.ridge
        )
        return eliminations(self.model, self.space, grams, moments, samples, self.ridge, orders, unseen)


def removal_orders(importance: Sequence[Floats]) -> list[Ints]:
    """The order (units,) in which each group's units go: the lowest score first, as `plan.best_units` keeps them."""
    return [np.argsort(-np.asarray(s, dtype=np.float64), kind="stable")[::-1] for s in importance]


def _key(orders: Sequence[Ints]) -> str:
    digest = hashlib.sha256(b"".join(order.astype(np.int64).tobytes() for order in orders)).hexdigest()
    return f"{CURVES} {digest}"
